"""From a device to the Triton backend, or why it is not used there. Triton is imported here only
where it is tried."""

import torch

from tpinfer.attention.interface import (
    AttentionBackend,
    HeadLayout,
    PagedSpans,
    SequenceSpan,
    StepSpans,
)
from tpinfer.attention.paged_kv import BlockTable, PagedKV, key_range
from tpinfer.attention.reference import bind_attention
from tpinfer.config.dtypes import DType
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.sharding.kv_layout import KVLayout

_TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_CONTEXTS = (1, 40, 300)
_HEADS, _HEAD_DIM = HeadLayout(8, 2, 4, 0), 64


def load_triton_attention(
    kv: KVLayout,
    device: torch.device,
    compute_dtype: DType,
    kv_dtype: DType,
    *,
    batch_invariant: bool,
) -> tuple[AttentionBackend | None, str]:
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
    if not error <= _TOLERANCES[to_torch(compute_dtype)]:
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
    layout = KVLayout(block_size, 64)
    kv = PagedKV(1, _HEADS.num_kv_heads, _HEAD_DIM, layout, kv_dtype, device)
    for tensor in kv.tensors():
        tensor.zero_()
    cache, free = kv.layer(0), list(range(64))
    generator = torch.Generator().manual_seed(1)
    tables, spans = [], []
    contexts = [min(context, 16 * block_size) for context in _CONTEXTS]
    for place, context in enumerate(contexts):
        table = BlockTable([free.pop() for _ in range(-(-context // block_size))])
        shape = context, 2, _HEADS.num_kv_heads, _HEAD_DIM
        fresh = torch.randn(shape, generator=generator).to(device, dtype)
        slots = torch.tensor(table.slots(0, context, layout), dtype=torch.int64, device=device)
        cache.write(slots, fresh)
        tables.append(table.blocks + [0] * (16 - len(table.blocks)))
        spans.append(SequenceSpan(place, 1, context, key_range(table, 0, context, layout), None))
    count = len(contexts)

    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    paged = PagedSpans(
        torch.tensor(tables, dtype=torch.int32, device=device), column(list(range(count))),
        column(list(range(count + 1))), column(contexts), count, 1, max(contexts),
    )  # fmt: skip
    shape = count, _HEADS.num_heads, _HEAD_DIM
    query = torch.randn(shape, generator=generator).to(device, dtype)
    attend = backend.bind_attention(_HEADS, _HEAD_DIM, None)
    found = attend(query, cache, StepSpans(spans, paged))
    exact = bind_attention(_HEADS, _HEAD_DIM, None)(query.float(), cache, StepSpans(spans))
    return float((found.float() - exact).abs().max())
