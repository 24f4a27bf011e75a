"""The ceilings of a report as numbers: whatever of them is there and makes sense.

They come back from JSON as anything at all; an endless rate (no limit) counts as absent.
"""

import math
from collections.abc import Mapping


def memory_levels(ceilings: Mapping[str, object]) -> dict[str, float]:
    """Bytes per second by name, smallest level first; levels of one rate under one name."""
    names: dict[float, list[str]] = {}
    levels = ceilings.get("memory")
    for level in levels if isinstance(levels, list | tuple) else ():
        rate = positive(level, "bytes_per_s") if isinstance(level, Mapping) else None
        if rate is not None:
            names.setdefault(rate, []).append(str(level.get("name", "memory")))
    return {", ".join(each): rate for rate, each in names.items()}


def flop_rates(ceilings: Mapping[str, object]) -> dict[str, float]:
    """Operations per second by dtype."""
    found = ceilings.get("flops_per_s")
    if not isinstance(found, Mapping):
        return {}
    rates = {str(dtype): positive(found, dtype) for dtype in found}
    return {dtype: rate for dtype, rate in rates.items() if rate is not None}


def positive(values: Mapping[str, object], key: str) -> float | None:
    """A number above 0 under `key`, None where there is none."""
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 < value < math.inf else None
