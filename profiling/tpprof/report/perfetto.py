"""All ranks in one trace for ui.perfetto.dev, on one clock, with a track of waiting and transfer.

The format is Chrome's JSON: complete events (`X`) with microseconds of three decimals. Slices of
one track must nest there, so kernels that overlap on a stream get a second line.
"""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from tpprof.errors import TraceError
from tpprof.events import NONE, Kind, Trace

ToReference = Callable[[np.ndarray], np.ndarray]
"""Moments of one rank's clock -> the same on the reference clock, int64 ns."""
_CATEGORY = {
    Kind.KERNEL: "kernel",
    Kind.COPY: "copy",
    Kind.MEMSET: "memset",
    Kind.OP: "op",
    Kind.LAUNCH: "launch",
    Kind.RANGE: "annotation",
    Kind.DEVICE_RANGE: "annotation",
    Kind.PYTHON: "python",
    Kind.SYNC: "sync",
    Kind.OVERHEAD: "recorder",
}
_TRACK = 1
"""Thread number of the track of waiting and transfer; lanes follow it."""


@dataclass(frozen=True)
class Track:
    """Slices that are drawn above a rank's lanes."""

    title: str
    names: list[str] = field(default_factory=list)
    start_ns: list[int] = field(default_factory=list)
    """On the reference clock."""
    end_ns: list[int] = field(default_factory=list)

    def add(self, name: str, start_ns: int, end_ns: int) -> None:
        """One slice; empty ones are left out."""
        if end_ns > start_ns:
            self.names.append(name)
            self.start_ns.append(start_ns)
            self.end_ns.append(end_ns)


def write_perfetto(
    path: Path,
    traces: Sequence[Trace],
    to_reference: Sequence[ToReference],
    tracks: Sequence[Track],
) -> int:
    """Write the merged trace, compressed where the name ends in `.gz`; returns how many slices.

    `to_reference` and `tracks` go by rank like `traces`. Raises TraceError where the file cannot be
    written.
    """
    times = [
        (align(trace.start_ns), align(trace.end_ns))
        for trace, align in zip(traces, to_reference, strict=True)
    ]
    begins = [int(start.min()) for start, _ in times if len(start)]
    begins += [min(track.start_ns) for track in tracks if track.start_ns]
    zero = min(begins, default=0)
    count = 0
    with _opened(path) as out:
        ranks = ",".join(str(trace.rank) for trace in traces)
        out.write(f'{{"displayTimeUnit":"ms","mergedRanks":[{ranks}],')
        out.write(f'"baseTimeNanoseconds":{zero},"traceEvents":[\n')
        separator = ""
        for trace, (start, end), track in zip(traces, times, tracks, strict=True):
            for text in _rank_events(trace, start - zero, end - zero, track, zero):
                out.write(separator)
                out.write(text)
                separator = ",\n"
                count += text.startswith('{"ph":"X"')
        out.write("\n]}\n")
    return count


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """A text file; a half-written one does not stay."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "wt", compresslevel=3, encoding="utf-8") as out:
                yield out
        else:
            with path.open("w", encoding="utf-8") as out:
                yield out
    except OSError as error:
        # /dev/full is no file of ours, nor is a directory.
        if path.is_file():
            path.unlink(missing_ok=True)
        raise TraceError(
            f"{path} cannot be written: {error.strerror or error}; name another file with -o"
        ) from None


def _rank_events(
    trace: Trace, start_ns: np.ndarray, end_ns: np.ndarray, track: Track, zero_ns: int
) -> Iterator[str]:
    """Names of tracks, then slices, as JSON objects."""
    rank = trace.rank
    yield _metadata("process_name", rank, 0, "name", f"rank {rank}")
    yield _metadata("process_sort_index", rank, 0, "sort_index", rank)
    yield _metadata("thread_name", rank, _TRACK, "name", track.title)
    yield _metadata("thread_sort_index", rank, _TRACK, "sort_index", -1)
    for name, start, end in zip(track.names, track.start_ns, track.end_ns, strict=True):
        yield _slice(rank, _TRACK, json.dumps(name), "comm", start - zero_ns, end - start)
    lines, titles = lines_of(trace, start_ns, end_ns)
    for number, title in enumerate(titles):
        yield _metadata("thread_name", rank, _TRACK + 1 + number, "name", title)
        yield _metadata("thread_sort_index", rank, _TRACK + 1 + number, "sort_index", number)
    names = [json.dumps(text) for text in trace.strings]
    categories = {int(kind): text for kind, text in _CATEGORY.items()}
    columns = (trace.name, trace.kind, lines, start_ns, end_ns - start_ns)
    for name, kind, line, start, duration in zip(*(c.tolist() for c in columns), strict=True):
        yield _slice(rank, _TRACK + 1 + line, names[name], categories[kind], start, duration)


def _metadata(kind: str, rank: int, line: int, key: str, value: object) -> str:
    return (
        f'{{"ph":"M","pid":{rank},"tid":{line},"name":"{kind}",'
        f'"args":{{"{key}":{json.dumps(value)}}}}}'
    )


def _slice(rank: int, line: int, name: str, category: str, start_ns: int, duration_ns: int) -> str:
    return (
        f'{{"ph":"X","pid":{rank},"tid":{line},"cat":"{category}","name":{name},'
        f'"ts":{start_ns // 1000}.{start_ns % 1000:03d},'
        f'"dur":{duration_ns // 1000}.{duration_ns % 1000:03d}}}'
    )


def lines_of(
    trace: Trace, start_ns: np.ndarray, end_ns: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """int64 [rows]: line that each row is drawn on, and the lines' titles. Rows of one line nest.

    Streams come before threads; a stream's projected annotations have a line of their own.
    """
    lines = np.zeros(len(trace), np.int64)
    titles: list[str] = []
    order = sorted(range(len(trace.lanes)), key=lambda i: (not trace.lanes[i].is_device, i))
    is_projection = trace.kind == Kind.DEVICE_RANGE
    for lane in order:
        for projected in (False, True):
            rows = np.flatnonzero((trace.lane == lane) & (is_projection == projected))
            if not len(rows):
                continue
            depth = _nesting_lines(start_ns[rows], end_ns[rows])
            lines[rows] = len(titles) + depth
            title = _lane_title(trace, lane) + (" annotations" if projected else "")
            extra = range(1, int(depth.max()) + 1)
            titles += [title, *(f"{title} (overlap {i})" for i in extra)]
    return lines, titles


def _nesting_lines(start_ns: np.ndarray, end_ns: np.ndarray) -> np.ndarray:
    """int64 [rows]: the first line on which a row lies inside or behind what is there already.
    Rows are sorted by (start, -end)."""
    found = np.zeros(len(start_ns), np.int64)
    if (start_ns[1:] >= end_ns[:-1]).all():
        return found
    stacks: list[list[int]] = []
    for i, (start, end) in enumerate(zip(start_ns.tolist(), end_ns.tolist(), strict=True)):
        for number, stack in enumerate(stacks):
            while stack and stack[-1] <= start:
                stack.pop()
            if not stack or end <= stack[-1]:
                stack.append(end)
                found[i] = number
                break
        else:
            found[i] = len(stacks)
            stacks.append([end])
    return found


def _lane_title(trace: Trace, lane: int) -> str:
    found = trace.lanes[lane]
    if found.is_device:
        device = f"device {found.device} " if found.device != NONE else ""
        return f"{device}stream {found.tid}"
    return f"thread {found.tid}"
