"""Linear layers over a rank's part of a weight. A row-parallel one leaves a partial sum for its
reduce."""

from collections.abc import Callable

import torch

from tpinfer.layers.matmul import MatMul
from tpinfer.layers.step_inputs import Activations, OpCall, StepInputs


def bind_qkv(matmul: MatMul) -> OpCall:
    """qkv = hidden times a weight [(H + 2K) * D, M], plus bias."""

    def qkv(acts: Activations, step: StepInputs) -> None:
        acts.qkv = matmul(acts.hidden)

    return qkv


def bind_out(matmul: MatMul) -> OpCall:
    """delta = mixed times a weight [M, H * D] (plus bias on the rank that owns it). Partial at tp
    > 1."""

    def out(acts: Activations, step: StepInputs) -> None:
        acts.delta = matmul(acts.mixed)

    return out


NormedReduce = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]
"""(delta, residual) -> hidden where it summed, added and normed; None where it did nothing."""


def bind_reduce(
    all_reduce: Callable[[torch.Tensor], None], normed: NormedReduce | None = None
) -> OpCall:
    """delta summed over the group, in place; or, at few rows, by `normed` with the residual and the
    norm behind it, which then does nothing."""

    def reduce(acts: Activations, step: StepInputs) -> None:
        assert acts.delta is not None, "partial sums are never added before they are whole"
        hidden = None if normed is None else normed(acts.delta, acts.residual)
        if hidden is not None:
            acts.hidden, acts.normed = hidden, True
            return
        all_reduce(acts.delta)

    return reduce
