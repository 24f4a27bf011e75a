"""The dense decoder family (Llama, Mistral, Qwen2, Qwen3) as a flat program over a rank's
parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from tpinfer.attention.interface import AttentionCall, HeadLayout, PartialAttentionCall
from tpinfer.attention.paged_kv import PagedKV
from tpinfer.config.model import ModelSpec
from tpinfer.layers.attention import (
    Exchange,
    bind_core,
    bind_merge,
    bind_partial_core,
    bind_query_gather,
)
from tpinfer.layers.blanks import (
    blank_delta,
    blank_logits,
    blank_partial,
    blank_queries,
    blank_residual,
    blank_stream,
)
from tpinfer.layers.embedding import AnyLogits, bind_embed, bind_embed_reduce
from tpinfer.layers.layer_ops import LayerOps
from tpinfer.layers.linear import NormedReduce, bind_reduce
from tpinfer.layers.step_inputs import Op, OpCall
from tpinfer.sharding.partition import Partition

AllReduce = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class SharedKV:
    """What ranks need that share a KV head without copies."""

    bind_attention: Callable[[HeadLayout, int, int | None], PartialAttentionCall]
    """The chosen backend's attention over a rank's own keys: (layout, head_dim, window) -> call."""
    all_gather: Exchange
    """Of those ranks: out [g, ...] <- every rank's t."""
    all_to_all: Exchange
    """Of those ranks: out [g, ...] <- every rank's t[own place]."""


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """All that a decoder is bound to on one rank."""

    spec: ModelSpec
    partition: Partition
    rank: int
    parameters: Mapping[str, torch.Tensor]
    """Local tensors by the names of `decoder_parameters`, without the linears'."""
    layer_ops: LayerOps
    """Binds the ops of a layer; holds the linears' weights."""
    kv: PagedKV
    bind_attention: Callable[[HeadLayout, int, int | None], AttentionCall]
    """The chosen attention backend: (layout, head_dim, window) -> call."""
    bind_reduce: Callable[[str], AllReduce]
    """All-reduce for the call site with this op id."""
    bind_sampling: Callable[[AnyLogits], list[Op]]
    """The ops behind the head: this rank's columns of the logits to tokens."""
    shared_kv: SharedKV | None = None
    """Where the partition's `kv_group_size` is above 1."""
    bind_normed_reduce: Callable[[torch.Tensor, float], NormedReduce | None] = lambda weight, eps: (
        None
    )
    """(weight [M], eps) of the norm behind a reduce -> both in one; None keeps them apart."""


def build_decoder(parts: DecoderParts) -> list[Op]:
    """The program of one rank, in the ledger's order of op ids. Reduces and gathers exist at
    tp > 1 only."""
    spec, partition, rank = parts.spec, parts.partition, parts.rank
    is_sharded = partition.size > 1
    weights = parts.parameters
    rows = partition.vocab[rank]
    program = [Op("embed", bind_embed(weights["embed.weight"], rows, is_whole=not is_sharded))]
    if is_sharded:
        reduce = bind_embed_reduce(parts.bind_reduce("embed.reduce"))
        program.append(Op("embed.reduce", reduce, blank_residual(weights["embed.weight"])))
    for layer in range(spec.num_layers):
        program += _attention_ops(parts, layer) + _mlp_ops(parts, layer)
    final = weights["final_norm.weight"], spec.rms_norm_eps
    program.append(Op("final_norm", parts.layer_ops.bind_final_norm(*final)))
    program.append(Op("head", parts.layer_ops.bind_head()))
    sampling = parts.bind_sampling(parts.layer_ops.bind_any_logits(*final))
    blanks = {
        "sample.local": blank_logits(rows[1] - rows[0]),
        "prompt_logprobs": blank_stream(weights["embed.weight"]),
    }
    return program + [replace(op, blank=blanks.get(op.id)) for op in sampling]


def head_layout(partition: Partition, rank: int) -> HeadLayout:
    """How the heads of a rank's layers sit on its KV heads."""
    return HeadLayout(
        num_heads=partition.num_heads(rank),
        num_kv_heads=partition.num_kv_heads(rank),
        group_size=partition.group_size,
        offset=partition.head_offset(rank),
    )


