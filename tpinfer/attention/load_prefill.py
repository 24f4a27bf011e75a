"""From a device to the library whose kernel computes prompts there, or why none does. A library is
used where it may read the cache as it lies, computes what plain torch does, and takes less time
than the Triton kernel. They are imported here only where they are tried.

Ranks of one run may choose differently where their clocks do: attention differs in its last bits
then, as it does between cards.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from tpinfer.attention.flashinfer_prefill import load_flashinfer
from tpinfer.attention.interface import AttentionBackend, HeadLayout
from tpinfer.attention.load_triton import TOLERANCES
from tpinfer.attention.made_step import MadeStep, made_step
from tpinfer.attention.prompt_attention import (
    AttentionShape,
    PromptAttention,
    PromptKernel,
    PromptsOfShape,
    Proof,
    first_line,
)
from tpinfer.attention.prompt_part import MOST_DECODE_TOKENS
from tpinfer.attention.reference import bind_partial_attention
from tpinfer.attention.varlen_prefill import load_varlen
from tpinfer.config.dtypes import DType
from tpinfer.numerics.torch_dtypes import from_torch, to_torch
from tpinfer.sharding.kv_layout import KVLayout

Time = Callable[[Callable[[], object]], float]
"""Seconds of one call on the device."""
TYPICAL = AttentionShape(HeadLayout(32, 8, 4, 0), 128)
"""Tried at start where nobody says what the model's layers are bound for; what they are is held
against plain torch when they are."""
TIMED_SIZES = ((1024, 2048), (1024, 2048))
"""(query tokens, context) of the prompts that are timed."""
LEAST_GAIN = 1.05
"""Times the Triton kernel's rate at which a library takes its place."""
_REPEATS = 5
_FILLER_BYTES, _NUM_FILLS = 256 << 20, 4
"""Together some 0.3 ms of writing at 3 TB/s."""
_LONGEST_WINDOW = 100
"""Of the windows that are tried: shorter than the contexts, so that they slide."""
_UNTOUCHED = -7.0
"""In rows that a library must leave alone."""


def load_prefill_attention(
    backend: AttentionBackend,
    kv: KVLayout,
    device: torch.device,
    dtypes: tuple[DType, DType],
    *,
    batch_invariant: bool,
    shape: AttentionShape = TYPICAL,
    time: Time | None = None,
) -> tuple[PromptAttention | None, str]:
    """(what computes prompts instead of `backend`, how it was found), or (None, why nothing does).
    dtypes: computed in, and of stored keys and values. `time` is the device's clock by default."""
    why = _why_none(kv, dtypes, shape, batch_invariant=batch_invariant)
    if why:
        return None, why
    dtype = to_torch(dtypes[0])
    words: list[str] = []
    proved: list[PromptAttention] = []
    for kernel, why in (
        load_flashinfer(kv.block_size, device, dtype, shape),
        load_varlen(kv.block_size),
    ):
        if kernel is not None:
            prompts = PromptAttention(kernel, _prover(kernel, kv.block_size, dtype, device))
            why = prompts.why_not(shape)
            if not why:
                proved.append(prompts)
                continue
            why = f"{kernel.name} {why}"
        words.append(why)
    if not proved:
        return None, "; ".join(words)
    step = made_step(TIMED_SIZES, shape, kv.block_size, device, dtype, dtypes[1])
    attend = backend.bind_attention(shape.layout, shape.head_dim, shape.window)
    time = time or device_timer(device)
    own_s = _typical(time, lambda: attend(step.query_THD, step.cache, step.spans))
    gains = [own_s / _library_s(prompts, shape, step, time) for prompts in proved]
    gain = max(gains)
    best = proved[gains.index(gain)] if gain >= LEAST_GAIN else None
    for prompts, its in zip(proved, gains, strict=True):
        if prompts is not best:
            words.append(f"{prompts.name} is at {its:.2f} times the Triton kernel's rate")
    if best is not None:
        held = f"with {shape.words()}, held against plain torch at start"
        words.insert(0, f"{gain:.2f} times the Triton kernel's rate {held}")
    return best, "; ".join(words)


