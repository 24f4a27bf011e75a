"""The paged KV cache of one rank: storage and addresses. Who owns which block is decided elsewhere.

Shapes: L layers, K local KV heads, S slots (blocks x block_size), D head dim, T tokens.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


class PagedKV:
    """Keys and values of every layer, [L, 2, K, S, D]: one head's slots adjoin, so that a run of
    consecutive blocks reads as one strided view without a copy."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        shape = (num_layers, 2, num_kv_heads, num_blocks * block_size, head_dim)
        # Only written slots are ever read, so the memory is not cleared: the system hands out pages
        # on first touch.
        self.kv_L2KSD = torch.empty(shape, dtype=dtype, device=device)

    def layer(self, index: int) -> torch.Tensor:
        """[2, K, S, D] view of one layer."""
        return self.kv_L2KSD[index]


@dataclass(slots=True)
class BlockTable:
    """Blocks of one sequence in token order; the first `num_dropped` have slid out of every
    window."""

    blocks: list[int]
    num_dropped: int = 0

    def append(self, new_blocks: Sequence[int]) -> None:
        """Add blocks behind the last one."""
        self.blocks.extend(new_blocks)

    def slots(self, start: int, stop: int, block_size: int) -> list[int]:
        """Slot of each position in [start, stop)."""
        blocks, dropped = self.blocks, self.num_dropped
        return [
            blocks[p // block_size - dropped] * block_size + p % block_size
            for p in range(start, stop)
        ]

    def drop(self, count: int) -> None:
        """Forget the `count` leading blocks still held."""
        del self.blocks[:count]
        self.num_dropped += count


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Where the keys of positions [start, stop) of a sequence lie in a layer's slots."""

    start: int
    stop: int
    first_slot: int
    """Slot of `start` when `slots` is None: the positions are consecutive slots."""
    slots: torch.Tensor | None
    """int64 [stop - start], where the blocks do not adjoin."""

    def read(self, cache_2KSD: torch.Tensor) -> torch.Tensor:
        """[2, K, stop - start, D]; a view where the blocks adjoin, else a gathered copy."""
        if self.slots is None:
            return cache_2KSD.narrow(2, self.first_slot, self.stop - self.start)
        return cache_2KSD.index_select(2, self.slots)


def key_range(
    table: BlockTable, start: int, stop: int, block_size: int, device: torch.device
) -> KeyRange:
    """Locate positions [start, stop) of a sequence."""
    first, last = (
        start // block_size - table.num_dropped,
        (stop - 1) // block_size - table.num_dropped,
    )
    held = table.blocks[first : last + 1]
    if held[-1] - held[0] == last - first and all(b - a == 1 for a, b in itertools.pairwise(held)):
        return KeyRange(start, stop, held[0] * block_size + start % block_size, None)
    slots = torch.tensor(table.slots(start, stop, block_size), dtype=torch.int64, device=device)
    return KeyRange(start, stop, 0, slots)
