"""The parameters of a dense decoder and how each is cut: the one list that loader, ledger and
model share."""

from collections.abc import Sequence
from dataclasses import dataclass

from tpinfer.config.dtypes import DType
from tpinfer.config.model import ModelSpec
from tpinfer.sharding.partition import Partition
from tpinfer.sharding.spec import Cut, Range, Segment, ShardSpec


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter: its name in the program, its cut and its dtype in memory."""

    name: str
    """Name in the program, such as `layers.3.attn.qkv.weight`."""
    shard: ShardSpec
    dtype: DType

    def local_bytes(self, rank: int) -> int:
        """Bytes that `rank` holds."""
        return self.shard.num_local_elements(rank) * self.dtype.num_bytes


def decoder_parameters(
    spec: ModelSpec, partition: Partition, dtype: DType
) -> tuple[ParameterSpec, ...]:
    """Every parameter of the decoder in program order.

    Norm weights are whole on each rank. Column-parallel weights are cut on dim 0 (as their
    biases are), row-parallel ones on dim 1; a row-parallel bias belongs to rank 0 alone, which
    adds it before the reduce. A tied head has no parameter of its own.
    """
    build = _Builder(spec, partition, dtype)
    vocab = (("all", spec.vocab_size, partition.vocab),)
    found = [build.columns("embed.weight", vocab, 1)]
    for layer in range(spec.num_layers):
        found += build.layer(f"layers.{layer}")
    found.append(build.whole("final_norm.weight", spec.hidden_size))
    if not spec.tie_embeddings:
        found.append(build.columns("head.weight", vocab, 1))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Builder:
    spec: ModelSpec
    partition: Partition
    dtype: DType

    def layer(self, prefix: str) -> list[ParameterSpec]:
        spec, head_dim = self.spec, self.spec.head_dim
        heads = _scale(self.partition.heads, head_dim)
        kv_heads = _scale(self.partition.kv_heads, head_dim)
        kv_size = spec.num_kv_heads * head_dim
        qkv = (
            ("q", spec.num_heads * head_dim, heads),
            ("k", kv_size, kv_heads),
            ("v", kv_size, kv_heads),
        )
        gate_up = tuple((n, spec.intermediate_size, self.partition.mlp) for n in ("gate", "up"))
        found = [
            self.whole(f"{prefix}.attn.norm.weight", spec.hidden_size),
            self.columns(f"{prefix}.attn.qkv.weight", qkv, head_dim),
        ]
        if spec.qkv_bias:
            found.append(self.columns(f"{prefix}.attn.qkv.bias", qkv, head_dim, bias=True))
        if spec.qk_norm:
            found += [self.whole(f"{prefix}.attn.{n}_norm.weight", head_dim) for n in ("q", "k")]
        found.append(self.rows(f"{prefix}.attn.out.weight", qkv[0], head_dim))
        if spec.out_bias:
            found.append(self.first_rank(f"{prefix}.attn.out.bias", spec.hidden_size))
        found += [
            self.whole(f"{prefix}.mlp.norm.weight", spec.hidden_size),
            self.columns(f"{prefix}.mlp.gate_up.weight", gate_up, 1),
        ]
        if spec.mlp_bias:
            found.append(self.columns(f"{prefix}.mlp.gate_up.bias", gate_up, 1, bias=True))
        down = ("all", spec.intermediate_size, self.partition.mlp)
        found.append(self.rows(f"{prefix}.mlp.down.weight", down, 1))
        if spec.mlp_bias:
            found.append(self.first_rank(f"{prefix}.mlp.down.bias", spec.hidden_size))
        return found

    def whole(self, name: str, size: int) -> ParameterSpec:
        return ParameterSpec(name, ShardSpec((size,)), self.dtype)

    def columns(
        self,
        name: str,
        segments: Sequence[tuple[str, int, tuple[Range, ...]]],
        unit: int,
        bias: bool = False,
    ) -> ParameterSpec:
        total = sum(size for _, size, _ in segments)
        shape = (total,) if bias else (total, self.spec.hidden_size)
        cut = Cut("tp", 0, unit, tuple(Segment(*segment) for segment in segments))
        return ParameterSpec(name, ShardSpec(shape, (cut,)), self.dtype)

    def rows(
        self, name: str, segment: tuple[str, int, tuple[Range, ...]], unit: int
    ) -> ParameterSpec:
        cut = Cut("tp", 1, unit, (Segment("all", segment[1], segment[2]),))
        return ParameterSpec(
            name, ShardSpec((self.spec.hidden_size, segment[1]), (cut,)), self.dtype
        )

    def first_rank(self, name: str, size: int) -> ParameterSpec:
        ranges = ((0, size),) + ((size, size),) * (self.partition.size - 1)
        cut = Cut("tp", 0, 1, (Segment("all", size, ranges),))
        return ParameterSpec(name, ShardSpec((size,), (cut,)), self.dtype)


def _scale(ranges: Sequence[Range], factor: int) -> tuple[Range, ...]:
    return tuple((start * factor, stop * factor) for start, stop in ranges)
