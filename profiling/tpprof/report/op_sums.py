"""Kernel time against its floor, with equal ops of all layers folded into one row."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tpprof.results import OpResult

_LAYER = re.compile(r"\b(layers?|blocks?|h)\.\d+\b")


@dataclass(frozen=True, slots=True)
class OpSum:
    """One kind of op on one rank."""

    key: str
    """The op's id with `*` for the layer's number."""
    time_ns: int
    floor_ns: int
    count: int
    flops: int
    bytes: int
    bound: str
    """That of most of the time."""
    clocks_ns: int | None = None
    """The part of lost_ns that full clocks would give back; None where nobody sampled clocks."""

    @property
    def lost_ns(self) -> int:
        """Time above the floor; negative where a cache beat the ceiling."""
        return self.time_ns - self.floor_ns


def fold_layer(key: str) -> str:
    """`layers.3.mlp.down` -> `layers.*.mlp.down`."""
    return _LAYER.sub(r"\1.*", key)


def sum_ops(ops: Iterable[OpResult], rank: int) -> list[OpSum]:
    """Ops of one rank folded over layers, most time first."""
    kinds: dict[str, list[OpResult]] = {}
    for op in ops:
        if op.rank == rank:
            kinds.setdefault(fold_layer(op.key), []).append(op)
    return sorted(
        (_sum(key, members) for key, members in kinds.items()),
        key=lambda one: (-one.time_ns, one.key),
    )


def add_clocks(parts: Iterable[int | None]) -> int | None:
    """The sum of those that are known; None where none is."""
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def _sum(key: str, members: list[OpResult]) -> OpSum:
    by_bound: dict[str, int] = {}
    for op in members:
        by_bound[op.bound] = by_bound.get(op.bound, 0) + op.time_ns
    return OpSum(
        key=key,
        time_ns=sum(op.time_ns for op in members),
        floor_ns=sum(op.floor_ns for op in members),
        count=sum(op.count for op in members),
        flops=sum(max(op.flops, 0) for op in members),
        bytes=sum(max(op.bytes, 0) for op in members),
        clocks_ns=add_clocks(op.lost_to.get("clocks") for op in members),
        bound=min(by_bound, key=lambda bound: (-by_bound[bound], bound)),
    )
