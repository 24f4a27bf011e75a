"""Attention of prompts by every kernel there is: how fast, and how far from plain torch. Part of
`attention.py`, which prints it.

Rates count 4 x heads x dim x pairs that the causal mask lets through. Errors are the largest
difference from plain torch in float32 over outputs and, of libraries, log-sum-exp; a library whose
error is not below `tolerance` is not used by a rank, however fast it is.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from tpinfer.attention.flashinfer_prefill import load_flashinfer
from tpinfer.attention.interface import AttentionBackend
from tpinfer.attention.load_prefill import TYPICAL, Time, device_timer, error_of
from tpinfer.attention.load_triton import TOLERANCES
from tpinfer.attention.made_step import MadeStep, made_step
from tpinfer.attention.prompt_attention import AttentionShape, PromptKernel, PromptsOfShape
from tpinfer.attention.reference import bind_attention
from tpinfer.attention.varlen_prefill import load_varlen
from tpinfer.config.dtypes import DType
from tpinfer.sharding.kv_layout import KVLayout

SIZES = (
    ((1024, 1024),), ((4096, 4096),), ((16384, 16384),),
    ((1024, 2048),) * 2, ((4096, 8192),) * 2, ((1024, 16384),),
)  # fmt: skip
"""(query tokens, context) of the prompts of a step; those with more context have a prefix."""
BLOCKS = (16, 256)
"""Tokens of a block: the default, and what FA2 takes."""
_REPEATS = 10
Rates = dict[str, dict[str, float | str]]
"""By kernel: us a layer, tflops, error, and what kept it from being timed."""


def prompt_rates(deadline: float) -> dict[str, object]:
    """Every size on this GPU, until `deadline` of the monotonic clock."""
    from tpinfer.attention.triton_attention import TritonAttention

    device, dtype = torch.device("cuda"), torch.bfloat16
    found: dict[str, object] = {"tolerance": TOLERANCES[dtype], "heads": TYPICAL.words()}
    for block in BLOCKS:
        backend = TritonAttention(KVLayout(block, 0), device)
        loaded = load_flashinfer(block, device, dtype, TYPICAL), load_varlen(block)
        kernels = [kernel for kernel, _ in loaded if kernel is not None]
        found[f"not tried in blocks of {block}"] = [why for _, why in loaded if why]
        for sizes in SIZES:
            name = f"{len(sizes)} x {sizes[0][0]} tokens at {sizes[0][1]} in blocks of {block}"
            if time.monotonic() > deadline:
                found[name] = "the time budget is spent"
                continue
            step = made_step(sizes, TYPICAL, block, device, dtype, DType.BFLOAT16)
            found[name] = rates_of(step, sizes, TYPICAL, backend, kernels, device_timer(device))
    return found


def rates_of(
    step: MadeStep,
    sizes: Sequence[tuple[int, int]],
    shape: AttentionShape,
    backend: AttentionBackend,
    kernels: Sequence[PromptKernel],
    clock: Time,
) -> Rates:
    """Of one step, by `backend` and by each library."""
    bound = shape.layout, shape.head_dim, shape.window
    attend = backend.bind_attention(*bound)
    tensors = step.query_THD, step.cache, step.spans
    exact = bind_attention(*bound)(step.query_THD.float(), step.cache, step.spans)
    error = float((attend(*tensors).float() - exact).abs().max())
    del exact
    rate = _rate(lambda: attend(*tensors), sizes, shape, clock)
    found: Rates = {"Triton": {**rate, "error": error}}
    out_THD = torch.empty_like(step.query_THD, memory_format=torch.contiguous_format)
    for kernel in kernels:
        try:
            served = PromptsOfShape(kernel.name, kernel.bind(shape))
            error = error_of(served, shape, step)
            rate = _rate(lambda s=served: s.attend(*tensors, out_THD, None), sizes, shape, clock)
            found[kernel.name] = {**rate, "error": error}
        except Exception as failure:  # whatever it raises is what there is to learn
            found[kernel.name] = {"raised": f"{type(failure).__name__}: {failure}"[:300]}
    return found


def _rate(
    call: Callable[[], object],
    sizes: Sequence[tuple[int, int]],
    shape: AttentionShape,
    clock: Time,
) -> dict[str, float | str]:
    for _ in range(3):
        call()
    seconds = statistics.median(clock(call) for _ in range(_REPEATS))
    pairs = sum(length * context - length * (length - 1) // 2 for length, context in sizes)
    flops = 4 * shape.layout.num_heads * shape.head_dim * pairs
    return {"us": seconds * 1e6, "tflops": flops / seconds / 1e12}
