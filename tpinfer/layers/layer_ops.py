"""The ops of a decoder as one object that binds them: plain torch here, fused kernels in
`triton_ops`. A program is built from either without knowing which.

Every op keeps its place in the program. One whose work a neighbour's kernel does at some row count
does nothing at that count.

Shapes: T tokens, M hidden size.
"""

from collections.abc import Mapping
from typing import Protocol

import torch

from tpinfer.attention.paged_kv import LayerKV
from tpinfer.layers.embedding import AnyLogits, bind_any_logits, bind_head
from tpinfer.layers.linear import bind_out, bind_qkv
from tpinfer.layers.matmul import MatMul
from tpinfer.layers.mlp import bind_activation, bind_down, bind_gate_up
from tpinfer.layers.norm import bind_final_norm, bind_norm
from tpinfer.layers.rotary import bind_rope
from tpinfer.layers.step_inputs import OpCall


class LayerOps(Protocol):
    """Binds each op of a layer to its weights. Products are named by their op id, and `head`."""

    def bind_norm(self, weight: torch.Tensor, eps: float, *, adds_delta: bool) -> OpCall:
        """hidden = rms_norm(residual) * weight [M]; first residual += delta where `adds_delta`."""
        ...

    def bind_qkv(self, name: str) -> OpCall:
        """qkv = hidden times the weight, plus bias."""
        ...

    def bind_rope(
        self,
        cache: LayerKV,
        num_heads: int,
        num_kv_heads: int,
        head_norms: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> OpCall:
        """Norm (with `head_norms`, each [D]) and rotate queries and keys of qkv in place, and write
        keys and values into the cache."""
        ...

    def bind_out(self, name: str, *, is_whole: bool) -> OpCall:
        """delta = mixed times the weight. `is_whole`: no reduce follows, so that it may be added to
        the residual at once."""
        ...

    def bind_gate_up(self, name: str) -> OpCall:
        """gate_up = hidden times the weight, plus bias."""
        ...

    def bind_activation(self) -> OpCall:
        """gated = silu(gate) * up."""
        ...

    def bind_down(self, name: str, *, is_whole: bool) -> OpCall:
        """delta = gated times the weight. `is_whole` as for `bind_out`."""
        ...

    def bind_final_norm(self, weight: torch.Tensor, eps: float) -> OpCall:
        """hidden = rms_norm(residual + delta) of the rows that need logits."""
        ...

    def bind_head(self) -> OpCall:
        """logits of the rank's vocabulary rows."""
        ...

    def bind_any_logits(self, weight: torch.Tensor, eps: float) -> AnyLogits:
        """Final norm and head for any of a step's tokens, once the layers have run."""
        ...


class TorchLayerOps:
    """Plain torch around the products `matmuls`, on any device."""

    def __init__(self, matmuls: Mapping[str, MatMul]) -> None:
        self._matmuls = matmuls

    def bind_norm(self, weight: torch.Tensor, eps: float, *, adds_delta: bool) -> OpCall:
        """As `LayerOps.bind_norm`."""
        return bind_norm(weight, eps, adds_delta=adds_delta)

    def bind_qkv(self, name: str) -> OpCall:
        """As `LayerOps.bind_qkv`."""
        return bind_qkv(self._matmuls[name])

    def bind_rope(
        self,
        cache: LayerKV,
        num_heads: int,
        num_kv_heads: int,
        head_norms: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> OpCall:
        """As `LayerOps.bind_rope`."""
        return bind_rope(cache, num_heads, num_kv_heads, head_norms, eps)

    def bind_out(self, name: str, *, is_whole: bool) -> OpCall:
        """As `LayerOps.bind_out`; the next norm adds."""
        return bind_out(self._matmuls[name])

    def bind_gate_up(self, name: str) -> OpCall:
        """As `LayerOps.bind_gate_up`."""
        return bind_gate_up(self._matmuls[name])

    def bind_activation(self) -> OpCall:
        """As `LayerOps.bind_activation`."""
        return bind_activation()

    def bind_down(self, name: str, *, is_whole: bool) -> OpCall:
        """As `LayerOps.bind_down`; the next norm adds."""
        return bind_down(self._matmuls[name])

    def bind_final_norm(self, weight: torch.Tensor, eps: float) -> OpCall:
        """As `LayerOps.bind_final_norm`."""
        return bind_final_norm(weight, eps)

    def bind_head(self) -> OpCall:
        """As `LayerOps.bind_head`."""
        return bind_head(self._matmuls["head"])

    def bind_any_logits(self, weight: torch.Tensor, eps: float) -> AnyLogits:
        """As `LayerOps.bind_any_logits`."""
        return bind_any_logits(weight, eps, self._matmuls["head"])
