"""Blocks of the KV cache kept in host memory: pinned for GPUs, so that copies run beside the host.

Which block is saved where is decided by rank 0; a rank moves those it holds. Shapes: L layers, K
local KV heads, B block size, D head dim.
"""

from collections.abc import Sequence

import torch

from tpinfer.attention.paged_kv import PagedKV


class HostTier:
    """Room for `num_host_blocks` blocks of all ranks that share a KV head together. A host block
    keeps a block of its own class, scales included."""

    def __init__(self, kv: PagedKV, num_host_blocks: int) -> None:
        self._kv = kv
        local_blocks = -(-num_host_blocks // kv.layout.group_size)
        pinned = kv.values_L2KSD.is_cuda
        self._host = [
            torch.empty(
                (local_blocks, *blocks.shape[:3], *blocks.shape[4:]),  # [blocks, L, 2, K, B, ...]
                dtype=blocks.dtype,
                pin_memory=pinned,
            )
            for blocks in map(kv.as_blocks, kv.tensors())
        ]

    @property
    def num_bytes(self) -> int:
        """Host memory of this rank."""
        return sum(tensor.nbytes for tensor in self._host)

    def save(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (block, host block). In stream order on a GPU, at once on a CPU."""
        for blocks, host, block, host_block in self._moves(pairs):
            host[host_block].copy_(blocks[:, :, :, block], non_blocking=True)

    def fetch(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (host block, block) back. In stream order on a GPU, at once on a CPU."""
        for blocks, host, block, host_block in self._moves([(b, h) for h, b in pairs]):
            fresh = host[host_block].to(blocks.device, non_blocking=True)
            blocks[:, :, :, block].copy_(fresh)

    def _moves(
        self, pairs: Sequence[tuple[int, int]]
    ) -> list[tuple[torch.Tensor, torch.Tensor, int, int]]:
        """(blocks, host blocks, local block, local host block) for each tensor and pair here."""
        mine = self._kv.local_pairs(pairs)
        tensors = zip(map(self._kv.as_blocks, self._kv.tensors()), self._host, strict=True)
        return [(blocks, host, *pair) for blocks, host in tensors for pair in mine]
