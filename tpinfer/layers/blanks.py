"""Empty inputs for collectives, for a rank that cannot do a step but must not keep the others
waiting. What comes of such a step is thrown away on every rank.

Shapes: T tokens, M hidden size, H local query heads, D head dim.
"""

from math import nan

import torch

from tpinfer.layers.step_inputs import Activations, OpCall, StepInputs


def blank_residual(embedding: torch.Tensor) -> OpCall:
    """residual = zeros [T, M], in dtype and on device of the embedding [V, M]."""

    def blank(acts: Activations, step: StepInputs) -> None:
        acts.residual = embedding.new_zeros(step.token_ids.shape[0], embedding.shape[1])

    return blank


def blank_delta(embedding: torch.Tensor) -> OpCall:
    """delta = zeros [T, M]."""

    def blank(acts: Activations, step: StepInputs) -> None:
        acts.delta = embedding.new_zeros(step.token_ids.shape[0], embedding.shape[1])

    return blank


def blank_stream(embedding: torch.Tensor) -> OpCall:
    """residual and delta = zeros [T, M]."""

    def blank(acts: Activations, step: StepInputs) -> None:
        acts.residual = embedding.new_zeros(step.token_ids.shape[0], embedding.shape[1])
        acts.delta = torch.zeros_like(acts.residual)  # a fused reduce writes the residual

    return blank


def blank_queries(width: int) -> OpCall:
    """qkv = zeros [T, width] with H * D = width, in the dtype of the rotary table."""

    def blank(acts: Activations, step: StepInputs) -> None:
        acts.qkv = step.cos.new_zeros(step.token_ids.shape[0], width)

    return blank


def blank_partial(shape: tuple[int, int, int]) -> OpCall:
    """partial = zeros [g, T, W, D + 1] for shape (g, W, D + 1)."""
    num_ranks, widest, columns = shape

    def blank(acts: Activations, step: StepInputs) -> None:
        size = num_ranks, step.token_ids.shape[0], widest, columns
        acts.partial = torch.zeros(size, dtype=torch.float32, device=step.cos.device)

    return blank


def blank_logits(num_columns: int) -> OpCall:
    """logits = NaN [R, columns of this rank]: no rank takes a token from them, even where rank 0
    hears of the failure late."""

    def blank(acts: Activations, step: StepInputs) -> None:
        size = step.logit_rows.shape[0], num_columns
        acts.logits = torch.full(size, nan, dtype=torch.float32, device=step.cos.device)

    return blank
