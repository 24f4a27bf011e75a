"""The one event model behind every recorder: columns of integers, one `Trace` a rank.

Readers fill it; everything behind them sees nothing else and never learns which recorder ran. Times
are integer ns on the recording host's clock. There is no Python object per event: a row is an index
into numpy columns, and text is an index into `Trace.strings`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

NONE = -1
"""What an integer column holds where a row has no such thing."""


class Kind(IntEnum):
    """What a row is."""

    KERNEL = 0
    """A kernel on a device stream."""
    COPY = 1
    """A copy on a device stream."""
    MEMSET = 2
    """A fill on a device stream."""
    OP = 3
    """A framework operator on a host thread (`aten::mm`); nests."""
    LAUNCH = 4
    """A runtime or driver API call on a host thread (`cudaLaunchKernel`, `cudaGraphLaunch`)."""
    RANGE = 5
    """An annotation on a host thread (record_function, NVTX push/pop); nests."""
    DEVICE_RANGE = 6
    """A recorder's projection of an annotation on a stream: a hint, never a wall interval."""
    PYTHON = 7
    """A Python frame or nn.Module call."""
    SYNC = 8
    """A recorded wait between streams, for an event or for the device."""
    OVERHEAD = 9
    """The recorder itself at work."""

    @property
    def is_device(self) -> bool:
        """Whether a device executes it."""
        return self <= Kind.MEMSET


@dataclass(frozen=True, slots=True)
class Lane:
    """One line that events lie on: a stream of a device, or a host thread."""

    is_device: bool
    pid: int
    """Process; NONE where a recorder does not tell it for streams."""
    tid: int
    """Thread, or stream."""
    device: int = NONE
    """Device index; NONE for threads."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a recorder says of one device. Zero where it says nothing."""

    name: str
    num_sms: int = 0
    memory_bytes: int = 0
    memory_bytes_per_s: float = 0.0
    l2_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Collectives:
    """What is known of rows that are collectives: arrays of one length, rows ascending."""

    row: np.ndarray
    """int64: row of the kernel (of the operator on CPU ranks)."""
    op: np.ndarray
    """int32: string index of `allreduce`, `allgather`, `reduce_scatter`, `broadcast`, ...; as the
    recorder spells it, lower case, without `_` and backend prefix."""
    num_bytes: np.ndarray
    """int64: message bytes of this rank, the larger of in and out; NONE where unknown."""
    group: np.ndarray
    """int32: string index of the process group's name; NONE where unknown."""
    group_size: np.ndarray
    """int32: ranks in the group; NONE where unknown."""
    sequence: np.ndarray
    """int64: `Seq`, equal on all ranks for one collective; NONE where the recorder is too old."""


@dataclass(frozen=True)
class Trace:
    """What one rank recorded. All columns have one length and are sorted by (start, -end).

    Readers guarantee: start <= end in every row (broken rows are dropped or clamped, counted and
    told in `warnings`); `launch`, `op` and `Collectives.row` are row numbers of this trace; nothing
    of the process environment is in it.
    """

    rank: int
    source: str
    """File it was read from, as the user named it."""
    recorder: str
    """`kineto` or `nsight`; for messages only."""
    strings: list[str]
    lanes: list[Lane]
    start_ns: np.ndarray
    """int64."""
    end_ns: np.ndarray
    """int64."""
    kind: np.ndarray
    """int8, of `Kind`."""
    name: np.ndarray
    """int32: string index."""
    lane: np.ndarray
    """int32: index into `lanes`."""
    launch: np.ndarray
    """int32: row of the LAUNCH that issued a device row; NONE for others or where it is missing.
    All kernels of one graph replay share one."""
    op: np.ndarray
    """int32: row of the OP that a device row or a LAUNCH was issued for; NONE where unknown."""
    node: np.ndarray
    """int64: graph node id of a device row; NONE outside graphs and where unknown."""
    num_blocks: np.ndarray
    """int64: thread blocks of a kernel's grid; NONE where unknown."""
    num_bytes: np.ndarray
    """int64: bytes of a COPY or MEMSET; NONE for others."""
    shapes: np.ndarray
    """int32: for an OP, string index of its inputs as compact JSON
    `[[[dims], ...], ["dtype", ...]]`; NONE where not recorded."""
    collectives: Collectives
    devices: Mapping[int, Device] = field(default_factory=dict)
    """By device index."""
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Ranks of each process group that the recorder lists, by name."""
    world_size: int = NONE
    num_lost: int = 0
    """Rows that the recorder says, or that broken times show, it lost or damaged."""
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.start_ns)

    def text(self, row: int) -> str:
        """Name of a row."""
        return self.strings[self.name[row]]

    def is_device(self) -> np.ndarray:
        """bool [rows]: rows a device executed."""
        return self.kind <= Kind.MEMSET

    def rows_of(self, *kinds: Kind) -> np.ndarray:
        """Rows of these kinds, ascending."""
        return np.flatnonzero(np.isin(self.kind, [int(kind) for kind in kinds]))


def no_collectives() -> Collectives:
    """The table of a trace without any."""
    long, short = np.empty(0, np.int64), np.empty(0, np.int32)
    return Collectives(long, short, long, short, short, long)
