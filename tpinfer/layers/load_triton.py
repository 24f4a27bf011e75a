"""From a device to the fused kernels of a layer, or why they are not used there. Triton is imported
here only where it is tried."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from tpinfer.attention.paged_kv import PagedKV
from tpinfer.config.dtypes import DType
from tpinfer.layers.layer_ops import LayerOps, TorchLayerOps
from tpinfer.layers.matmul import MatMul
from tpinfer.layers.step_inputs import Activations
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.sharding.kv_layout import KVLayout

_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_TOKENS, _HEADS, _KV_HEADS, _HEAD_DIM, _HIDDEN = 3, 4, 2, 64, 320
_EPS = 1e-5


def load_triton_layers(
    matmuls: Mapping[str, MatMul], device: torch.device, compute_dtype: DType, kv_dtype: DType
) -> tuple[LayerOps | None, str]:
    """(ops, where they come from), or (None, why not). A few rows are computed first and held
    against plain torch: kernels that do not compile here, or compute something else, are not
    used."""
    dtype = to_torch(compute_dtype)
    try:
        import triton

        from tpinfer.layers.triton_ops import TritonLayerOps
    except ImportError as error:
        return None, f"triton cannot be imported: {error}"
    try:
        expected = _results(TorchLayerOps({}), device, dtype, kv_dtype)
        found = _results(TritonLayerOps({}), device, dtype, kv_dtype)
    except Exception as failure:  # the compiler's own, the driver's, whatever ptxas says
        first = (str(failure).splitlines() or [type(failure).__name__])[0]
        return None, f"their kernels do not run here: {first[:160]}"
    for name, exact in expected.items():
        error = float((found[name] - exact).abs().max())
        if not error <= _TOLERANCES[dtype]:
            return None, f"the kernel of {name} is off by {error:.2g} here"
    return TritonLayerOps(matmuls), f"triton {triton.__version__}, held against plain torch"


def _results(
    ops: LayerOps, device: torch.device, dtype: torch.dtype, kv_dtype: DType
) -> dict[str, torch.Tensor]:
    """What each op makes of the same made-up rows, in float32."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(device, dtype)

    acts, weight = Activations(), draw(_HIDDEN)
    acts.residual, acts.delta = draw(_TOKENS, _HIDDEN), draw(_TOKENS, _HIDDEN)
    acts.gate_up = draw(_TOKENS, 2 * _HIDDEN)
    acts.qkv = draw(_TOKENS, (_HEADS + 2 * _KV_HEADS) * _HEAD_DIM)
    kv = PagedKV(1, _KV_HEADS, _HEAD_DIM, KVLayout(16, 1), kv_dtype, device)
    for tensor in kv.tensors():
        tensor.zero_()
    step: Any = SimpleNamespace(
        cos=draw(_TOKENS, 1, _HEAD_DIM), sin=draw(_TOKENS, 1, _HEAD_DIM),
        slots=torch.tensor([5, 0, 9], device=device),
        logit_rows=torch.tensor([2, 0], device=device),
    )  # fmt: skip
    cache, norms = kv.layer(0), (draw(_HEAD_DIM), draw(_HEAD_DIM))
    found: dict[str, torch.Tensor] = {}
    ops.bind_norm(weight, _EPS, adds_delta=True)(acts, step)
    found["norm"] = torch.cat((acts.residual, acts.hidden))
    ops.bind_activation()(acts, step)
    found["activation"] = acts.gated
    ops.bind_rope(cache, _HEADS, _KV_HEADS, norms, _EPS)(acts, step)
    found["rope"] = acts.qkv
    stored = cache.values_2KSD.view(cache.dtype).float()
    if cache.scales_2KS is not None:
        stored = stored * cache.scales_2KS.unsqueeze(-1)
        # One step of the stored dtype apart is right too: measured in sums over a vector.
        stored = stored.mean(-1)
    found["cache"] = stored
    ops.bind_final_norm(weight, _EPS)(acts, step)
    found["final norm"] = acts.hidden
    return {name: tensor.float() for name, tensor in found.items()}
