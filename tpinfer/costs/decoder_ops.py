"""The formulas of a dense decoder's ops on one rank, from its model shape and its real share of
heads, columns and vocabulary.

Letters: M hidden size, D head dim, H and K local query and KV heads, F local MLP columns, V
local vocabulary rows, b bytes of a compute value, c bytes of a cache value, p ranks, g ranks that
share a KV head's blocks, W most query heads of any of those. A linear
reads its weight once a step whatever the number of tokens: that is why decoding is bound by
memory (arXiv 2211.05102, section 2).
"""

from dataclasses import dataclass

from tpinfer.config.dtypes import DType
from tpinfer.config.kv_cache import has_scales, kv_vector_bytes
from tpinfer.config.model import ModelSpec
from tpinfer.costs.ops import Formula, OpFormula, OpKind, formula
from tpinfer.sharding.partition import Partition

_PARTIAL_BYTES = 4
"""Partial attention travels in float32."""
_MERGE_FLOPS = 4
"""Operations on a partial's log-sum-exp: greatest, difference, exp, sum."""
_QUANTIZE_FLOPS = 3
"""Operations a stored value of a scaled cache: magnitude, scaling, rounding."""

SHARED_KV_OPS = ("attn.gather_q", "attn.merge")
"""Endings of the ops in which the ranks that share a KV head wait for each other, not all ranks."""

PricedOp = tuple[str, OpKind, OpFormula]
"""(op id or its ending within a layer, kind, formulas)."""


