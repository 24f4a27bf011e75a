"""RMSNorm, alone or behind the addition of what the layer before produced."""

import torch
import torch.nn.functional as F

from tpinfer.layers.step_inputs import Activations, OpCall, StepInputs


def bind_norm(weight: torch.Tensor, eps: float, *, adds_delta: bool) -> OpCall:
    """hidden = rms_norm(residual) * weight; first residual += delta where `adds_delta`. weight
    is [M]."""
    shape = weight.shape

    def norm(acts: Activations, step: StepInputs) -> None:
        if acts.normed:
            acts.normed = False
            return
        if adds_delta and acts.delta is not None:
            acts.residual = acts.residual.add_(acts.delta)
        acts.hidden = F.rms_norm(acts.residual, shape, weight, eps)

    return norm


def bind_final_norm(weight: torch.Tensor, eps: float) -> OpCall:
    """hidden = rms_norm(residual + delta) on the rows that need logits, [R, M]."""
    shape = weight.shape

    def norm(acts: Activations, step: StepInputs) -> None:
        rows = step.logit_rows
        residual, delta = acts.residual, acts.delta
        if rows.shape[0] != residual.shape[0]:
            residual = residual.index_select(0, rows)
            delta = None if delta is None else delta.index_select(0, rows)
        if delta is not None:
            residual = residual + delta
        acts.hidden = F.rms_norm(residual, shape, weight, eps)

    return norm
