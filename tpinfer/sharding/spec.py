"""How one tensor is cut over the ranks of a group. Says where the pieces lie; never touches a
tensor.

A parameter declares its `ShardSpec` once. The loader reads by it, the cost ledger counts bytes
by it, and whatever cuts the same tensor later (quantization scales, LoRA factors) derives its
own cut from it.
"""

import itertools
from dataclasses import dataclass
from math import prod

Range = tuple[int, int]
"""Half-open element range [start, stop)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One named stretch of a fused dim, with the part of it that each rank holds."""

    name: str
    """What the stretch is: `q`, `k`, `v`, `gate`, `up`; `all` where the dim is not fused."""
    size: int
    """Elements of the whole, unsharded stretch."""
    ranges: tuple[Range, ...]
    """Per rank of the group, its half-open range within this stretch. Ranges of two ranks may
    overlap (a KV head held twice) or be empty."""

    def num_copies(self) -> int:
        """Most ranks that hold any one element; 1 where nothing is replicated."""
        edges = sorted({edge for held in self.ranges for edge in held})
        return max(
            (
                sum(start <= low and high <= stop for start, stop in self.ranges)
                for low, high in itertools.pairwise(edges)
            ),
            default=0,
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """A cut of one dim over one axis of the rank grid."""

    axis: str
    """Axis of the rank grid the ranges run over, such as `tp`."""
    dim: int
    """Dim of the tensor that is cut."""
    unit: int
    """Elements that are never separated: head_dim, a quantization group, a packed word; 1 for
    none."""
    segments: tuple[Segment, ...]
    """The stretches of the dim, in order; their sizes add up to it."""

    def local_size(self, rank: int) -> int:
        """Elements of this dim on `rank`."""
        return sum(s.ranges[rank][1] - s.ranges[rank][0] for s in self.segments)


@dataclass(frozen=True, slots=True)
class Piece:
    """One contiguous part of a rank's local tensor along its cut dim, and where it comes from."""

    segment: str
    source: Range
    """Range within the unsharded segment."""
    local: Range
    """Range within the local tensor's cut dim."""


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """Shape of a whole tensor and its cuts; no cut on a dim means that every rank holds all of
    it."""

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()

    def __post_init__(self) -> None:
        for cut in self.cuts:
            total = sum(segment.size for segment in cut.segments)
            if total != self.shape[cut.dim]:
                raise ValueError(
                    f"segments of dim {cut.dim} add up to {total}, but the tensor has "
                    f"{self.shape[cut.dim]} there; give every stretch of the dim a segment"
                )
            for segment in cut.segments:
                for start, stop in segment.ranges:
                    if not 0 <= start <= stop <= segment.size:
                        raise ValueError(
                            f"segment {segment.name}: range {start}..{stop} leaves "
                            f"0..{segment.size}"
                        )
                    if start % cut.unit or (stop % cut.unit and stop != segment.size):
                        raise ValueError(
                            f"segment {segment.name}: range {start}..{stop} splits a unit of "
                            f"{cut.unit}; "
                            f"cut on multiples of {cut.unit}"
                        )

    def cut_on(self, axis: str) -> Cut | None:
        """The cut over `axis`, if there is one."""
        return next((cut for cut in self.cuts if cut.axis == axis), None)

    def local_shape(self, rank: int, axis: str = "tp") -> tuple[int, ...]:
        """Shape of the tensor that `rank` of `axis` holds."""
        shape = list(self.shape)
        if (cut := self.cut_on(axis)) is not None:
            shape[cut.dim] = cut.local_size(rank)
        return tuple(shape)

    def num_local_elements(self, rank: int, axis: str = "tp") -> int:
        """Elements that `rank` of `axis` holds."""
        return prod(self.local_shape(rank, axis))

    def pieces(self, rank: int, axis: str = "tp") -> tuple[Piece, ...]:
        """The contiguous pieces of `rank`'s tensor along the cut dim, in local order (empty ones
        left out).

        An uncut tensor has one piece named `all` over dim 0.
        """
        cut = self.cut_on(axis)
        if cut is None:
            whole = (0, self.shape[0])
            return (Piece("all", whole, whole),)
        found, offset = [], 0
        for segment in cut.segments:
            start, stop = segment.ranges[rank]
            if stop > start:
                found.append(Piece(segment.name, (start, stop), (offset, offset + stop - start)))
                offset += stop - start
        return tuple(found)