@dataclass(frozen=True, slots=True)
class DecoderOps:
    """Prices of one rank's ops."""

    spec: ModelSpec
    partition: Partition
    rank: int
    compute_dtype: DType
    kv_dtype: DType

    def before_layers(self) -> list[PricedOp]:
        """Embedding and its reduce."""
        width = self.spec.hidden_size * self.compute_dtype.num_bytes
        lookup = OpFormula(
            bytes_read=formula(tokens=width + 8), bytes_written=formula(tokens=width)
        )
        return [("embed", OpKind.EMBED, lookup), *self._reduce("embed.reduce")]

    def layer(self, slides: bool) -> list[PricedOp]:
        """The ops of one layer, by the ending of their ids."""
        spec, part, rank = self.spec, self.partition, self.rank
        hidden, head_dim = spec.hidden_size, spec.head_dim
        query = part.num_heads(rank) * head_dim
        kv = part.num_kv_heads(rank) * head_dim
        columns = part.mlp[rank][1] - part.mlp[rank][0]
        owns_bias = rank == 0
        return [
            ("attn.norm", OpKind.NORM, self._norm("tokens")),
            ("attn.qkv", OpKind.LINEAR, self._linear(hidden, query + 2 * kv, spec.qkv_bias)),
            ("attn.rope", OpKind.ROPE, self._rope(query, kv)),
            *self._core(query, kv, slides),
            ("attn.out", OpKind.LINEAR, self._linear(query, hidden, spec.out_bias and owns_bias)),
            *self._reduce("attn.reduce"),
            ("mlp.norm", OpKind.NORM, self._norm("tokens")),
            ("mlp.gate_up", OpKind.LINEAR, self._linear(hidden, 2 * columns, spec.mlp_bias)),
            ("mlp.act", OpKind.ACTIVATION, self._activation(columns)),
            ("mlp.down", OpKind.LINEAR, self._linear(columns, hidden, spec.mlp_bias and owns_bias)),
            *self._reduce("mlp.reduce"),
        ]

    def behind_layers(self) -> list[PricedOp]:
        """Final norm, head, sampling, log-probabilities of prompt tokens."""
        start, stop = self.partition.vocab[self.rank]
        local = stop - start
        head = self._linear(self.spec.hidden_size, local, False, "rows")
        float_logits = OpFormula(
            bytes_written=formula(rows=local * (4 - self.compute_dtype.num_bytes))
        )
        return [
            ("final_norm", OpKind.NORM, self._norm("rows")),
            ("head", OpKind.LINEAR, head + float_logits),
            *self._sampling(local),
            ("prompt_logprobs", OpKind.SAMPLE, self._prompt_logprobs(local)),
        ]

    def _norm(self, term: str) -> OpFormula:
        """residual += delta, then RMSNorm: two tensors in, two out; about five operations a
        value."""
        hidden, size = self.spec.hidden_size, self.compute_dtype.num_bytes
        return OpFormula(
            flops=formula(**{term: 5 * hidden}),
            bytes_read=formula(one=hidden * size, **{term: 2 * hidden * size}),
            bytes_written=formula(**{term: 2 * hidden * size}),
        )

    def _linear(self, inner: int, outer: int, has_bias: bool, term: str = "tokens") -> OpFormula:
        """2 * inner * outer operations a token; the weight is read once a step."""
        size = self.compute_dtype.num_bytes
        weight = inner * outer + (outer if has_bias else 0)
        return OpFormula(
            flops=formula(**{term: 2 * inner * outer + (outer if has_bias else 0)}),
            bytes_read=formula(one=weight * size, **{term: inner * size}),
            bytes_written=formula(**{term: outer * size}),
        )

    def _rope(self, query: int, kv: int) -> OpFormula:
        """Three operations a rotated value (four more for its QK norm, whose two weights are read
        once a step), keys and values written to the cache."""
        size, turned, angles = self.compute_dtype.num_bytes, query + kv, 2 * self.spec.head_dim
        per_value, weights = (7, 2 * self.spec.head_dim) if self.spec.qk_norm else (3, 0)
        stored = 2 * kv if has_scales(self.kv_dtype) else 0
        return OpFormula(
            flops=formula(tokens=per_value * turned + _QUANTIZE_FLOPS * stored),
            bytes_read=formula(one=weights * size, tokens=(turned + kv + angles) * size),
            bytes_written=formula(tokens=turned * size + self._cached_bytes(kv)),
        )

    def _cached_bytes(self, kv: int) -> int:
        """Cache bytes of a token's keys and values, `kv` of each."""
        vectors = 2 * kv // self.spec.head_dim
        return vectors * kv_vector_bytes(self.spec.head_dim, self.kv_dtype)

    def _core(self, query: int, kv: int, slides: bool) -> list[PricedOp]:
        """Attention over own keys; where ranks share a KV head, over the part of its keys that lies
        here, between a gather of the queries and a merge of what the ranks found."""
        size = self.compute_dtype.num_bytes
        ranks = self.partition.kv_group_size
        if ranks == 1:
            priced = self._attention(query, kv, slides, 1)
            vectors = formula(tokens=query * size)
            priced += OpFormula(bytes_read=vectors, bytes_written=vectors)
            return [("attn.core", OpKind.ATTENTION, priced)]
        heads = self.partition.widest_heads(self.rank)
        width = heads * self.spec.head_dim
        part = heads * (self.spec.head_dim + 1) * _PARTIAL_BYTES
        gather = OpFormula(
            bytes_read=formula(tokens=(query + ranks * width) * size),
            bytes_written=formula(tokens=(ranks + 1) * width * size),
            bytes_sent=formula(tokens=(ranks - 1) * width * size),
        )
        everyone = sum(
            self.partition.num_heads(rank) for rank in self.partition.kv_ranks(self.rank)
        )
        priced = self._attention(everyone * self.spec.head_dim, kv, slides, ranks)
        priced += OpFormula(
            bytes_read=formula(tokens=ranks * width * size),
            bytes_written=formula(tokens=ranks * part),
        )
        # All-to-all: a rank sends each other one the heads that are its own, (g - 1) W (D + 1)
        # float32 values a token. All-gather of the partials would send g times as much.
        merge = OpFormula(
            flops=formula(tokens=ranks * heads * (2 * self.spec.head_dim + _MERGE_FLOPS)),
            bytes_read=formula(tokens=3 * ranks * part),
            bytes_written=formula(tokens=2 * ranks * part + query * size),
            bytes_sent=formula(tokens=(ranks - 1) * part),
        )
        return [
            ("attn.gather_q", OpKind.GATHER, gather),
            ("attn.core", OpKind.ATTENTION, priced),
            ("attn.merge", OpKind.EXCHANGE, merge),
        ]

    def _attention(self, query: int, kv: int, slides: bool, ranks: int) -> OpFormula:
        """Two matmuls over the attended pairs: 4 * H * D operations a pair, and reading the keys.

        Causality leaves sq * sk - sq * (sq - 1) / 2 pairs of a sequence's sq * sk. Of `ranks` that
        share the keys each is priced at their mean: one holds up to a block a sequence more than
        another. A scaled cache takes one more operation a value read.
        """
        half, cached = _share(2 * query, ranks), _share(self._cached_bytes(kv), ranks)
        scaling = _share(2 * kv, ranks) if has_scales(self.kv_dtype) else 0
        if slides:
            flops = formula(pairs_window=2 * half, sk_window=scaling)
            return OpFormula(flops=flops, bytes_read=formula(sk_window=cached))
        flops = formula(sqsk=2 * half, sqsq=-half, tokens=half, sk=scaling)
        return OpFormula(flops=flops, bytes_read=formula(sk=cached))

    def _activation(self, columns: int) -> OpFormula:
        """silu(gate) * up: about five operations a column."""
        size = self.compute_dtype.num_bytes
        return OpFormula(
            flops=formula(tokens=5 * columns),
            bytes_read=formula(tokens=2 * columns * size),
            bytes_written=formula(tokens=columns * size),
        )

    def _reduce(self, op_id: str) -> list[PricedOp]:
        """All-reduce of a token's hidden values.

        Sent: 2 (p - 1) / p of the buffer, the least any algorithm can (Patarasuk and Yuan 2009);
        so the rate of `bytes_sent` is NCCL's bus bandwidth. Memory: the buffer is published once
        and every copy read.
        """
        ranks = self.partition.size
        if ranks == 1:
            return []
        hidden = self.spec.hidden_size
        buffer = hidden * self.compute_dtype.num_bytes
        priced = OpFormula(
            flops=formula(tokens=(ranks - 1) * hidden),
            bytes_read=formula(tokens=ranks * buffer),
            bytes_written=formula(tokens=2 * buffer),
            bytes_sent=formula(tokens=2 * (ranks - 1) / ranks * buffer),
        )
        return [(op_id, OpKind.REDUCE, priced)]

    def _sampling(self, local: int) -> list[PricedOp]:
        """The parts of sampling, one op on one rank.

        Every row's logits are read once for its largest ones, those of a row that reports
        log-probabilities a second time. Drawing by mass reads them once more: some 20 operations a
        logit, their sums written by chunks of 128 (`decoding/vocab_passes.c`; plain torch keeps
        what is between the operations in memory). Penalties, masks and biases are not counted: they
        touch few logits.
        """
        num_chunks = -(-local // 128)
        best = OpFormula(
            flops=formula(rows=local, logprob_rows=local),
            bytes_read=formula(rows=4 * local, logprob_rows=8 * local),
            bytes_written=formula(rows=8, candidates=8, logprob_rows=4 * local),
        )
        mass = OpFormula(
            flops=formula(full_rows=20 * local, logprob_rows=20 * local),
            bytes_read=formula(full_rows=4 * local, logprob_rows=4 * local),
            bytes_written=formula(full_rows=8 * num_chunks, logprob_rows=8 * num_chunks),
        )
        # The sums of 128 masses, and the masses of one chunk once more.
        chunk = OpFormula(bytes_read=formula(full_rows=8 * num_chunks + 128 * 4))
        last = OpFormula(bytes_read=formula(rows=8), bytes_written=formula(rows=8))
        if self.partition.size == 1:
            return [("sample", OpKind.SAMPLE, best + mass + chunk + last)]
        tokens = formula(full_rows=8, logprob_rows=8)
        return [
            ("sample.local", OpKind.SAMPLE, best),
            ("head.gather", OpKind.GATHER, self._gather(formula(rows=8, candidates=8))),
            ("sample.mass", OpKind.SAMPLE, mass),
            ("mass.gather", OpKind.GATHER, self._gather(tokens)),
            ("sample.search", OpKind.GATHER, OpFormula()),
            ("sample.draw", OpKind.SAMPLE, chunk),
            ("draw.gather", OpKind.GATHER, self._gather(tokens)),
            ("sample", OpKind.SAMPLE, last),
        ]

    def _gather(self, mine: Formula) -> OpFormula:
        """Everybody's part of so many bytes: read and sent once per other rank, and written as
        often as there are ranks."""
        ranks = self.partition.size
        return OpFormula(
            bytes_read=mine.times(ranks),
            bytes_written=mine.times(ranks),
            bytes_sent=mine.times(ranks - 1),
        )

    def _prompt_logprobs(self, local: int) -> OpFormula:
        """Final norm and head for prompt tokens, a few at a time, and the mass of each."""
        hidden, size = self.spec.hidden_size, self.compute_dtype.num_bytes
        ranks = self.partition.size
        sent = ranks - 1
        return OpFormula(
            flops=formula(prompt_rows=2 * hidden * local),
            bytes_read=formula(
                prompt_passes=(hidden * local + hidden) * size,
                prompt_rows=5 * hidden * size + 28 * local,
            ),
            bytes_written=formula(prompt_rows=4 * hidden * size + 28 * local),
            bytes_sent=formula(prompt_candidates=8 * sent, prompt_rows=8 * sent),
        )


def _share(amount: int, ranks: int) -> float:
    """One rank's even part, a whole number where it is one."""
    return amount / ranks if amount % ranks else amount // ranks
