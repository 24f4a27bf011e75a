"""The paged KV cache of one rank: storage and addresses. Who owns which block is
`sharding.kv_layout`'s rule; who may have one is decided elsewhere.

Shapes: L layers, K local KV heads, S slots (local blocks x block_size, and a spare one where other
ranks hold some blocks), D head dim, T tokens, N keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tpinfer.config.dtypes import DType
from tpinfer.config.kv_cache import has_scales
from tpinfer.numerics.row_quantize import dequantize_rows, quantize_rows
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.sharding.kv_layout import KVLayout


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's keys (0) and values (1)."""

    values_2KSD: torch.Tensor
    """In the stored dtype; 8-bit floats as uint8, because few ops know them."""
    scales_2KS: torch.Tensor | None
    """float32 factor of each stored vector, where the stored dtype has 8 bits."""
    dtype: torch.dtype
    """What is stored."""

    @property
    def head_dim(self) -> int:
        """D."""
        return self.values_2KSD.shape[-1]

    def write(self, slots_T: torch.Tensor, kv_T2KD: torch.Tensor) -> None:
        """Store the keys and values of T tokens, of any float dtype, in their slots."""
        fresh = kv_T2KD.permute(1, 2, 0, 3)
        if self.scales_2KS is None:
            if fresh.dtype is not self.dtype:
                fresh = fresh.to(self.dtype)
            self.values_2KSD.index_copy_(2, slots_T, fresh)
            return
        values, scales = quantize_rows(fresh, self.dtype)
        self.values_2KSD.index_copy_(2, slots_T, values.view(self.values_2KSD.dtype))
        self.scales_2KS.index_copy_(2, slots_T, scales)

    def read(self, keys: "KeyRange", dtype: torch.dtype) -> torch.Tensor:
        """[2, K, N, D] in `dtype`: a view where the blocks adjoin and are stored so, else a
        copy."""
        values = keys.gather(self.values_2KSD)
        if self.scales_2KS is None:
            return values.to(dtype)
        return dequantize_rows(values.view(self.dtype), keys.gather(self.scales_2KS), dtype)


