"""The ops of a layer by fused kernels around torch's products. Imported only where Triton is
chosen."""

import torch

from tpinfer.attention.paged_kv import LayerKV
from tpinfer.layers.layer_ops import TorchLayerOps
from tpinfer.layers.step_inputs import Activations, OpCall, StepInputs
from tpinfer.layers.triton_norm import add_norm, gate, gather_norm
from tpinfer.layers.triton_rope import bind_fused_rope


class TritonLayerOps(TorchLayerOps):
    """One kernel each for norm, rotation with the cache's write, activation and final norm."""

    def bind_norm(self, weight: torch.Tensor, eps: float, *, adds_delta: bool) -> OpCall:
        """As `LayerOps.bind_norm`."""

        def norm(acts: Activations, step: StepInputs) -> None:
            if acts.normed:
                acts.normed = False
                return
            delta = acts.delta if adds_delta else None
            acts.hidden = add_norm(acts.residual, delta, weight, eps)

        return norm

    def bind_rope(
        self,
        cache: LayerKV,
        num_heads: int,
        num_kv_heads: int,
        head_norms: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> OpCall:
        """As `LayerOps.bind_rope`."""
        return bind_fused_rope(cache, num_heads, num_kv_heads, head_norms, eps)

    def bind_activation(self) -> OpCall:
        """As `LayerOps.bind_activation`."""

        def activation(acts: Activations, step: StepInputs) -> None:
            acts.gated = gate(acts.gate_up)

        return activation

    def bind_final_norm(self, weight: torch.Tensor, eps: float) -> OpCall:
        """As `LayerOps.bind_final_norm`."""

        def norm(acts: Activations, step: StepInputs) -> None:
            acts.hidden = gather_norm(acts.residual, acts.delta, step.logit_rows, weight, eps)

        return norm
