"""The passes over rows as long as a rank's part of the vocabulary: what drawing a token costs. One
set of them is bound to a sampler: plain torch here, compiled ones in `native_passes`. Both give
the same bits.

Letters: R rows, n chosen rows, V local vocabulary, N chunks of V.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from tpinfer.decoding.masses import Scale, local_sums, masses, pick_rows, token_at
from tpinfer.decoding.ordered_keys import best_keys


class VocabPasses(Protocol):
    """Logits are float32 [R, V]; the first column is token `first`."""

    def best_keys(self, logits_RV: torch.Tensor, rows: Sequence[int], first: int) -> torch.Tensor:
        """int64 [n, 1]: the key of the largest logit of some rows, NAN_KEY where there is NaN."""
        ...

    def local_sums(
        self, logits_RV: torch.Tensor, rows: Sequence[int], scale: Scale, first: int
    ) -> torch.Tensor:
        """int64 [n, N]: masses of some rows, summed by chunk. `scale` is of those rows."""
        ...

    def row_masses(
        self, logits_RV: torch.Tensor, rows: Sequence[int], scale: Scale, first: int
    ) -> torch.Tensor:
        """int64 [n, V]: masses of some rows."""
        ...

    def tokens_at(
        self,
        logits_RV: torch.Tensor,
        rows: Sequence[int],
        scale: Scale,
        sums_nN: torch.Tensor,
        places: torch.Tensor,
        first: int,
    ) -> torch.Tensor:
        """int64 [n]: the tokens whose mass covers `places` (int64 [n], 0 at least), counted from
        the rank's first mass; `sums_nN` are theirs from `local_sums`."""
        ...


class TorchPasses:
    """Plain torch, on any device."""

    def best_keys(self, logits_RV: torch.Tensor, rows: Sequence[int], first: int) -> torch.Tensor:
        """As `VocabPasses.best_keys`."""
        return best_keys(pick_rows(logits_RV, rows), first)

    def local_sums(
        self, logits_RV: torch.Tensor, rows: Sequence[int], scale: Scale, first: int
    ) -> torch.Tensor:
        """As `VocabPasses.local_sums`."""
        return local_sums(logits_RV, rows, scale, first)

    def row_masses(
        self, logits_RV: torch.Tensor, rows: Sequence[int], scale: Scale, first: int
    ) -> torch.Tensor:
        """As `VocabPasses.row_masses`."""
        ids = torch.arange(first, first + logits_RV.shape[1], device=logits_RV.device)
        return masses(pick_rows(logits_RV, rows), scale, ids)

    def tokens_at(
        self,
        logits_RV: torch.Tensor,
        rows: Sequence[int],
        scale: Scale,
        sums_nN: torch.Tensor,
        places: torch.Tensor,
        first: int,
    ) -> torch.Tensor:
        """As `VocabPasses.tokens_at`."""
        return token_at(logits_RV, rows, scale, sums_nN, places, first)
