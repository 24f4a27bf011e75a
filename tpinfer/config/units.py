"""Quantities with units, from text and back. Bare numbers are refused: they may mean anything.

Bytes are `B`, bits are `b`; `k M G T` are powers of 1000, `Ki Mi Gi Ti` of 1024.
"""

import re
from collections.abc import Callable
from decimal import Decimal

from tpinfer.config.errors import ConfigError

_PREFIXES = {
    "": 1.0,
    "k": 1e3,
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
}
_TIMES = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(.*?)\s*")


def parse_size(text: str) -> float:
    """Bytes in `80GiB`, `512 kB`. Raises ConfigError."""
    value, unit = _split(text, "80GiB")
    if not unit.endswith("B") or unit[:-1] not in _PREFIXES:
        raise _wrong_unit(text, unit, "a size", "B, kB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return value * _PREFIXES[unit[:-1]]


def parse_rate(text: str) -> float:
    """Bytes per second in one direction in `450GB/s`, `400Gb/s` (bits), `900GB/s bidir` (halved).

    Raises ConfigError.
    """
    value, unit = _split(text, "450GB/s")
    halved = unit.endswith("bidir")
    unit = unit.removesuffix("bidir").rstrip()
    letter = unit[-3:-2]
    if not unit.endswith("/s") or letter not in ("B", "b") or unit[:-3] not in _PREFIXES:
        raise _wrong_unit(text, unit, "a rate", "GB/s (bytes) or Gb/s (bits)")
    value *= _PREFIXES[unit[:-3]] / (8 if letter == "b" else 1)
    return value / 2 if halved else value


def parse_flops(text: str) -> float:
    """Operations per second in `989TFLOPS` or, of integers, `1979TOPS`. Raises ConfigError."""
    value, unit = _split(text, "989TFLOPS")
    prefix = re.sub(r"(FLOPS|FLOP/s|OPS)$", "", unit)
    if prefix == unit or prefix not in _PREFIXES:
        raise _wrong_unit(text, unit, "an arithmetic rate", "GFLOPS, TFLOPS or PFLOPS")
    return value * _PREFIXES[prefix]


def parse_time(text: str, zero: bool = False) -> float:
    """Seconds in `3us`, `1.5 ms`; `0us` only where `zero` is allowed. Raises ConfigError."""
    value, unit = _split(text, "3us", zero)
    if unit not in _TIMES:
        raise _wrong_unit(text, unit, "a time", ", ".join(_TIMES))
    # In decimal, so that 4.2us is the very number that the literal 4.2e-6 is.
    return float(Decimal(repr(value)) * Decimal(repr(_TIMES[unit])))


def parse_price(text: str) -> float:
    """US dollars per hour in `3.99USD/h` (or `3.99USD` under a key that says per hour).

    Raises ConfigError.
    """
    value, unit = _split(text, "3.99USD/h")
    if unit not in ("USD/h", "USD"):
        raise _wrong_unit(text, unit, "a price", "USD/h")
    return value


def format_size(num_bytes: float) -> str:
    """`5.9 MB`; powers of 1000."""
    return _format(num_bytes, "B")


def format_rate(bytes_per_s: float) -> str:
    """`24 GB/s`."""
    return _format(bytes_per_s, "B/s")


def format_flops(flops_per_s: float) -> str:
    """`989 TFLOPS`."""
    return _format(flops_per_s, "FLOPS")


def format_time(seconds: float) -> str:
    """`3.2 us`."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= factor:
            return f"{_digits(seconds / factor)} {unit}"
    return f"{_digits(seconds / 1e-9)} ns"


def format_price(usd_per_hour: float) -> str:
    """`3.99 USD/h`."""
    return f"{usd_per_hour:.2f} USD/h"


def exact_size(num_bytes: int) -> str:
    """The shortest text that `parse_size` reads back as these bytes."""
    prefixes = ("TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "kB", "B")
    found = (
        f"{num_bytes // int(_PREFIXES[unit[:-1]])}{unit}"
        for unit in prefixes
        if num_bytes % int(_PREFIXES[unit[:-1]]) == 0
    )
    return min(found, key=len)


def exact_rate(bytes_per_s: float) -> str:
    """A text that `parse_rate` reads back as this very number."""
    return _exact(bytes_per_s, "B/s", parse_rate)


def exact_flops(flops_per_s: float) -> str:
    """A text that `parse_flops` reads back as this very number."""
    return _exact(flops_per_s, "FLOPS", parse_flops)


def exact_time(seconds: float) -> str:
    """A text that `parse_time` reads back as this very number."""
    for unit in ("s", "ms", "us", "ns"):
        scaled = seconds / _TIMES[unit]
        text = f"{_short(scaled)}{unit}"
        if (scaled >= 0.9999 or not seconds) and parse_time(text, True) == seconds:
            return text
    return f"{seconds!r}s"


def _exact(value: float, unit: str, parse: Callable[[str], float]) -> str:
    for prefix in ("P", "T", "G", "M", "k"):
        scaled = value / _PREFIXES[prefix]
        if scaled >= 1 and parse(text := f"{_short(scaled)}{prefix}{unit}") == value:
            return text
    return f"{value!r}{unit}"


def _short(value: float) -> str:
    """Twelve digits, which hides what dividing by a power of ten leaves behind."""
    return f"{value:.12g}"


def _split(text: str, example: str, zero: bool = False) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a number with a unit; write it like {example}")
    value = float(match[1])
    if not match[2]:
        raise ConfigError(f"{text!r} has no unit; write it like {example}")
    if not 0 <= value < float("inf") or (value == 0 and not zero):
        least = "0 or more" if zero else "above 0"
        raise ConfigError(f"{text!r} must be {least}; write it like {example}")
    return value, match[2]


def _wrong_unit(text: str, unit: str, what: str, allowed: str) -> ConfigError:
    return ConfigError(f"{text!r} has the unit {unit!r}, but {what} is needed; use {allowed}")


def _format(value: float, unit: str) -> str:
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor * 0.9995:
            return f"{_digits(value / factor)} {prefix}{unit}"
    return f"{_digits(value)} {unit}"


def _digits(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
