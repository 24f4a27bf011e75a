"""Vocabulary-parallel embedding and head: each rank holds a range of rows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tpinfer.layers.matmul import MatMul
from tpinfer.layers.step_inputs import Activations, OpCall, StepInputs
from tpinfer.sharding.spec import Range

AnyLogits = Callable[[Activations, torch.Tensor], torch.Tensor]
"""(activations, int64 [n] tokens of the step) -> float32 [n, local columns of V]."""


def bind_embed(weight: torch.Tensor, rows: Range, *, is_whole: bool) -> OpCall:
    """residual = the rows of the step's tokens, [T, M]; zero where another rank holds the row.

    weight is [rows[1] - rows[0], M]. At tp > 1 the result is partial: `embed.reduce` sums it.
    """
    start, stop = rows

    def embed_whole(acts: Activations, step: StepInputs) -> None:
        acts.residual = F.embedding(step.token_ids, weight)

    def embed_range(acts: Activations, step: StepInputs) -> None:
        local = step.token_ids - start
        elsewhere = (local < 0) | (local >= stop - start)
        found = F.embedding(local.masked_fill_(elsewhere, 0), weight)
        acts.residual = found.masked_fill_(elsewhere.unsqueeze(1), 0.0)

    return embed_whole if is_whole else embed_range


def bind_embed_reduce(all_reduce: Callable[[torch.Tensor], None]) -> OpCall:
    """residual summed over the group, in place."""

    def reduce(acts: Activations, step: StepInputs) -> None:
        all_reduce(acts.residual)

    return reduce


def bind_head(matmul: MatMul) -> OpCall:
    """logits of the rank's vocabulary rows in float32, [R, stop - start]."""

    def head(acts: Activations, step: StepInputs) -> None:
        acts.logits = matmul(acts.hidden).float()

    return head


def bind_any_logits(norm_weight: torch.Tensor, eps: float, matmul: MatMul) -> AnyLogits:
    """Final norm and head for any of a step's tokens, once the layers have run."""
    shape = norm_weight.shape

    def logits_of(acts: Activations, tokens: torch.Tensor) -> torch.Tensor:
        last = acts.residual.index_select(0, tokens)
        if acts.delta is not None:
            last += acts.delta.index_select(0, tokens)
        return matmul(F.rms_norm(last, shape, norm_weight, eps)).float()

    return logits_of
