"""From a device to the Triton backend, or why it is not used there. Triton is imported here only
where it is tried."""

from typing import TYPE_CHECKING

import torch

from tpinfer.attention.interface import AttentionBackend, HeadLayout
from tpinfer.attention.made_step import made_step
from tpinfer.attention.prompt_attention import AttentionShape
from tpinfer.attention.reference import bind_attention
from tpinfer.config.dtypes import DType
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.sharding.kv_layout import KVLayout

if TYPE_CHECKING:
    from tpinfer.attention.triton_attention import TritonAttention

TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference from plain torch in float32 that attention computed in a dtype may have."""
_CONTEXTS = (1, 40, 300)
_SHAPE = AttentionShape(HeadLayout(8, 2, 4, 0), 64)


def load_triton_attention(
    kv: KVLayout,
    device: torch.device,
    compute_dtype: DType,
    kv_dtype: DType,
    *,
    batch_invariant: bool,
) -> tuple["TritonAttention | None", str]:
    """(backend, where it comes from), or (None, why not). A few rows are computed first and held
    against plain torch: a kernel that does not compile here, or computes something else, is not
    used."""
    try:
        import triton

        from tpinfer.attention.triton_attention import TritonAttention
    except ImportError as error:
        return None, f"triton cannot be imported: {error}"
    backend = TritonAttention(kv, device, batch_invariant=batch_invariant)
    probe = TritonAttention(KVLayout(kv.block_size, 64), device, batch_invariant=batch_invariant)
    try:
        error = _error_of(probe, kv.block_size, device, to_torch(compute_dtype), kv_dtype)
    except Exception as failure:  # the compiler's own, the driver's, whatever ptxas says
        first = (str(failure).splitlines() or [type(failure).__name__])[0]
        return None, f"its kernel does not run here: {first[:160]}"
    if not error <= TOLERANCES[to_torch(compute_dtype)]:
        return None, f"its kernel is off by {error:.2g} here"
    words = "; rows do not depend on their batch" if batch_invariant else ""
    return backend, f"triton {triton.__version__}, held against plain torch at start{words}"


def _error_of(
    backend: AttentionBackend,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: DType,
) -> float:
    """Largest difference from plain torch over a few sequences of one query token."""
    sizes = [(1, min(context, 16 * block_size)) for context in _CONTEXTS]
    step = made_step(sizes, _SHAPE, block_size, device, dtype, kv_dtype)
    bound = _SHAPE.layout, _SHAPE.head_dim, _SHAPE.window
    found = backend.bind_attention(*bound)(step.query_THD, step.cache, step.spans)
    exact = bind_attention(*bound)(step.query_THD.float(), step.cache, step.spans)
    return float((found.float() - exact).abs().max())