def _attention_ops(parts: DecoderParts, layer: int) -> list[Op]:
    spec, partition, rank = parts.spec, parts.partition, parts.rank
    prefix, weights = f"layers.{layer}.attn", parts.parameters
    layout = head_layout(partition, rank)
    norms = None
    if spec.qk_norm:
        norms = weights[f"{prefix}.q_norm.weight"], weights[f"{prefix}.k_norm.weight"]
    bound, cache = parts.layer_ops, parts.kv.layer(layer)
    heads = layout.num_heads, layout.num_kv_heads
    out = bound.bind_out(f"{prefix}.out", is_whole=partition.size == 1)
    ops = [
        Op(f"{prefix}.norm", _norm(parts, f"{prefix}.norm", adds_delta=layer > 0)),
        Op(f"{prefix}.qkv", bound.bind_qkv(f"{prefix}.qkv")),
        Op(f"{prefix}.rope", bound.bind_rope(cache, *heads, norms, spec.rms_norm_eps)),
        *_core_ops(parts, layer, layout),
        Op(f"{prefix}.out", out),
    ]
    return ops + _reduce(parts, f"{prefix}.reduce", f"layers.{layer}.mlp.norm")


def _core_ops(parts: DecoderParts, layer: int, layout: HeadLayout) -> list[Op]:
    """Attention over own keys, or over those of all ranks that share the KV head."""
    prefix, window = f"layers.{layer}.attn", parts.spec.window(layer)
    head_dim, shared, cache = parts.spec.head_dim, parts.shared_kv, parts.kv.layer(layer)
    if shared is None:
        attend = parts.bind_attention(layout, head_dim, window)
        return [Op(f"{prefix}.core", bind_core(attend, cache, layout.num_heads))]
    num_ranks = parts.partition.kv_group_size
    widest = parts.partition.widest_heads(parts.rank)
    everyone = HeadLayout(num_ranks * widest, 1, num_ranks * widest, 0)
    gather = bind_query_gather(shared.all_gather, num_ranks, layout.num_heads, widest, head_dim)
    attend = shared.bind_attention(everyone, head_dim, window)
    return [
        Op(f"{prefix}.gather_q", gather, blank_queries(layout.num_heads * head_dim)),
        Op(f"{prefix}.core", bind_partial_core(attend, cache, widest)),
        Op(
            f"{prefix}.merge",
            bind_merge(shared.all_to_all, layout.num_heads),
            blank_partial((num_ranks, widest, head_dim + 1)),
        ),
    ]


def _mlp_ops(parts: DecoderParts, layer: int) -> list[Op]:
    prefix, bound = f"layers.{layer}.mlp", parts.layer_ops
    down = bound.bind_down(f"{prefix}.down", is_whole=parts.partition.size == 1)
    ops = [
        Op(f"{prefix}.norm", _norm(parts, f"{prefix}.norm", adds_delta=True)),
        Op(f"{prefix}.gate_up", bound.bind_gate_up(f"{prefix}.gate_up")),
        Op(f"{prefix}.act", bound.bind_activation()),
        Op(f"{prefix}.down", down),
    ]
    is_last = layer == parts.spec.num_layers - 1  # the final norm takes some rows only
    following = None if is_last else f"layers.{layer + 1}.attn.norm"
    return ops + _reduce(parts, f"{prefix}.reduce", following)


def _norm(parts: DecoderParts, name: str, *, adds_delta: bool) -> OpCall:
    weight = parts.parameters[f"{name}.weight"]
    return parts.layer_ops.bind_norm(weight, parts.spec.rms_norm_eps, adds_delta=adds_delta)


def _reduce(parts: DecoderParts, site: str, norm: str | None) -> list[Op]:
    """`norm` is the op behind it that norms every row, where there is one."""
    if parts.partition.size == 1:
        return []
    embedding, normed = parts.parameters["embed.weight"], None
    if norm is not None:
        weight = parts.parameters[f"{norm}.weight"]
        normed = parts.bind_normed_reduce(weight, parts.spec.rms_norm_eps)
    blank = blank_delta(embedding) if normed is None else blank_stream(embedding)
    return [Op(site, bind_reduce(parts.bind_reduce(site), normed), blank)]
