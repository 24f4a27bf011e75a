"""Rotary positions: the angle tables of each scaling kind, and the op that rotates queries and
keys.

Formulas: RoFormer (arXiv 2104.09864) eq. 34; linear scaling (position interpolation, arXiv
2306.15595); llama3 smoothing as published with Llama 3.1; YaRN (arXiv 2309.00071) eq. 17-23.
"""

from math import log, pi

import torch
import torch.nn.functional as F

from tpinfer.attention.paged_kv import LayerKV
from tpinfer.config.model import ModelSpec, RopeScaling
from tpinfer.layers.step_inputs import Activations, OpCall, StepInputs


def rotary_table(
    spec: ModelSpec, num_positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [num_positions, head_dim] in `dtype`, computed in float32.

    sin has its first half negated, so that rotating is x * cos + roll(x, D/2) * sin.
    """
    inverse, factor = _inverse_frequencies(spec)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    table = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return table[0].to(device, dtype), table[1].to(device, dtype)


def _inverse_frequencies(spec: ModelSpec) -> tuple[torch.Tensor, float]:
    """float32 [head_dim / 2] and the factor on cos and sin."""
    dims = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float()
    inverse = 1.0 / spec.rope_theta ** (dims / spec.head_dim)
    scaling = spec.rope_scaling
    if scaling.kind == "linear":
        return inverse / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(inverse, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(inverse, spec, scaling), _yarn_factor(scaling)
    return inverse, 1.0


def _llama3(inverse: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    wavelength = 2 * pi / inverse
    rotations = scaling.original_max_position / wavelength
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((rotations - scaling.low_freq_factor) / span).clamp(0, 1)
    return (1 - kept) * inverse / scaling.factor + kept * inverse


def _yarn(inverse: torch.Tensor, spec: ModelSpec, scaling: RopeScaling) -> torch.Tensor:
    def dim_of(rotations: float) -> float:
        turns = scaling.original_max_position / (rotations * 2 * pi)
        return spec.head_dim * log(turns) / (2 * log(spec.rope_theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = float(int(low // 1)), float(-int(-high // 1))
    low, high = max(low, 0.0), min(high, spec.head_dim - 1.0)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(spec.head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return inverse / scaling.factor * ramp + inverse * (1 - ramp)


def _yarn_factor(scaling: RopeScaling) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def bind_rope(
    cache: LayerKV,
    num_heads: int,
    num_kv_heads: int,
    head_norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> OpCall:
    """Rotate queries and keys of qkv in place (after QK norm, where the model has it) and write
    keys and values into the cache.

    head_norms: weights of the query and the key norm, each [D]. Queries and keys adjoin in qkv,
    so both are normed and rotated by the same three calls.
    """
    head_dim = cache.head_dim
    num_turned = num_heads + num_kv_heads
    norm_weight = None
    if head_norms is not None:
        norm_weight = torch.cat(
            (head_norms[0].expand(num_heads, -1), head_norms[1].expand(num_kv_heads, -1))
        )

    def rope(acts: Activations, step: StepInputs) -> None:
        qkv = acts.qkv
        turned = qkv[:, : num_turned * head_dim].view(-1, num_turned, head_dim)
        source = turned
        if norm_weight is not None:
            source = F.rms_norm(turned, (head_dim,), None, eps).mul_(norm_weight)
        rolled = torch.roll(source, head_dim // 2, -1)
        torch.addcmul(source * step.cos, rolled, step.sin, out=turned)
        kv = qkv[:, num_heads * head_dim :].view(-1, 2, num_kv_heads, head_dim)
        cache.write(step.slots, kv)

    return rope
