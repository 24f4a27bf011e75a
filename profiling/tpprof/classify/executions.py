"""Which rows of a trace are work, and when.

On a device, everything it executed. On a CPU rank nothing launches anything: there the operators of
the busiest thread stand for kernels - this project's `tpinfer.op` ranges where they are. Of foreign
operators, which nest, the outermost one with a model of its cost stands for all it calls; what an
operator without a model does itself, between the operators that it calls, counts as work of its
own. Collectives of a CPU rank run on the backend's threads, in ranges such as `gloo:all_reduce`;
the calls that only hand them over (`c10d::allreduce_`) are the host's time then.
"""

from dataclasses import dataclass

import numpy as np

from tpprof import intervals
from tpprof.classify.calls import call_costs
from tpprof.events import NONE, Kind, Trace
from tpprof.readers.collective_names import NOT_COLLECTIVES, collective_name

OP_PREFIX = "tpinfer.op "
_ON_THREADS = ("gloo:", "mpi:", "ucc:")
"""Backends whose collectives run on threads of the host."""
_HANDS_OVER = ("c10d::", "_c10d_functional::", "c10d_functional::", "record_param_comms")


@dataclass(frozen=True)
class Executions:
    """n pieces of work, ascending by row; a row may come several times."""

    row: np.ndarray
    start_ns: np.ndarray
    end_ns: np.ndarray
    is_cpu: bool
    collective: dict[int, str]
    """By string index: names that say by themselves that a piece on a CPU is a collective, and
    which."""

    def __len__(self) -> int:
        return len(self.row)


def executions(trace: Trace) -> Executions:
    """The work of one rank."""
    device = np.flatnonzero(trace.is_device())
    if len(device):
        return _whole(trace, device, False)
    named = np.array([text.startswith(OP_PREFIX) for text in trace.strings] or [False], bool)
    ours = np.flatnonzero(trace.kind == Kind.RANGE)
    ours = ours[named[trace.name[ours]]]
    if len(ours):
        return _whole(trace, ours[trace.lane[ours] == _busiest(trace, ours)], True)
    return _foreign(trace)


def _whole(trace: Trace, rows: np.ndarray, is_cpu: bool) -> Executions:
    rows = rows.astype(np.int64)
    return Executions(rows, trace.start_ns[rows], trace.end_ns[rows], is_cpu, {})


def _busiest(trace: Trace, rows: np.ndarray) -> int:
    """Lane with most time in these rows."""
    spent = trace.end_ns[rows] - trace.start_ns[rows] + 1
    return int(np.bincount(trace.lane[rows], weights=spent).argmax())


def _foreign(trace: Trace) -> Executions:
    ops = trace.rows_of(Kind.OP)
    if not len(ops):
        return _whole(trace, ops, True)
    wires, collective = _wire_rows(trace)
    mine = ops[trace.lane[ops] == _busiest(trace, ops)]
    handing = np.array([text.startswith(_HANDS_OVER) for text in trace.strings], bool)
    hands_over = handing[trace.name[mine]]
    units = _units(trace, mine, hands_over)
    kept = mine[units & ~hands_over] if len(wires) else mine[units]
    if not len(wires):
        collective = {
            index: collective_name(trace.strings[index].rstrip("_"))
            for index in np.unique(trace.name[mine[units & hands_over]]).tolist()
        }
    row, start, end = _between(trace, mine, units)
    row = np.concatenate((kept, wires, row)).astype(np.int64)
    start = np.concatenate((trace.start_ns[kept], trace.start_ns[wires], start))
    end = np.concatenate((trace.end_ns[kept], trace.end_ns[wires], end))
    order = np.lexsort((start, row))
    return Executions(row[order], start[order], end[order], True, collective)


def _wire_rows(trace: Trace) -> tuple[np.ndarray, dict[int, str]]:
    """Ranges in which a backend's thread communicates, and their collectives by string index."""
    names = {
        index: collective_name(text)
        for index, text in enumerate(trace.strings)
        if text.startswith(_ON_THREADS)
    }
    names = {index: name for index, name in names.items() if name not in NOT_COLLECTIVES}
    ranges = np.flatnonzero(trace.kind == Kind.RANGE)
    return ranges[np.isin(trace.name[ranges], list(names))], names


def _units(trace: Trace, ops: np.ndarray, hands_over: np.ndarray) -> np.ndarray:
    """bool [ops]: outermost operators that stand for all they call. Rows nest, sorted by
    (start, -end)."""
    start, end = trace.start_ns[ops], trace.end_ns[ops]
    following = np.append(start[1:], np.iinfo(np.int64).max)
    has_children = following < end
    unit = ~has_children | (call_costs(trace, ops).num_bytes > 0) | hands_over
    reach = np.maximum.accumulate(np.where(unit, end, np.iinfo(np.int64).min))
    unit[1:] &= start[1:] >= reach[:-1]
    return unit


def _between(
    trace: Trace, ops: np.ndarray, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, start, end) of what operators around units do outside them; the innermost one that is
    open does it."""
    start, end = trace.start_ns[ops], trace.end_ns[ops]
    open_ns = intervals.merge(start, end)
    rest = intervals.subtract(open_ns, intervals.merge(start[units], end[units]))
    begin, stop, _ = intervals.cut(*rest, np.concatenate((start, end)))
    doer = intervals.innermost(start, end, begin)
    row = np.where(doer >= 0, ops[doer], NONE)
    return row[doer >= 0], begin[doer >= 0], stop[doer >= 0]
