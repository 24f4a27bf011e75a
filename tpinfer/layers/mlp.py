"""The gated SiLU MLP over a rank's columns."""

import torch.nn.functional as F

from tpinfer.layers.matmul import MatMul
from tpinfer.layers.step_inputs import Activations, OpCall, StepInputs


def bind_gate_up(matmul: MatMul) -> OpCall:
    """gate_up = hidden times a weight [2F, M], gate rows first, plus bias."""

    def gate_up(acts: Activations, step: StepInputs) -> None:
        acts.gate_up = matmul(acts.hidden)

    return gate_up


def bind_activation() -> OpCall:
    """gated = silu(gate) * up, [T, F]."""

    def activation(acts: Activations, step: StepInputs) -> None:
        assert acts.gate_up is not None, "the product before activates nothing here"
        gate, up = acts.gate_up.chunk(2, -1)
        acts.gated = F.silu(gate).mul_(up)

    return activation


def bind_down(matmul: MatMul) -> OpCall:
    """delta = gated times a weight [M, F] (plus bias on the rank that owns it). Partial at tp >
    1."""

    def down(acts: Activations, step: StepInputs) -> None:
        acts.delta = matmul(acts.gated)

    return down
