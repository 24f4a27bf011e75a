"""What computes a rank's ops: compiled for this processor where that is possible, torch else."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tpinfer.attention.interface import AttentionBackend
from tpinfer.attention.load_prefill import TYPICAL, load_prefill_attention
from tpinfer.attention.load_triton import load_triton_attention
from tpinfer.attention.native_decode import load_native_attention
from tpinfer.attention.prompt_attention import AttentionShape
from tpinfer.attention.reference import ReferenceAttention
from tpinfer.costs.choices import (
    Choice,
    ExecutionChoices,
    attention_choice,
    device_sampling_choice,
    layers_choice,
    linears_choice,
    prefill_attention_choice,
    sampling_choice,
    triton_attention_choice,
)
from tpinfer.decoding.load_triton import load_triton_passes
from tpinfer.decoding.native_passes import load_native_passes
from tpinfer.decoding.vocab_passes import TorchPasses, VocabPasses
from tpinfer.layers.layer_ops import LayerOps, TorchLayerOps
from tpinfer.layers.load_triton import load_triton_layers
from tpinfer.layers.matmul import bind_matmuls, can_pack, packed_matmul, plain_matmul
from tpinfer.numerics.torch_dtypes import to_torch
from tpinfer.sharding.kv_layout import KVLayout

if TYPE_CHECKING:
    from tpinfer.layers.skinny import SkinnyProducts


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of one rank."""

    layer_ops: LayerOps
    attention: AttentionBackend
    passes: VocabPasses


def choose_kernels(
    parameters: dict[str, torch.Tensor],
    choices: ExecutionChoices,
    kv: KVLayout,
    device: torch.device,
    *,
    batch_invariant: bool = False,
    is_alone: bool = True,
    shape: AttentionShape = TYPICAL,
) -> tuple[Kernels, ExecutionChoices]:
    """The kernels, and the choices with each one's reason on record. Takes the linears' weights out
    of `parameters`. Of `kv` only how blocks are shared out is used, not how many there are.
    `is_alone`: there is no other rank. `shape`: what most layers' attention is bound for.
    """
    packs = can_pack(to_torch(choices.compute_dtype), device)
    held = {name: tensor.nbytes for name, tensor in parameters.items()}
    products, why_plain = _skinny(device, is_alone=is_alone)
    bind = products.bind if products is not None else plain_matmul
    matmuls = bind_matmuls(parameters, packed_matmul if packs else bind)
    linear_bytes = sum(size for name, size in held.items() if name not in parameters)
    if "head.weight" not in held:  # the embedding is multiplied with, and stays
        linear_bytes += held["embed.weight"]
    words = products.words() if products is not None else ""
    decided = [linears_choice(packs, linear_bytes, words, why_plain)]
    attention: AttentionBackend | None
    layer_ops: LayerOps | None = None
    if device.type == "cuda":
        attention, told = _device_attention(choices, kv, device, batch_invariant, shape)
        decided += told
        layer_ops, why_ops = load_triton_layers(
            matmuls, device, choices.compute_dtype, choices.kv_dtype
        )
        decided.append(layers_choice(layer_ops is not None, why_ops))
        passes, why_passes = load_triton_passes(device)
        decided.append(device_sampling_choice(passes is not None, why_passes))
    else:
        dtypes = to_torch(choices.compute_dtype), to_torch(choices.kv_dtype)
        attention, why_attention = load_native_attention(choices.num_threads, dtypes)
        decided.append(attention_choice(attention is not None, why_attention))
        passes, why_passes = load_native_passes(choices.num_threads)
        decided.append(sampling_choice(passes is not None, why_passes))
    for choice in decided:
        choices = choices.with_choice(choice)
    layers = layer_ops or TorchLayerOps(matmuls)
    kernels = Kernels(layers, attention or ReferenceAttention(), passes or TorchPasses())
    return kernels, choices


def _device_attention(
    choices: ExecutionChoices,
    kv: KVLayout,
    device: torch.device,
    batch_invariant: bool,
    shape: AttentionShape,
) -> tuple[AttentionBackend | None, list[Choice]]:
    """Attention on a GPU, or None where plain torch does it; with what was decided."""
    dtypes = choices.compute_dtype, choices.kv_dtype
    own, why = load_triton_attention(kv, device, *dtypes, batch_invariant=batch_invariant)
    decided = triton_attention_choice(own is not None, why)
    if own is None:
        return None, [decided]
    prompts, why = load_prefill_attention(
        own, kv, device, dtypes, batch_invariant=batch_invariant, shape=shape
    )
    if prompts is None:
        return own, [decided, prefill_attention_choice(None, why)]
    return own.with_prompts(prompts), [decided, prefill_attention_choice(prompts.name, why)]


def _skinny(device: torch.device, *, is_alone: bool) -> tuple["SkinnyProducts | None", str]:
    """Products of few rows for a GPU, or why there are none."""
    if device.type != "cuda":
        return None, ""
    try:
        from tpinfer.layers.skinny import load_skinny
    except ImportError as error:
        return None, f"triton cannot be imported: {error}"
    return load_skinny(device, is_alone=is_alone)
