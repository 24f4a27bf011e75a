"""Prompts by the libraries that are installed, on a GPU against plain torch: each one is right, or
the probe has refused it with a reason."""

import pytest
import torch

from tpinfer.attention.flashinfer_prefill import load_flashinfer
from tpinfer.attention.interface import HeadLayout
from tpinfer.attention.load_prefill import (
    error_of,
    load_prefill_attention,
    probe_sizes,
    why_wrong,
)
from tpinfer.attention.load_triton import TOLERANCES, load_triton_attention
from tpinfer.attention.made_step import made_step
from tpinfer.attention.prompt_attention import AttentionShape, PromptKernel, PromptsOfShape
from tpinfer.attention.reference import bind_attention
from tpinfer.attention.varlen_prefill import load_varlen
from tpinfer.config.dtypes import DType
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.sharding.kv_layout import KVLayout

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SHAPES = (
    AttentionShape(HeadLayout(32, 8, 4, 0), 128),
    AttentionShape(HeadLayout(14, 2, 7, 0), 64),
    AttentionShape(HeadLayout(16, 8, 2, 0), 128, 90),
)
LIBRARIES = "flashinfer", "varlen_attn"


def loaded(library: str, block: int, dtype: torch.dtype, shape: AttentionShape) -> PromptKernel:
    found = (
        load_flashinfer(block, DEVICE, dtype, shape)
        if library == "flashinfer"
        else load_varlen(block)
    )
    kernel, why = found
    if kernel is None:
        pytest.skip(why)
    return kernel


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.words())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_library_is_right_or_refused(
    library: str, block: int, shape: AttentionShape, dtype: torch.dtype
) -> None:
    """Held against other steps than those of the probe."""
    kernel = loaded(library, block, dtype, shape)
    why = why_wrong(kernel, shape, block, dtype, DEVICE)
    if why:
        pytest.skip(f"{kernel.name} {why}")
    served = PromptsOfShape(kernel.name, kernel.bind(shape))
    stored = {torch.bfloat16: DType.BFLOAT16, torch.float16: DType.FLOAT16}[dtype]
    steps = (((2000, 2000),), ((300, 4000), (1, 77), (128, 128), (500, 513), (9, 3000)))
    for sizes in (*steps, *probe_sizes(block)):
        step = made_step(sizes, shape, block, DEVICE, dtype, stored)
        assert error_of(served, shape, step) <= TOLERANCES[dtype]


@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT16])
def test_steps_of_prompts_and_decodes_whatever_is_chosen(block: int, dtype: DType) -> None:
    kv = KVLayout(block, 0)
    own, why = load_triton_attention(kv, DEVICE, dtype, dtype, batch_invariant=False)
    assert own is not None, why
    prompts, why = load_prefill_attention(own, kv, DEVICE, (dtype, dtype), batch_invariant=False)
    print(prompts.name if prompts is not None else "Triton", why)
    assert why
    backend = own if prompts is None else own.with_prompts(prompts)
    for shape in SHAPES:
        bound = shape.layout, shape.head_dim, shape.window
        attend, exact = backend.bind_attention(*bound), bind_attention(*bound)
        for sizes in probe_sizes(block):
            step = made_step(sizes, shape, block, DEVICE, to_torch(dtype), dtype)
            found = attend(step.query_THD, step.cache, step.spans)
            right = exact(step.query_THD.float(), step.cache, step.spans)
            error = float((found.float() - right).abs().max())
            assert error <= TOLERANCES[to_torch(dtype)]
