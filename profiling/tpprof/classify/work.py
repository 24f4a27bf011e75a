"""The work in a trace, one entry per kernel, copy or (on CPU ranks) operator, with its verdict.

`classify` makes it from a `Trace`; the sweep, the match across ranks and the reports read nothing
else about kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class WorkKind(IntEnum):
    """What a piece of work does, as far as owning wall time goes."""

    COMPUTE = 0
    """Any kernel that is not communication, a copy or a fill."""
    COMM = 1
    """A collective or a send/receive."""
    FUSED_COMM = 2
    """A collective with arithmetic in one kernel (reduce + norm)."""
    COPY = 3
    """Copies and fills."""


@dataclass(frozen=True)
class Work:
    """Columns of one length, sorted by (start, lane, -end); n entries."""

    row: np.ndarray
    """int64 [n]: row of the trace."""
    start_ns: np.ndarray
    """int64 [n]."""
    end_ns: np.ndarray
    """int64 [n]."""
    lane: np.ndarray
    """int32 [n]: lane of the trace; equal lanes execute in order."""
    kind: np.ndarray
    """int8 [n], of `WorkKind`."""
    leaf: np.ndarray
    """int8 [n]: index into `results.LEAVES`; `comm_unsplit` for communication, which the match
    across ranks divides later."""
    balanced: np.ndarray
    """bool [n]: both ceilings within a factor of 1.25."""
    floor_ns: np.ndarray
    """int64 [n]: least time the ceilings allow; 0 where unmodelled."""
    flops: np.ndarray
    """int64 [n]; -1 where unknown."""
    num_bytes: np.ndarray
    """int64 [n]: memory traffic; -1 where unknown."""
    key: np.ndarray
    """int32 [n]: index into `keys`: op id or role; -1 where it has none."""
    layer: np.ndarray
    """int32 [n]: layer number; -1 where it belongs to none."""
    step: np.ndarray
    """int64 [n]: id of the step it ran in, from annotations; -1 where unknown."""
    keys: list[str]
    comm_op: np.ndarray
    """int32 [n]: index into `keys` of `allreduce`, `allgather`, ...; -1 for others."""
    comm_bytes: np.ndarray
    """int64 [n]: message bytes of this rank; -1 where unknown."""
    comm_group: np.ndarray
    """int32 [n]: index into `keys` of the group's name; -1 where unknown."""
    comm_size: np.ndarray
    """int32 [n]: ranks of the group; -1 where unknown."""
    comm_sequence: np.ndarray
    """int64 [n]: equal on all ranks for one collective; -1 where not recorded."""
    ceilings_ns: Mapping[str, np.ndarray]
    """Least time under each ceiling alone, int64 [n]; such as `compute`, `memory`, `wire`."""
    is_cpu: bool = False
    """Operators of a host thread stand for kernels; then nothing launches them."""
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.row)
