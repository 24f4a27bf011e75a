"""The gated SiLU MLP over a rank's columns."""

import torch
import torch.nn.functional as F

from tpinfer.layers.step_inputs import Activations, OpCall, StepInputs


def bind_gate_up(weight: torch.Tensor, bias: torch.Tensor | None) -> OpCall:
    """gate_up = hidden @ weight.T + bias; weight [2F, M], gate rows first."""

    def gate_up(acts: Activations, step: StepInputs) -> None:
        acts.gate_up = F.linear(acts.hidden, weight, bias)

    return gate_up


def bind_activation() -> OpCall:
    """gated = silu(gate) * up, [T, F]."""

    def activation(acts: Activations, step: StepInputs) -> None:
        gate, up = acts.gate_up.chunk(2, -1)
        acts.gated = F.silu(gate).mul_(up)

    return activation


def bind_down(weight: torch.Tensor, bias: torch.Tensor | None) -> OpCall:
    """delta = gated @ weight.T (+ bias on the rank that owns it); weight [M, F]. Partial at tp >
    1."""

    def down(acts: Activations, step: StepInputs) -> None:
        acts.delta = F.linear(acts.gated, weight, bias)

    return down
