"""The merged trace of a run: clocks aligned, and per rank a track of waiting and transfer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tpprof.classify.work import Work
from tpprof.events import Trace
from tpprof.ranks.clock import Clock
from tpprof.ranks.match import Matched
from tpprof.ranks.wait import Waits
from tpprof.report.perfetto import Track, write_perfetto
from tpprof.report.text_evidence import describe_alignment

TITLE = "waiting and transfer"


@dataclass(frozen=True, slots=True)
class Merged:
    """What came of it."""

    num_slices: int
    clocks: list[str]
    """A line a rank."""
    warnings: list[str]


def merge_ranks(
    path: Path,
    traces: Sequence[Trace],
    works: Sequence[Work],
    matched: Matched,
    waits: Waits,
    clocks: Sequence[Clock],
) -> Merged:
    """Write the trace. Sequences go by rank. Raises TraceError where it cannot be written."""
    tracks = wait_tracks(traces, works, matched, waits, clocks)
    count = write_perfetto(path, traces, [clock.to_reference for clock in clocks], tracks)
    apart = [clock.rank for clock in clocks if not clock.accepted]
    warnings = list(matched.warnings)
    if apart:
        ranks = ", ".join(map(str, apart))
        warnings.append(f"rank {ranks}: drawn on a clock that could not be aligned")
    lines = [describe_alignment(str(clock.rank), clock.alignment()) for clock in clocks]
    return Merged(count, [f"clock of {line}" for line in lines], warnings)


def wait_tracks(
    traces: Sequence[Trace],
    works: Sequence[Work],
    matched: Matched,
    waits: Waits,
    clocks: Sequence[Clock],
) -> list[Track]:
    """Per rank two slices for each collective that could be divided."""
    tracks = []
    for column, (work, clock) in enumerate(zip(works, clocks, strict=True)):
        track = Track(TITLE)
        entry = matched.work[waits.row, column] if len(waits.row) else np.empty(0, np.int64)
        mine = np.flatnonzero(entry >= 0)
        arrival = waits.arrival_ns[mine, column]
        ready = arrival + waits.wait_ns[mine, column]
        points = [clock.to_reference(t) for t in (arrival, ready, work.end_ns[entry[mine]])]
        names = matched.name[waits.row[mine]]
        last = waits.last[mine]
        for name, late, begin, middle, end in zip(
            names.tolist(), last.tolist(), *(p.tolist() for p in points), strict=True
        ):
            text = matched.names[name]
            whom = f" for rank {traces[late].rank}" if late >= 0 else ""
            track.add(f"wait{whom} ({text})", begin, middle)
            track.add(f"transfer ({text})", middle, end)
        tracks.append(track)
    return tracks
