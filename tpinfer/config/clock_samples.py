"""What a rank's device said of its clocks while steps ran: the record behind `rank<r>.clocks.json`.

The file is one JSON object with the fields of `ClockSamples`; columns have one entry per sample and
null where the device said nothing. `machine.clocks` takes the samples, `tpprof` reads them. Times
are of the monotonic clock; `clock_pairs` tie it to the system time that some recorders use.
"""

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

FORMAT_VERSION = 1
IDLE = "gpu_idle"
"""Nothing ran: what the clock was then says nothing about kernels."""
_MOST_BYTES = 1 << 27

REASON_WORDS = {
    IDLE: "idle",
    "applications_clocks_setting": "clocks set by the user",
    "sw_power_cap": "power cap",
    "hw_slowdown": "hardware slowdown",
    "sync_boost": "sync boost with another GPU",
    "sw_thermal_slowdown": "thermal",
    "hw_thermal_slowdown": "thermal",
    "hw_power_brake_slowdown": "power brake",
    "display_clock_setting": "display clocks",
    "cpu_thermal": "thermal",
    "cpu_frequency_limit": "frequency limit",
}
"""Reasons as the samples name them -> in words. In the order of the driver's bits, then CPUs'."""
NO_REASON = "no reason told"


class ClockSamples(msgspec.Struct, frozen=True):
    """Columns of one length, oldest sample first."""

    rank: int
    kind: str
    """`gpu` or `cpu`."""
    device: str
    """Its name, for people."""
    period_ns: int
    """Between samples, about."""
    clock_pairs: list[tuple[int, int]]
    """(monotonic_ns, realtime_ns) of one moment each: when sampling began and when it ended."""
    monotonic_ns: list[int]
    compute_mhz: list[float | None]
    """Clock of the multiprocessors (of a CPU: of the fastest of the rank's cores)."""
    memory_mhz: list[float | None]
    power_w: list[float | None]
    temperature_c: list[float | None]
    reasons: list[list[str] | None]
    """Why the clock was not higher, of REASON_WORDS; empty where nothing held it back."""
    most_compute_mhz: float | None = None
    """The highest the device has."""
    most_memory_mhz: float | None = None
    power_limit_w: float | None = None
    format_version: int = FORMAT_VERSION

    def __len__(self) -> int:
        return len(self.monotonic_ns)

    def busy(self) -> list[int]:
        """Samples that were not taken while the device was idle."""
        return [i for i, names in enumerate(self.reasons) if IDLE not in (names or ())]

    def median(self, column: Sequence[float | None]) -> float | None:
        """Of one column over the busy samples; None where nothing was said."""
        known = [value for i in self.busy() if (value := column[i]) is not None]
        return statistics.median(known) if known else None

    def reasons_seen(self) -> tuple[str, ...]:
        """Reasons at any busy sample, in the order of REASON_WORDS."""
        seen = {name for i in self.busy() for name in self.reasons[i] or ()}
        return tuple(name for name in REASON_WORDS if name in seen)

    def is_sound(self) -> bool:
        """Whether columns are of one length and times go on."""
        columns = (self.compute_mhz, self.memory_mhz, self.power_w, self.temperature_c)
        lengths = {len(column) for column in (*columns, self.reasons)}
        times = self.monotonic_ns
        return (
            lengths == {len(times)}
            and bool(self.clock_pairs)
            and self.period_ns > 0
            and all(a < b for a, b in pairwise(times))
        )


def describe_reasons(names: Iterable[str] | None) -> str:
    """`power cap and thermal`; NO_REASON for none."""
    words = dict.fromkeys(REASON_WORDS.get(name, name) for name in names or () if name != IDLE)
    return " and ".join(words) or NO_REASON


def clock_samples_path(directory: Path, rank: int) -> Path:
    """Where the samples of a rank lie beside its trace."""
    return directory / f"rank{rank}.clocks.json"


def write_clock_samples(samples: ClockSamples, path: Path) -> None:
    """Write `samples` so that `read_clock_samples` gives them back."""
    path.write_bytes(msgspec.json.encode(samples) + b"\n")


def read_clock_samples(path: Path) -> ClockSamples | None:
    """The samples in a file; None for one that is missing, damaged or of a later version."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        found = msgspec.json.decode(path.read_bytes(), type=ClockSamples)
    except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return found if found.format_version <= FORMAT_VERSION and found.is_sound() else None
