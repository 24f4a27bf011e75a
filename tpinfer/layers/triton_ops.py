"""The ops of a layer by fused kernels around and inside products. Imported only where Triton is
chosen."""

from collections.abc import Mapping

import torch

from tpinfer.attention.paged_kv import LayerKV
from tpinfer.layers.layer_ops import TorchLayerOps
from tpinfer.layers.matmul import MatMul
from tpinfer.layers.skinny import SkinnyMatMul
from tpinfer.layers.step_inputs import Activations, OpCall, StepInputs
from tpinfer.layers.triton_norm import add_norm, gate, gather_norm
from tpinfer.layers.triton_rope import bind_fused_rope


class TritonLayerOps(TorchLayerOps):
    """One kernel each for norm, rotation with the cache's write, activation and final norm. A
    single row is normed, activated and added inside the products where these are own kernels;
    several rows are activated there."""

    def __init__(self, matmuls: Mapping[str, MatMul]) -> None:
        super().__init__(matmuls)
        own = [one for one in matmuls.values() if isinstance(one, SkinnyMatMul)]
        self._leads = any(one.dependent for one in own)

    def bind_norm(self, weight: torch.Tensor, eps: float, *, adds_delta: bool) -> OpCall:
        """As `LayerOps.bind_norm`."""

        def norm(acts: Activations, step: StepInputs) -> None:
            if acts.normed:
                acts.normed = False
                return
            delta = acts.delta if adds_delta else None
            if delta is None and acts.residual.shape[0] == 1:
                acts.deferred = weight, eps
                return
            acts.hidden = self._norm(acts.residual, delta, weight, eps)

        return norm

    def bind_qkv(self, name: str) -> OpCall:
        """As `LayerOps.bind_qkv`."""
        matmul, one = self._matmuls[name], self._one_row(name)

        def qkv(acts: Activations, step: StepInputs) -> None:
            norm, acts.deferred = acts.deferred, None
            if norm is None:
                acts.qkv = matmul(acts.hidden)
            elif one is not None:
                acts.qkv = one.normed(acts.residual, norm)
            else:
                acts.qkv = matmul(self._norm(acts.residual, None, *norm))

        return qkv

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

    def bind_out(self, name: str, *, is_whole: bool) -> OpCall:
        """As `LayerOps.bind_out`."""
        matmul, one = self._matmuls[name], self._one_row(name) if is_whole else None

        def out(acts: Activations, step: StepInputs) -> None:
            acts.delta = _added(matmul, one, acts.mixed, acts.residual)

        return out

    def bind_gate_up(self, name: str) -> OpCall:
        """As `LayerOps.bind_gate_up`."""
        matmul, one = self._matmuls[name], self._one_row(name)
        own = matmul if isinstance(matmul, SkinnyMatMul) else None
        gating = frozenset() if own is None else own.gating_rows()

        def gate_up(acts: Activations, step: StepInputs) -> None:
            norm, acts.deferred = acts.deferred, None
            if one is not None and acts.residual.shape[0] == 1:
                x = acts.hidden if norm is None else acts.residual
                acts.gate_up, acts.gated = None, one.gated(x, norm)
                return
            hidden = acts.hidden if norm is None else self._norm(acts.residual, None, *norm)
            if own is not None and hidden.shape[0] in gating:
                acts.gate_up, acts.gated = None, own.gated_rows(hidden)
                return
            acts.gate_up = matmul(hidden)

        return gate_up

    def bind_activation(self) -> OpCall:
        """As `LayerOps.bind_activation`."""

        def activation(acts: Activations, step: StepInputs) -> None:
            if acts.gate_up is not None:
                acts.gated = gate(acts.gate_up, leads=self._leads)

        return activation

    def bind_down(self, name: str, *, is_whole: bool) -> OpCall:
        """As `LayerOps.bind_down`."""
        matmul, one = self._matmuls[name], self._one_row(name) if is_whole else None

        def down(acts: Activations, step: StepInputs) -> None:
            acts.delta = _added(matmul, one, acts.gated, acts.residual)

        return down

    def bind_final_norm(self, weight: torch.Tensor, eps: float) -> OpCall:
        """As `LayerOps.bind_final_norm`."""

        def norm(acts: Activations, step: StepInputs) -> None:
            rows = step.logit_rows
            acts.hidden = gather_norm(
                acts.residual, acts.delta, rows, weight, eps, leads=self._leads
            )

        return norm

    def _norm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return add_norm(residual, delta, weight, eps, leads=self._leads)

    def _one_row(self, name: str) -> SkinnyMatMul | None:
        """A product that takes the ops around it along for one row."""
        matmul = self._matmuls[name]
        return matmul if isinstance(matmul, SkinnyMatMul) and matmul.fuses else None


def _added(
    matmul: MatMul, one: SkinnyMatMul | None, x: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor | None:
    """The product with x, for whoever adds it to the residual; None where it has been added."""
    if one is None or x.shape[0] != 1:
        return matmul(x)
    one.add_to(residual, x)
    return None
