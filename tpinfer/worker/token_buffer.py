"""The tokens of all rows in one static buffer on the device, so that a sampled token becomes the
next step's input without visiting the host.

Shapes: R rows, L longest sequence, N tokens of a step.
"""

from collections.abc import Sequence

import torch


class TokenBuffer:
    """int64 [R, L]. Only what was written is ever read, so the memory is not cleared: the system
    hands out pages on first touch."""

    def __init__(self, num_rows: int, max_len: int, device: torch.device) -> None:
        self._max_len = max_len
        self._flat = torch.empty(num_rows * max_len + 1, dtype=torch.int64, device=device)
        self._tokens_RL = self._flat[:-1].view(num_rows, max_len)
        self._flat[-1] = 0
        self.spare_address = num_rows * max_len
        """Of a token that no sequence holds: padded rows read it and write theirs there."""

    def fill(self, row: int, token_ids: Sequence[int]) -> None:
        """The first tokens of a new sequence."""
        on_host = torch.tensor(token_ids, dtype=torch.int64)
        if self._flat.is_cuda:  # else the host would wait for the steps that are still running
            on_host = on_host.pin_memory()
        self._tokens_RL[row, : len(token_ids)].copy_(on_host, non_blocking=True)

    def address(self, row: int, position: int) -> int:
        """Where a token lies in the flat buffer."""
        return row * self._max_len + position

    def read(self, addresses: torch.Tensor) -> torch.Tensor:
        """int64 [N] tokens at int64 [N] addresses."""
        return self._flat.index_select(0, addresses)

    def write(self, addresses: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Put int64 [N] sampled tokens at int64 [N] addresses, in stream order."""
        self._flat.index_copy_(0, addresses, token_ids)

    def row(self, row: int, length: int) -> torch.Tensor:
        """int64 [length] view: a sequence's tokens so far."""
        return self._tokens_RL[row, :length]