class PagedKV:
    """Keys and values of every layer, [L, 2, K, S, D]: one head's slots adjoin, so that a run of
    consecutive local blocks reads as one strided view without a copy."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        layout: KVLayout,
        dtype: DType,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.dtype = to_torch(dtype)
        shape = (num_layers, 2, num_kv_heads, layout.num_slots)
        stored = torch.uint8 if dtype is DType.FLOAT8_E4M3 else self.dtype
        # Only written slots are ever read, so the memory is not cleared: the system hands out pages
        # on first touch.
        self.values_L2KSD = torch.empty(*shape, head_dim, dtype=stored, device=device)
        self.scales_L2KS = (
            torch.empty(shape, dtype=torch.float32, device=device) if has_scales(dtype) else None
        )

    def layer(self, index: int) -> LayerKV:
        """Views of one layer."""
        scales = None if self.scales_L2KS is None else self.scales_L2KS[index]
        return LayerKV(self.values_L2KSD[index], scales, self.dtype)

    def tensors(self) -> list[torch.Tensor]:
        """What a block is made of: all with the slots as dim 3."""
        return [t for t in (self.values_L2KSD, self.scales_L2KS) if t is not None]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (from, to), all read before any is written. A rank copies those it
        holds; `from` and `to` are of one class."""
        mine = self.local_pairs(pairs)
        if not mine:
            return
        device = self.values_L2KSD.device
        sources, targets = torch.tensor(mine, dtype=torch.int64, device=device).unbind(1)
        for whole in map(self.as_blocks, self.tensors()):
            whole.index_copy_(3, targets, whole.index_select(3, sources))

    def local_pairs(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Local numbers of those pairs of one class that this rank holds."""
        layout = self.layout
        for one, other in pairs:
            assert (one - other) % layout.group_size == 0, (
                f"blocks {one} and {other} lie on different ranks"
            )
        return [
            (layout.local_block(one), layout.local_block(other))
            for one, other in pairs
            if layout.holds(one)
        ]

    def as_blocks(self, tensor: torch.Tensor) -> torch.Tensor:
        """[L, 2, K, blocks, block_size, ...] view of one of `tensors`, without the spare slot."""
        size = self.layout.block_size
        slots = tensor.narrow(3, 0, self.layout.num_local_blocks * size)
        return slots.unflatten(3, (-1, size))


@dataclass(slots=True)
class BlockTable:
    """Blocks of one sequence in token order; the first `num_dropped` have slid out of every
    window."""

    blocks: list[int]
    num_dropped: int = 0

    def append(self, new_blocks: Sequence[int]) -> None:
        """Add blocks behind the last one."""
        self.blocks.extend(new_blocks)

    def slots(self, start: int, stop: int, layout: KVLayout) -> list[int]:
        """Slot of each position in [start, stop) on this rank; the spare one for positions that
        other ranks hold."""
        size, dropped, group = layout.block_size, self.num_dropped, layout.group_size
        if group == 1:
            blocks = self.blocks
            return [blocks[p // size - dropped] * size + p % size for p in range(start, stop)]
        found: list[int] = []
        for logical in range(start // size, -(-stop // size)):
            first, last = max(start, logical * size), min(stop, (logical + 1) * size)
            if layout.holds_logical(logical):
                shift = (self.blocks[logical - dropped] // group - logical) * size
                found += range(first + shift, last + shift)
            else:
                found += [layout.spare_slot] * (last - first)
        return found

    def drop(self, count: int) -> None:
        """Forget the `count` leading blocks still held."""
        del self.blocks[:count]
        self.num_dropped += count


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Where this rank's keys of positions [start, stop) of a sequence lie in a layer's slots."""

    start: int
    stop: int
    runs: tuple[tuple[int, int], ...]
    """(first slot, slots): adjoining slots, in order of position. Empty where this rank holds none
    of the positions."""
    num_keys: int
    """Slots of all runs."""
    layout: KVLayout

    def gather(self, slotted: torch.Tensor) -> torch.Tensor:
        """The range of a [2, K, S, ...] tensor, [2, K, N, ...]; a view of one run."""
        if len(self.runs) == 1:
            return slotted.narrow(2, *self.runs[0])
        if not self.runs:
            return slotted.narrow(2, 0, 0)
        return torch.cat([slotted.narrow(2, *run) for run in self.runs], 2)

    def positions(self, device: torch.device) -> torch.Tensor:
        """int64 [N]: position of each key."""
        if self.layout.group_size == 1:
            return torch.arange(self.start, self.stop, device=device)
        found: list[int] = []
        for logical, first, last in _held_parts(self.start, self.stop, self.layout):
            size = self.layout.block_size
            found += range(logical * size + first, logical * size + last)
        return torch.tensor(found, dtype=torch.int64, device=device)


def key_range(table: BlockTable, start: int, stop: int, layout: KVLayout) -> KeyRange:
    """Locate positions [start, stop) of a sequence, as far as this rank holds them."""
    size, group, dropped = layout.block_size, layout.group_size, table.num_dropped
    low = start // size
    low += (layout.place - low) % group  # this rank's first and last block of the range
    high = (stop - 1) // size
    high -= (high - layout.place) % group
    if low > high:
        return KeyRange(start, stop, (), 0, layout)
    held = table.blocks[low - dropped : high - dropped + 1 : group]
    head = max(start - low * size, 0)  # slots cut off the first block, and kept of the last
    tail = min(stop - high * size, size)
    num_keys = (len(held) - 1) * size + tail - head
    first = held[0] // group
    if held == list(range(held[0], held[0] + group * len(held), group)):
        runs: tuple[tuple[int, int], ...] = ((first * size + head, num_keys),)
    else:
        runs = _runs([block // group for block in held], size, head, tail)
    return KeyRange(start, stop, runs, num_keys, layout)


def _runs(held: Sequence[int], size: int, head: int, tail: int) -> tuple[tuple[int, int], ...]:
    """Adjoining stretches of local blocks, the first `head` slots of all cut off and `tail` kept of
    the last block."""
    runs: list[tuple[int, int]] = []
    begin = 0
    for i in range(1, len(held) + 1):
        if i < len(held) and held[i] == held[i - 1] + 1:
            continue
        first = held[begin] * size + (head if begin == 0 else 0)
        last = held[i - 1] * size + (tail if i == len(held) else size)
        runs.append((first, last - first))
        begin = i
    return tuple(runs)


def _held_parts(start: int, stop: int, layout: KVLayout) -> list[tuple[int, int, int]]:
    """(logical block, first, last offset) of this rank's blocks in [start, stop)."""
    size = layout.block_size
    return [
        (logical, max(start - logical * size, 0), min(stop - logical * size, size))
        for logical in range(start // size, -(-stop // size))
        if layout.holds_logical(logical)
    ]
