"""One rank's time as adjoining pieces, each with exactly one leaf; windows are cut out of it.

`sweep` makes it. Here it is only divided, so that every window, group and step sums exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tpinfer.costs.leaves import LEAVES, roll_up
from tpprof.results import Split

LEAF = {leaf: index for index, leaf in enumerate(LEAVES)}
"""Number of each leaf in the columns."""
_TAIL = LEAF["host_tail"]
_BEFORE_NEXT_OP = np.isin(
    LEAVES, ("host", "launch_latency", "dependency_wait", "idle_unexplained", "host_tail")
)
"""Leaves that say how long the next op took to come."""


@dataclass(frozen=True)
class Pieces:
    """Columns of one length, in order of time, no two overlapping."""

    start_ns: np.ndarray
    """int64 [pieces]."""
    end_ns: np.ndarray
    """int64 [pieces], > start_ns."""
    leaf: np.ndarray
    """int8 [pieces], of LEAF."""
    part: np.ndarray
    """int16 [pieces], index into `Timeline.parts`; -1 where the leaf is not `host`."""
    owner: np.ndarray
    """int64 [pieces]: row of the Work that ran, or where none did, of the one that came next; -1
    where none came."""
    busy: np.ndarray
    """bool [pieces]: the owner ran."""
    hidden: np.ndarray
    """bool [pieces]: communication ran too, under compute."""

    def __len__(self) -> int:
        return len(self.start_ns)

    @property
    def length_ns(self) -> np.ndarray:
        """int64 [pieces]."""
        return self.end_ns - self.start_ns

    def take(self, rows: np.ndarray | slice) -> "Pieces":
        """Some of the pieces."""
        return Pieces(
            self.start_ns[rows],
            self.end_ns[rows],
            self.leaf[rows],
            self.part[rows],
            self.owner[rows],
            self.busy[rows],
            self.hidden[rows],
        )

    def by_leaf(self) -> dict[str, int]:
        """ns per leaf, zeros left out."""
        spent = np.zeros(len(LEAVES), np.int64)
        np.add.at(spent, self.leaf, self.length_ns)
        return {LEAVES[leaf]: int(spent[leaf]) for leaf in np.flatnonzero(spent)}


@dataclass(frozen=True)
class Timeline:
    """The pieces of one rank; they adjoin from the first's start to the last's end."""

    rank: int
    pieces: Pieces
    parts: list[str]
    """What the host did, by `Pieces.part`."""
    has_tail: bool = True
    """Whether time behind a window's last op is `host_tail`; False on CPU ranks, where all time
    between ops is the host's own and known by part."""
    num_negative_launches: int = 0
    """Ops that started before the call that launched them."""

    def clip(self, start_ns: int, end_ns: int) -> Pieces:
        """Pieces of [start, end) within the recorded span. What follows the last op in it waits
        for no op of this window: it becomes `host_tail`, owned by none."""
        first = int(np.searchsorted(self.pieces.end_ns, start_ns, side="right"))
        last = int(np.searchsorted(self.pieces.start_ns, end_ns, side="left"))
        if last <= first:
            return self.pieces.take(slice(0, 0))
        inside = self.pieces.take(slice(first, last))
        starts, ends = inside.start_ns.copy(), inside.end_ns.copy()
        starts[0], ends[-1] = max(starts[0], start_ns), min(ends[-1], end_ns)
        leaf, part, owner = inside.leaf.copy(), inside.part.copy(), inside.owner.copy()
        ran = np.flatnonzero(inside.busy)
        tail = slice(int(ran[-1]) + 1 if len(ran) else 0, len(inside))
        if self.has_tail:
            waits = _BEFORE_NEXT_OP[leaf[tail]]
            leaf[tail][waits] = _TAIL
            part[tail][waits] = -1
        owner[tail] = -1
        return replace(inside, start_ns=starts, end_ns=ends, leaf=leaf, part=part, owner=owner)

    def split(self, start_ns: int, end_ns: int, begun_ns: int | None = None) -> Split:
        """Leaves of [start, end). The part before `begun_ns` is `queue` whatever ran."""
        begun_ns = start_ns if begun_ns is None else begun_ns
        pieces = self.clip(begun_ns, end_ns)
        length = pieces.length_ns
        leaves = pieces.by_leaf()
        if begun_ns > start_ns:
            leaves["queue"] = begun_ns - start_ns
        outside_ns = end_ns - begun_ns - int(length.sum())
        if outside_ns:
            leaves["unrecorded"] = leaves.get("unrecorded", 0) + outside_ns
        host = pieces.part >= 0
        parts = np.zeros(len(self.parts), np.int64)
        np.add.at(parts, pieces.part[host], length[host])
        wall_ns = end_ns - start_ns
        assert sum(leaves.values()) == wall_ns, "leaves of a window must sum to its wall"
        assert int(parts.sum()) == leaves.get("host", 0), "parts of host must sum to host"
        return Split(
            rank=self.rank,
            wall_ns=wall_ns,
            leaves=_in_order(leaves),
            rollup=roll_up(leaves),
            host_parts={self.parts[p]: int(parts[p]) for p in np.flatnonzero(parts)},
            comm_hidden_ns=int(length[pieces.hidden].sum()),
        )


def add_splits(splits: Sequence[Split]) -> Split:
    """Several stretches of one rank, added up."""
    leaves, parts = _added([s.leaves for s in splits]), _added([s.host_parts for s in splits])
    return Split(
        rank=splits[0].rank,
        wall_ns=sum(split.wall_ns for split in splits),
        leaves=_in_order(leaves),
        rollup=roll_up(leaves),
        host_parts=parts,
        comm_hidden_ns=sum(split.comm_hidden_ns for split in splits),
    )


def _added(tables: Sequence[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for table in tables:
        for key, spent in table.items():
            total[key] = total.get(key, 0) + spent
    return total


def _in_order(leaves: dict[str, int]) -> dict[str, int]:
    return {leaf: leaves[leaf] for leaf in LEAVES if leaves.get(leaf)}