def device_timer(device: torch.device) -> Time:
    """Times by device events, each call behind writes that keep the device busy while the host
    launches it: of short calls the launch would be measured."""
    filler = torch.empty(_FILLER_BYTES, dtype=torch.uint8, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(call: Callable[[], object]) -> float:
        for _ in range(_NUM_FILLS):
            filler.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    return time


def why_wrong(
    kernel: PromptKernel,
    shape: AttentionShape,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """Why a library is not to be used for layers of a shape, as the end of a sentence that its name
    begins; nothing where it does what plain torch does, log-sum-exp among it."""
    if shape.window is not None:  # one that the contexts outgrow
        shape = replace(shape, window=min(shape.window, _LONGEST_WINDOW))
    stored, error = from_torch(dtype), 0.0
    try:
        served = PromptsOfShape(kernel.name, kernel.bind(shape))
        for sizes in probe_sizes(block_size):
            step = made_step(sizes, shape, block_size, device, dtype, stored)
            error = max(error, error_of(served, shape, step))
    except Exception as failure:  # whatever a library raises: no kernel, no compiler, no memory
        return f"does not run here: {first_line(failure)}"
    return "" if error <= TOLERANCES[dtype] else f"is off by {error:.2g} here"


def probe_sizes(block_size: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Steps of (query tokens, context) that a library is tried on: ragged lengths on and beside the
    ends of blocks, one long prompt behind a prefix, and prompts with decodes around and between
    them."""
    size = block_size
    return (
        ((size + 9, size + 9), (2 * size + 8, 2 * size + 8), (9, 4 * size + 9), (40, 300)),
        ((700, 1500),),
        ((1, 40), (33, 2 * size + 33), (64, 64), (1, size)),
        ((9, 40), (3, 7), (70, 170), (1, 2 * size), (10, 11)),
    )


def error_of(served: PromptsOfShape, shape: AttentionShape, step: MadeStep) -> float:
    """Largest difference from plain torch in a step's prompts and their log-sum-exp; infinite where
    something is no number, or other rows were written to."""
    query_THD = step.query_THD
    exact = bind_partial_attention(shape.layout, shape.head_dim, shape.window)
    exact_THD, exact_TH = exact(query_THD.float(), step.cache, step.spans)
    out_THD = torch.full_like(exact_THD, _UNTOUCHED, dtype=query_THD.dtype)
    again_THD, lse_TH = out_THD.clone(), torch.full_like(exact_TH, _UNTOUCHED)
    served.attend(query_THD, step.cache, step.spans, out_THD, None)
    served.attend(query_THD, step.cache, step.spans, again_THD, lse_TH)
    for span in step.spans.sequences:
        if span.num_tokens <= MOST_DECODE_TOKENS:
            for exact_T in (exact_THD, exact_TH):
                exact_T.narrow(0, span.first_token, span.num_tokens).fill_(_UNTOUCHED)
    pairs = (out_THD, exact_THD), (again_THD, exact_THD), (lse_TH, exact_TH)
    errors = [(found.float() - right.float()).abs().max() for found, right in pairs]
    return float(torch.stack(errors).nan_to_num(float("inf")).max())


def _why_none(
    kv: KVLayout, dtypes: tuple[DType, DType], shape: AttentionShape, *, batch_invariant: bool
) -> str:
    compute_dtype, kv_dtype = dtypes
    if batch_invariant:
        return (
            "rows that do not depend on their batch are asked for, which libraries do not promise"
        )
    if kv.group_size > 1:
        return "ranks share a KV head, and libraries know no blocks of other ranks"
    if compute_dtype not in (DType.FLOAT16, DType.BFLOAT16):
        return f"libraries compute in float16 and bfloat16, not in {compute_dtype}"
    if kv_dtype is not compute_dtype:
        return f"keys are stored as {kv_dtype}, and libraries read {compute_dtype}"
    if not shape.has_whole_groups:
        return "ranks have parts of groups of query heads, and libraries read whole ones"
    return ""


def _prover(
    kernel: PromptKernel, block_size: int, dtype: torch.dtype, device: torch.device
) -> Proof:
    return lambda shape: why_wrong(kernel, shape, block_size, dtype, device)


def _library_s(
    prompts: PromptAttention, shape: AttentionShape, step: MadeStep, time: Time
) -> float:
    """Seconds of one layer of a planned step; infinite where the library raises."""
    out_THD = torch.empty_like(step.query_THD, memory_format=torch.contiguous_format)
    try:
        served = prompts.new(shape)
        return _typical(
            time, lambda: served.attend(step.query_THD, step.cache, step.spans, out_THD, None)
        )
    except Exception:  # it ran on smaller steps: no memory for this one
        return float("inf")


def _typical(time: Time, call: Callable[[], object]) -> float:
    call()
    return statistics.median(time(call) for _ in range(_REPEATS))
