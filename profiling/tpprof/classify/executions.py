"""Which rows of a trace are work.

On a device, everything it executed. On a CPU rank nothing launches anything: there the operators of
the busiest thread stand for kernels - this project's `tpinfer.op` ranges where they are, else the
operators that call no other.
"""

import numpy as np

from tpprof.events import Kind, Trace

OP_PREFIX = "tpinfer.op "


def executions(trace: Trace) -> tuple[np.ndarray, bool]:
    """(int64 rows ascending, whether they are a host thread's)."""
    device = np.flatnonzero(trace.is_device())
    if len(device):
        return device, False
    named = np.array([text.startswith(OP_PREFIX) for text in trace.strings], bool)
    if named.any():
        ours = np.flatnonzero((trace.kind == Kind.RANGE) & named[trace.name])
        if len(ours):
            return ours[trace.lane[ours] == _busiest(trace, ours)], True
    ops = trace.rows_of(Kind.OP)
    if not len(ops):
        return ops, True
    mine = ops[trace.lane[ops] == _busiest(trace, ops)]
    return mine[_is_leaf(trace.start_ns[mine], trace.end_ns[mine])], True


def _busiest(trace: Trace, rows: np.ndarray) -> int:
    """Lane with most time in these rows."""
    spent = trace.end_ns[rows] - trace.start_ns[rows] + 1
    return int(np.bincount(trace.lane[rows], weights=spent).argmax())


def _is_leaf(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """bool: no later row begins inside. Rows nest and are sorted by (start, -end)."""
    following = np.append(starts[1:], np.iinfo(np.int64).max)
    return following >= ends
