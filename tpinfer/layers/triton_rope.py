"""QK norm, rotation and the write into the paged cache in one kernel: what `rotary.bind_rope` does
in a dozen. Imported only where Triton is chosen.

Shapes: T tokens, H query heads, K KV heads, S slots, D head dim.
"""

# Kernels are not Python to a type checker.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from tpinfer.attention.paged_kv import LayerKV
from tpinfer.layers.step_inputs import Activations, OpCall, StepInputs
from tpinfer.numerics.row_quantize import LARGEST


@triton.jit
def _normed(x1, x2, weight_ptr, places, inside, half, eps):
    """Both halves times rsqrt of their mean square, rounded, times the weight, as torch rounds."""
    wide1, wide2 = x1.to(tl.float32), x2.to(tl.float32)
    mean = (tl.sum(wide1 * wide1, 0) + tl.sum(wide2 * wide2, 0)) / (2 * half)
    factor = tl.rsqrt(mean + eps)
    weight1 = tl.load(weight_ptr + places, mask=inside, other=0.0).to(tl.float32)
    weight2 = tl.load(weight_ptr + half + places, mask=inside, other=0.0).to(tl.float32)
    rounded1 = (wide1 * factor).to(x1.dtype).to(tl.float32)
    rounded2 = (wide2 * factor).to(x2.dtype).to(tl.float32)
    return (rounded1 * weight1).to(x1.dtype), (rounded2 * weight2).to(x2.dtype)


@triton.jit
def _turned(x, other, cos, sin):
    """x * cos rounded, plus other * sin, rounded."""
    product = (x.to(tl.float32) * cos.to(tl.float32)).to(x.dtype).to(tl.float32)
    return (product + other.to(tl.float32) * sin.to(tl.float32)).to(x.dtype)


@triton.jit
def _stored(x, scale, broken, LARGEST: tl.constexpr, IS_INT8: tl.constexpr):
    """x / scale within +-LARGEST as an int8, or as the bits of a float8 e4m3 in a uint8; to the
    nearest, ties to even. In whole numbers, so that no device needs to know float8."""
    value = tl.div_rn(x.to(tl.float32), scale)
    value = tl.where(broken, 0.0, tl.minimum(tl.maximum(value, -LARGEST), LARGEST))
    # Adding and taking away 1.5 * 2**23 leaves a whole number.
    if IS_INT8:
        found = ((value + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        size = tl.abs(value)
        bits = size.to(tl.int32, bitcast=True)
        # 23 - 3 bits of the fraction go; the exponent's bias falls from 127 to 7.
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = ((size * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
        code = tl.where(size < 0.015625, small, normal)
        sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
        found = (code | sign).to(tl.uint8)
    return found


@triton.jit
def rotate_and_write(
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, q_norm_ptr, k_norm_ptr, values_ptr, scales_ptr,
    num_heads, num_kv_heads, num_slots, half, eps, HAS_NORM: tl.constexpr,
    QUANTIZES: tl.constexpr, IS_INT8: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a (token, head of H + 2K). qkv is [T, (H + 2K) * D] and changes in place; values
    [2, K, S, D] and scales [2, K, S] are one layer's cache. A negative slot writes nothing."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places = tl.arange(0, BLOCK)
    inside = places < half
    dim = 2 * half
    source = qkv_ptr + (token * (num_heads + 2 * num_kv_heads) + head) * dim
    x1 = tl.load(source + places, mask=inside, other=0.0)
    x2 = tl.load(source + half + places, mask=inside, other=0.0)
    if head < num_heads + num_kv_heads:
        if HAS_NORM:
            weight_ptr = q_norm_ptr if head < num_heads else k_norm_ptr
            x1, x2 = _normed(x1, x2, weight_ptr, places, inside, half, eps)
        cos1 = tl.load(cos_ptr + token * dim + places, mask=inside, other=0.0)
        cos2 = tl.load(cos_ptr + token * dim + half + places, mask=inside, other=0.0)
        sin1 = tl.load(sin_ptr + token * dim + places, mask=inside, other=0.0)
        sin2 = tl.load(sin_ptr + token * dim + half + places, mask=inside, other=0.0)
        turned1 = _turned(x1, x2, cos1, sin1)
        turned2 = _turned(x2, x1, cos2, sin2)
        x1, x2 = turned1, turned2
        # Lanes beyond a small head load what others store.
        tl.debug_barrier()
        tl.store(source + places, x1, mask=inside)
        tl.store(source + half + places, x2, mask=inside)
    slot = tl.load(slots_ptr + token)
    if (head >= num_heads) & (slot >= 0):
        vector = (head - num_heads).to(tl.int64) * num_slots + slot
        target = values_ptr + vector * dim
        if QUANTIZES:
            wide1, wide2 = tl.abs(x1.to(tl.float32)), tl.abs(x2.to(tl.float32))
            peak = tl.maximum(tl.max(wide1, 0), tl.max(wide2, 0))
            odd = tl.max((wide1 < float("inf")).to(tl.int32) ^ 1, 0)
            odd = tl.maximum(odd, tl.max((wide2 < float("inf")).to(tl.int32) ^ 1, 0))
            broken = odd > 0
            scale = tl.where(peak == 0.0, 1.0, tl.div_rn(peak, LARGEST))
            scale = tl.maximum(scale, 1.1754943508222875e-38)
            first = _stored(x1, scale, broken, LARGEST, IS_INT8)
            second = _stored(x2, scale, broken, LARGEST, IS_INT8)
            tl.store(target + places, first, mask=inside)
            tl.store(target + half + places, second, mask=inside)
            tl.store(scales_ptr + vector, tl.where(broken, float("nan"), scale))
        else:
            tl.store(target + places, x1, mask=inside)
            tl.store(target + half + places, x2, mask=inside)


def bind_fused_rope(
    cache: LayerKV,
    num_heads: int,
    num_kv_heads: int,
    head_norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> OpCall:
    """As `rotary.bind_rope`: the same roundings in the same order."""
    half = cache.head_dim // 2
    block = triton.next_power_of_2(half)
    scales = cache.scales_2KS
    values = cache.values_2KSD
    num_slots = values.shape[2]
    heads = num_heads + 2 * num_kv_heads

    def rope(acts: Activations, step: StepInputs) -> None:
        if not acts.qkv.shape[0]:
            return
        norms = (acts.qkv, acts.qkv) if head_norms is None else head_norms
        rotate_and_write[acts.qkv.shape[0], heads](
            acts.qkv, step.cos, step.sin, step.slots, *norms, values,
            values if scales is None else scales, num_heads, num_kv_heads, num_slots, half, eps,
            HAS_NORM=head_norms is not None, QUANTIZES=scales is not None,
            IS_INT8=cache.dtype is torch.int8, LARGEST=LARGEST.get(cache.dtype, 1.0),
            BLOCK=block, num_warps=1,
        )  # fmt: skip

    return rope
