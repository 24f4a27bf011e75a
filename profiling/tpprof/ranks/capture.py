"""What a recording run wrote beside its traces: `run.json`, the hosts' clocks and how
fast the devices were clocked.

Files that are missing or damaged say nothing; they are no reason to refuse a trace.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from tpinfer.config.clock_samples import ClockSamples, read_clock_samples

_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Capture:
    """What is known of the run as a whole."""

    dilation: float | None = None
    """Profiled over unprofiled wall."""
    shared_clocks: tuple[frozenset[int], ...] = ()
    """Ranks of one host each: their host rows read one clock."""
    samples: Mapping[int, ClockSamples] = field(default_factory=dict)
    """Per rank, the clocks of its device."""
    emulation: str = ""
    """Why the run's times have no cause worth telling; empty where they have."""


_Read = TypeVar("_Read")


class _Run(msgspec.Struct):
    dilation: float | None = None
    emulation: str | None = None


class _HostClock(msgspec.Struct):
    ranks: list[int]


def read_capture(sources: Iterable[str]) -> Capture:
    """Look beside the traces of a run."""
    folders = {Path(source).parent for source in sources if source}
    dilation, clocks, samples, emulation = None, [], {}, ""
    for folder in sorted(folders):
        run = _read(folder / "run.json", _Run)
        if run is not None and run.dilation is not None and run.dilation > 0:
            dilation = run.dilation
        if run is not None and run.emulation:
            emulation = run.emulation
        for path in sorted(folder.glob("clock-*.json")) if folder.is_dir() else []:
            host = _read(path, _HostClock)
            if host is not None:
                clocks.append(frozenset(host.ranks))
        for path in sorted(folder.glob("rank*.clocks.json")) if folder.is_dir() else []:
            found = read_clock_samples(path)
            if found is not None:
                samples[found.rank] = found
    return Capture(dilation, tuple(clocks), samples, emulation)


def _read(path: Path, kind: type[_Read]) -> _Read | None:
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None
