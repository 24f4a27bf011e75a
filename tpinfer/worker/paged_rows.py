"""The rows' block tables and a step's sequences in buffers on the device, for attention kernels
that read them there.

The buffers are made once and stay where they are. What changes travels with the step's other
columns as int64 and is put in its place on the device: new blocks into the tables, the sequences
into int32 columns.
"""

from collections.abc import Sequence

import torch

from tpinfer.attention.interface import PagedSpans
from tpinfer.sharding.kv_layout import KVLayout

NUM_COLUMNS = 5
"""Of `PagedRows.columns`: rows, first tokens, context lengths; table addresses, and blocks."""


class PagedRows:
    """Tables [rows, blocks] and sequence columns of one rank."""

    def __init__(
        self, max_num_rows: int, max_len: int, layout: KVLayout, device: torch.device
    ) -> None:
        self._layout = layout
        num_blocks = -(-max_len // layout.block_size)
        self._width = -(-num_blocks // layout.group_size)
        # Cleared, so that what a padded sequence reads is at least a block that exists.
        shape = max_num_rows, self._width
        self._tables_RB = torch.zeros(shape, dtype=torch.int32, device=device)
        self._columns = torch.zeros(3, max_num_rows + 1, dtype=torch.int32, device=device)
        self._addresses: list[int] = []
        self._blocks: list[int] = []

    def append(self, row: int, first_logical: int, blocks: Sequence[int]) -> None:
        """Blocks from logical block `first_logical` of a row on; those that other ranks hold are
        left out."""
        layout, begin = self._layout, row * self._width
        size = layout.group_size
        skipped = (layout.place - first_logical) % size
        place = begin + (first_logical + skipped) // size
        mine = blocks[skipped::size]
        self._addresses += range(place, place + len(mine))
        self._blocks += [block // size for block in mine]

    def columns(
        self, rows: Sequence[int], first_tokens: Sequence[int], context_lens: Sequence[int]
    ) -> tuple[list[int], ...]:
        """What has to reach the device, the new blocks since the last call among it. first_tokens
        has one more than the others."""
        found = list(rows), list(first_tokens), list(context_lens), self._addresses, self._blocks
        self._addresses, self._blocks = [], []
        return found

    def place_tables(self, addresses: torch.Tensor, blocks: torch.Tensor) -> None:
        """Take the new blocks that `columns` gave, int64 on the device."""
        if addresses.shape[0]:
            self._tables_RB.view(-1).index_copy_(0, addresses, blocks.to(torch.int32))

    def place_sequences(self, columns: Sequence[torch.Tensor]) -> None:
        """Take the step's rows, first tokens and context lengths, int64 on the device."""
        for target, column in zip(self._columns, columns, strict=True):
            target[: column.shape[0]].copy_(column)

    def spans(self, num_sequences: int, max_query_len: int, max_context_len: int) -> PagedSpans:
        """The first `num_sequences` of what was placed last."""
        rows, first_tokens, context_lens = self._columns
        return PagedSpans(
            self._tables_RB,
            rows[:num_sequences],
            first_tokens[: num_sequences + 1],
            context_lens[:num_sequences],
            num_sequences,
            max_query_len,
            max_context_len,
        )
