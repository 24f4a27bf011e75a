"""Recordings of one run, by whatever recorder, to one `Trace` a rank."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

from ..errors import TraceError
from ..events import NONE, Trace
from .find import find_traces, is_nsight
from .kineto import read_kineto
from .nsight import read_nsight


def read_traces(paths: Sequence[str | Path]) -> list[Trace]:
    """One trace a rank, by rank; what was noticed while finding them is in the first's warnings.

    Args: trace files, directories, globs; see `find`.
    Raises TraceError where there is nothing to read, or two files are of one rank.
    """
    found = find_traces(paths)
    traces: list[Trace] = []
    for rank, path in found.files:
        if is_nsight(path):
            traces += read_nsight(path, None if rank == NONE else rank)
        else:
            traces.append(read_kineto(path, None if rank == NONE else rank))
    traces = _numbered(traces, found.warnings)
    _refuse_twins(traces)
    found.warnings += _missing(traces)
    first = replace(traces[0], warnings=(*found.warnings, *traces[0].warnings))
    return [first, *traces[1:]]


def _numbered(traces: list[Trace], warnings: list[str]) -> list[Trace]:
    """Ranks for traces that nobody told one: the lowest free ones, in order."""
    taken = {trace.rank for trace in traces}
    free = (number for number in range(len(traces) + len(taken)) if number not in taken)
    numbered, told = [], []
    for trace in traces:
        if trace.rank == NONE:
            trace = replace(trace, rank=next(free))
            told.append(f"{trace.source} as {trace.rank}")
        numbered.append(trace)
    if len(told) > 1 and len({trace.source for trace in traces}) > 1:
        warnings.append(f"no file says its rank; numbered in the order given: {', '.join(told)}")
    return sorted(numbered, key=lambda trace: trace.rank)


def _refuse_twins(traces: list[Trace]) -> None:
    for one, other in pairwise(traces):
        if one.rank == other.rank:
            raise TraceError(
                f"rank {one.rank} is in {one.source} and in {other.source}; name the files of one "
                "run, one a rank"
            )


def _missing(traces: list[Trace]) -> list[str]:
    """What is missing of the world that the files tell, or between the ranks that are there."""
    ranks = {trace.rank for trace in traces}
    world = max(max(trace.world_size for trace in traces), max(ranks) + 1)
    # A damaged file may announce any world: look no further than what is shown.
    missing = list(islice((rank for rank in range(world) if rank not in ranks), 9))
    if not missing:
        return []
    listed = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return [
        f"no file of rank {listed} (of {world} ranks): what they did while others waited for them "
        "is not known; name their files too"
    ]
