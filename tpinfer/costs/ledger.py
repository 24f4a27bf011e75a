"""The cost ledger of one rank: every op of the program, priced once.

The ids are the program's, in its order. A step is priced in closed form: formulas of equal ops
are added up once, at construction.
"""

from functools import cached_property, reduce

from tpinfer.config.dtypes import DType
from tpinfer.config.kv_cache import kv_vector_bytes
from tpinfer.config.model import ModelSpec
from tpinfer.costs.decoder_ops import SHARED_KV_OPS, DecoderOps, PricedOp
from tpinfer.costs.ops import OpCost, OpFormula, OpKind, StepAggregates
from tpinfer.sharding.parameters import decoder_parameters
from tpinfer.sharding.partition import Partition


class CostLedger:
    """What a step costs on one rank."""

    def __init__(
        self,
        spec: ModelSpec,
        partition: Partition,
        rank: int,
        compute_dtype: DType,
        kv_dtype: DType,
    ) -> None:
        self.spec = spec
        self.partition = partition
        self.rank = rank
        self.compute_dtype = compute_dtype
        self.kv_dtype = kv_dtype
        ops = DecoderOps(spec, partition, rank, compute_dtype, kv_dtype)
        self._by_slides = {slides: ops.layer(slides) for slides in (False, True)}
        self._ends = ops.before_layers(), ops.behind_layers()
        self._num_sliding = sum(spec.window(i) is not None for i in range(spec.num_layers))
        self._program = self._walk()
        self._index = {op_id: i for i, (op_id, _, _) in enumerate(self._program)}
        self._step_formulas = self._sum_by_kind()

    def op_ids(self) -> tuple[str, ...]:
        """Ids in program order."""
        return tuple(op_id for op_id, _, _ in self._program)

    def kind(self, op_id: str) -> OpKind:
        """Kind of an op. Raises KeyError for an id the program lacks."""
        return self._program[self._index[op_id]][1]

    def ranks_met(self, op_id: str) -> range:
        """Ranks that wait for each other in an op, this one among them: all, those that share its
        KV head, or none."""
        if not self.kind(op_id).is_collective:
            return range(0)
        if op_id.endswith(SHARED_KV_OPS):
            return self.partition.kv_ranks(self.rank)
        return range(self.partition.size)

    def op_formula(self, op_id: str) -> OpFormula:
        """Formulas of an op. Equal ops of equal layers share one object."""
        return self._program[self._index[op_id]][2]

    def cost(self, op_id: str, aggregates: StepAggregates) -> OpCost:
        """Cost of one op in a step."""
        return self.op_formula(op_id).cost(aggregates)

    def step_cost(self, aggregates: StepAggregates) -> dict[OpKind, OpCost]:
        """Cost of a whole step by kind of op: some ten formulas, whatever the number of layers."""
        terms = aggregates.values()
        return {kind: priced.cost_at(terms) for kind, priced in self._step_formulas.items()}

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of parameters this rank holds."""
        parameters = decoder_parameters(self.spec, self.partition, self.compute_dtype)
        return sum(parameter.local_bytes(self.rank) for parameter in parameters)

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """Cache bytes of one token on a rank that holds it, scales and replicated KV heads
        included. Of `kv_group_size` ranks that share a head's blocks one holds it."""
        heads = self.partition.num_kv_heads(self.rank)
        vector = kv_vector_bytes(self.spec.head_dim, self.kv_dtype)
        return self.spec.num_layers * 2 * heads * vector

    def activation_bytes(self, max_tokens: int, max_rows: int) -> int:
        """Upper bound of what the ops of a step hold at once.

        Stream, delta, norm output; qkv with its rotated copy; attention output; MLP columns;
        logits of every rank with the gathered copy; where ranks share a KV head, the gathered
        queries twice and three forms of the partial attention.
        """
        spec, rank, size = self.spec, self.rank, self.compute_dtype.num_bytes
        query = self.partition.num_heads(rank) * spec.head_dim
        kv = self.partition.num_kv_heads(rank) * spec.head_dim
        columns = self.partition.mlp[rank][1] - self.partition.mlp[rank][0]
        per_token = 3 * spec.hidden_size + 2 * (query + 2 * kv) + 2 * query + 4 * columns
        shared = self.partition.kv_group_size
        if shared > 1:
            values = shared * self.partition.widest_heads(rank) * (spec.head_dim + 1)
            per_token += 2 * values + 3 * values * 4 // size
        return max_tokens * per_token * size + max_rows * spec.vocab_size * 4 * 3

    def step_working_set_bytes(self, aggregates: StepAggregates) -> int:
        """Bytes a step touches and the next one touches again: weights, and the context's keys
        and values as far as each layer looks back and this rank holds them."""
        layers, sliding = self.spec.num_layers, self._num_sliding
        attended = (layers - sliding) * aggregates.sk + sliding * aggregates.sk_window
        shared = self.partition.kv_group_size
        return self.weight_bytes_read + attended * (self.kv_bytes_per_token // layers) // shared

    @cached_property
    def weight_bytes_read(self) -> int:
        """Weight bytes of a step: all but an untied embedding, of which single rows are read."""
        if self.spec.tie_embeddings:
            return self.weight_bytes
        start, stop = self.partition.vocab[self.rank]
        embedding = (stop - start) * self.spec.hidden_size * self.compute_dtype.num_bytes
        return self.weight_bytes - embedding

    def _walk(self) -> list[PricedOp]:
        before, behind = self._ends
        program = list(before)
        for layer in range(self.spec.num_layers):
            slides = self.spec.window(layer) is not None
            program += [
                (f"layers.{layer}.{op}", kind, cost) for op, kind, cost in self._by_slides[slides]
            ]
        return program + behind

    def _sum_by_kind(self) -> dict[OpKind, OpFormula]:
        before, behind = self._ends
        counted = [(op, 1) for op in before + behind]
        num_full = self.spec.num_layers - self._num_sliding
        for slides, count in ((False, num_full), (True, self._num_sliding)):
            counted += [(op, count) for op in self._by_slides[slides] if count]
        kinds = dict.fromkeys(op[1] for op, _ in counted)
        return {
            kind: reduce(
                OpFormula.__add__, [op[2].times(count) for op, count in counted if op[1] is kind]
            )
            for kind in kinds
        }
