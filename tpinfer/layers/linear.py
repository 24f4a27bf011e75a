"""Linear layers over a rank's part of a weight. A row-parallel one leaves a partial sum for its
reduce."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tpinfer.layers.step_inputs import Activations, OpCall, StepInputs


def bind_qkv(weight: torch.Tensor, bias: torch.Tensor | None) -> OpCall:
    """qkv = hidden @ weight.T + bias; weight [(H + 2K) * D, M]."""

    def qkv(acts: Activations, step: StepInputs) -> None:
        acts.qkv = F.linear(acts.hidden, weight, bias)

    return qkv


def bind_out(weight: torch.Tensor, bias: torch.Tensor | None) -> OpCall:
    """delta = mixed @ weight.T (+ bias on the rank that owns it); weight [M, H * D]. Partial at
    tp > 1."""

    def out(acts: Activations, step: StepInputs) -> None:
        acts.delta = F.linear(acts.mixed, weight, bias)

    return out


def bind_reduce(all_reduce: Callable[[torch.Tensor], None]) -> OpCall:
    """delta summed over the group, in place."""

    def reduce(acts: Activations, step: StepInputs) -> None:
        all_reduce(acts.delta)

    return reduce
