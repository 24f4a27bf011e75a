"""The dense decoder family (Llama, Mistral, Qwen2, Qwen3) as a flat program over a rank's
parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tpinfer.attention.interface import AttentionCall, HeadLayout
from tpinfer.attention.paged_kv import PagedKV
from tpinfer.config.model import ModelSpec
from tpinfer.layers.attention import bind_core
from tpinfer.layers.embedding import (
    AnyLogits,
    bind_any_logits,
    bind_embed,
    bind_embed_reduce,
    bind_head,
)
from tpinfer.layers.linear import bind_out, bind_qkv, bind_reduce
from tpinfer.layers.mlp import bind_activation, bind_down, bind_gate_up
from tpinfer.layers.norm import bind_final_norm, bind_norm
from tpinfer.layers.rotary import bind_rope
from tpinfer.layers.step_inputs import Op, OpCall
from tpinfer.sharding.partition import Partition

AllReduce = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """All that a decoder is bound to on one rank."""

    spec: ModelSpec
    partition: Partition
    rank: int
    parameters: Mapping[str, torch.Tensor]
    """Local tensors by the names of `decoder_parameters`."""
    kv: PagedKV
    bind_attention: Callable[[HeadLayout, int, int | None], AttentionCall]
    """The chosen attention backend: (layout, head_dim, window) -> call."""
    bind_reduce: Callable[[str], AllReduce]
    """All-reduce for the call site with this op id."""
    bind_sampling: Callable[[AnyLogits], list[Op]]
    """The ops behind the head: this rank's columns of the logits to tokens."""


def build_decoder(parts: DecoderParts) -> list[Op]:
    """The program of one rank, in the ledger's order of op ids. Reduces and gathers exist at
    tp > 1 only."""
    spec, partition, rank = parts.spec, parts.partition, parts.rank
    is_sharded = partition.size > 1
    weights = parts.parameters
    rows = partition.vocab[rank]
    program = [Op("embed", bind_embed(weights["embed.weight"], rows, is_whole=not is_sharded))]
    if is_sharded:
        program.append(Op("embed.reduce", bind_embed_reduce(parts.bind_reduce("embed.reduce"))))
    for layer in range(spec.num_layers):
        program += _attention_ops(parts, layer) + _mlp_ops(parts, layer)
    head = weights["embed.weight" if spec.tie_embeddings else "head.weight"]
    norm = weights["final_norm.weight"]
    program.append(Op("final_norm", bind_final_norm(norm, spec.rms_norm_eps)))
    program.append(Op("head", bind_head(head)))
    return program + parts.bind_sampling(bind_any_logits(norm, spec.rms_norm_eps, head))


def _attention_ops(parts: DecoderParts, layer: int) -> list[Op]:
    spec, partition, rank = parts.spec, parts.partition, parts.rank
    prefix, weights = f"layers.{layer}.attn", parts.parameters
    layout = HeadLayout(
        num_heads=partition.num_heads(rank),
        num_kv_heads=partition.num_kv_heads(rank),
        group_size=partition.group_size,
        offset=partition.head_offset(rank),
    )
    norms = None
    if spec.qk_norm:
        norms = weights[f"{prefix}.q_norm.weight"], weights[f"{prefix}.k_norm.weight"]
    cache = parts.kv.layer(layer)
    attend = parts.bind_attention(layout, spec.head_dim, spec.window(layer))
    ops = [
        Op(f"{prefix}.norm", _norm(parts, f"{prefix}.norm", adds_delta=layer > 0)),
        Op(
            f"{prefix}.qkv",
            bind_qkv(weights[f"{prefix}.qkv.weight"], _bias(parts, f"{prefix}.qkv")),
        ),
        Op(
            f"{prefix}.rope",
            bind_rope(cache, layout.num_heads, layout.num_kv_heads, norms, spec.rms_norm_eps),
        ),
        Op(f"{prefix}.core", bind_core(attend, cache, layout.num_heads)),
        Op(
            f"{prefix}.out",
            bind_out(weights[f"{prefix}.out.weight"], _bias(parts, f"{prefix}.out")),
        ),
    ]
    return ops + _reduce(parts, f"{prefix}.reduce")


def _mlp_ops(parts: DecoderParts, layer: int) -> list[Op]:
    prefix, weights = f"layers.{layer}.mlp", parts.parameters
    ops = [
        Op(f"{prefix}.norm", _norm(parts, f"{prefix}.norm", adds_delta=True)),
        Op(
            f"{prefix}.gate_up",
            bind_gate_up(weights[f"{prefix}.gate_up.weight"], _bias(parts, f"{prefix}.gate_up")),
        ),
        Op(f"{prefix}.act", bind_activation()),
        Op(
            f"{prefix}.down",
            bind_down(weights[f"{prefix}.down.weight"], _bias(parts, f"{prefix}.down")),
        ),
    ]
    return ops + _reduce(parts, f"{prefix}.reduce")


def _norm(parts: DecoderParts, name: str, *, adds_delta: bool) -> OpCall:
    return bind_norm(
        parts.parameters[f"{name}.weight"], parts.spec.rms_norm_eps, adds_delta=adds_delta
    )


def _bias(parts: DecoderParts, name: str) -> torch.Tensor | None:
    """The bias of a linear, None where the model has none or another rank owns it."""
    bias = parts.parameters.get(f"{name}.bias")
    return bias if bias is not None and bias.numel() else None


def _reduce(parts: DecoderParts, site: str) -> list[Op]:
    return [Op(site, bind_reduce(parts.bind_reduce(site)))] if parts.partition.size > 1 else []
