"""Which heads, MLP columns and vocabulary rows each rank of a tensor-parallel group takes.

Shares are cut as evenly as whole units allow, or in the proportions a topology gives. A cut may
fall inside a GQA group: the KV head of that group is then held by both ranks, and `ShardSpec`
counts it on both.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tpinfer.config.errors import ConfigError
from tpinfer.config.kv_cache import KVLayoutName
from tpinfer.config.model import ModelSpec
from tpinfer.sharding.spec import Range

MLP_UNIT = 8
"""Columns of the MLP that stay together, so that every rank's rows stay 32-byte aligned."""
VOCAB_UNIT = 16
"""Vocabulary rows that stay together."""


def cut_evenly(num_units: int, shares: Sequence[float]) -> tuple[Range, ...]:
    """Cut `num_units` into len(shares) adjoining half-open ranges proportional to `shares`.

    Every boundary is the cumulative share rounded to a whole unit, moved so that no rank stays
    empty where there are enough units. Raises ConfigError for shares that are not positive.
    """
    if any(share <= 0 for share in shares):
        raise ConfigError(
            f"shares {tuple(shares)} must all be positive; give each rank a part of the work"
        )
    num_ranks, total = len(shares), sum(shares)
    edges, passed = [0], 0.0
    for index, share in enumerate(shares[:-1]):
        passed += share
        edge = int(num_units * passed / total + 0.5)
        if num_units >= num_ranks:
            edge = min(max(edge, edges[-1] + 1), num_units - (num_ranks - 1 - index))
        edges.append(min(max(edge, edges[-1]), num_units))
    edges.append(num_units)
    return tuple(itertools.pairwise(edges))


def cut_in_units(size: int, unit: int, shares: Sequence[float]) -> tuple[Range, ...]:
    """Cut `size` elements on multiples of `unit`; falls back to smaller units when there are too
    few.

    The last range takes the remainder that does not fill a unit.
    """
    while unit > 1 and -(-size // unit) < len(shares):
        unit //= 2
    num_units = -(-size // unit)
    return tuple(
        (min(a * unit, size), min(b * unit, size)) for a, b in cut_evenly(num_units, shares)
    )


@dataclass(frozen=True, slots=True)
class Partition:
    """The split of one decoder over a tensor-parallel group of `size` ranks. All ranges are
    half-open."""

    size: int
    shares: tuple[float, ...]
    heads: tuple[Range, ...]
    """Query heads per rank."""
    kv_heads: tuple[Range, ...]
    """KV heads per rank: those its query heads read. Neighbours may share one."""
    mlp: tuple[Range, ...]
    """Columns of the MLP's intermediate dim per rank."""
    vocab: tuple[Range, ...]
    """Vocabulary rows of embedding and head per rank."""
    group_size: int
    """Query heads that read one KV head."""
    kv_group_size: int = 1
    """Adjoining ranks that share one KV head and keep every block on one of them only (see
    `kv_layout`); 1 where each rank stores its KV heads of every block."""

    def num_heads(self, rank: int) -> int:
        """Query heads on `rank`."""
        return self.heads[rank][1] - self.heads[rank][0]

    def num_kv_heads(self, rank: int) -> int:
        """KV heads on `rank`, replicas included."""
        return self.kv_heads[rank][1] - self.kv_heads[rank][0]

    def head_offset(self, rank: int) -> int:
        """Position of the rank's first query head inside the group of its first KV head."""
        return self.heads[rank][0] - self.kv_heads[rank][0] * self.group_size

    def kv_place(self, rank: int) -> int:
        """Index of `rank` among those that share its KV head."""
        return rank % self.kv_group_size

    def kv_ranks(self, rank: int) -> range:
        """The ranks that share `rank`'s KV head without copies, itself included."""
        first = rank - self.kv_place(rank)
        return range(first, first + self.kv_group_size)

    def widest_heads(self, rank: int) -> int:
        """Most query heads of any rank that shares `rank`'s KV head."""
        return max(map(self.num_heads, self.kv_ranks(rank)))

    def num_replicated_kv_heads(self) -> int:
        """KV heads projected beyond one copy each, summed over the group; they are stored so too
        unless ranks share them."""
        return sum(stop - start for start, stop in self.kv_heads) - self.kv_heads[-1][1]


def partition_model(
    spec: ModelSpec,
    size: int,
    shares: Sequence[float] | None = None,
    kv_layout: KVLayoutName = "replicated",
) -> Partition:
    """Split `spec` over `size` ranks, evenly or in proportion to `shares`.

    A KV head that several ranks read is stored on each of them, unless `kv_layout` is `auto` and
    every head is read by equally many whole ranks: those then share its blocks out.

    Raises ConfigError when there are more ranks than query heads, or not one share a rank.
    """
    if not 1 <= size <= spec.num_heads:
        raise ConfigError(
            f"tp={size} needs at least one attention head per rank, but {spec.architecture} has "
            f"{spec.num_heads}; use --tp between 1 and {spec.num_heads}"
        )
    shares = tuple(shares) if shares else (1.0,) * size
    if len(shares) != size:
        raise ConfigError(
            f"the placement names {len(shares)} shares for tp={size}; give one share per rank or "
            "none"
        )
    group = spec.num_heads // spec.num_kv_heads
    heads = cut_evenly(spec.num_heads, shares)
    kv_heads = tuple((start // group, -(-stop // group)) for start, stop in heads)
    return Partition(
        size=size,
        shares=shares,
        heads=heads,
        kv_heads=kv_heads,
        mlp=cut_in_units(spec.intermediate_size, MLP_UNIT, shares),
        vocab=cut_in_units(spec.vocab_size, VOCAB_UNIT, shares),
        group_size=group,
        kv_group_size=_ranks_per_kv_head(kv_heads) if kv_layout == "auto" else 1,
    )


def _ranks_per_kv_head(kv_heads: Sequence[Range]) -> int:
    """g where every KV head belongs to g adjoining ranks that hold nothing else, else 1."""
    size, num_kv_heads = len(kv_heads), kv_heads[-1][1]
    count = size // num_kv_heads
    if not count:
        return 1
    whole = [(rank // count, rank // count + 1) for rank in range(size)]
    return count if list(kv_heads) == whole else 1
