"""The cost formulas against the same things counted one by one on tiny shapes."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.cost_cases import Step, ledgers, linear_weight, specs, steps, weights
from tests.pure.models import tiny
from tpinfer.config.dtypes import DType
from tpinfer.config.model import ModelSpec
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import TERMS, Formula, OpCost, OpKind, aggregate, formula
from tpinfer.sharding.partition import partition_model

LINEARS = ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")
FIELDS = ("flops", "bytes_read", "bytes_written", "bytes_sent")


def costs(ledger: CostLedger, step: Step) -> dict[str, OpCost]:
    """Cost of each op of a step."""
    sums = step.aggregates(ledger.spec.sliding_window)
    return {op: ledger.cost(op, sums) for op in ledger.op_ids()}


def ops_of(ledger: CostLedger, *kinds: OpKind) -> list[str]:
    return [op for op in ledger.op_ids() if ledger.kind(op) in kinds]


def total(found: Sequence[OpCost], field: str) -> int:
    return sum(getattr(cost, field) for cost in found)


@given(ledgers(), steps())
def test_a_step_costs_the_sum_of_its_ops(group: list[CostLedger], step: Step) -> None:
    """Whole numbers agree exactly; `bytes_sent` has thirds, rounded once or once an op."""
    for ledger in group:
        by_op = costs(ledger, step)
        by_kind = ledger.step_cost(step.aggregates(ledger.spec.sliding_window))
        assert set(by_kind) == {ledger.kind(op) for op in by_op}
        for kind, whole in by_kind.items():
            parts = [by_op[op] for op in ops_of(ledger, kind)]
            for field in ("flops", "bytes_read", "bytes_written"):
                assert getattr(whole, field) == total(parts, field), (kind, field)
            assert abs(whole.bytes_sent - total(parts, "bytes_sent")) <= len(parts) / 2 + 0.5


@given(ledgers(), steps())
def test_no_cost_is_negative(group: list[CostLedger], step: Step) -> None:
    for op, cost in costs(group[-1], step).items():
        assert min(getattr(cost, field) for field in FIELDS) >= 0, op


@given(ledgers(), steps())
def test_linears_cost_what_their_local_weight_says(group: list[CostLedger], step: Step) -> None:
    for ledger in group:
        size = ledger.compute_dtype.num_bytes
        for op in ops_of(ledger, OpKind.LINEAR):
            (outer, inner), num_bias = linear_weight(ledger, op)
            num_tokens = step.num_rows if op == "head" else step.num_tokens
            cost = costs(ledger, step)[op]
            assert cost.flops == num_tokens * (2 * outer * inner + num_bias), op
            stored = outer * inner + num_bias
            assert cost.bytes_read == (stored + num_tokens * inner) * size, op
            written = 4 if op == "head" else size  # logits leave the head in float32
            assert cost.bytes_written == num_tokens * outer * written, op


@given(ledgers(), steps())
def test_attention_counts_the_pairs_and_keys_it_sees(group: list[CostLedger], step: Step) -> None:
    for ledger in group:
        spec, partition, rank = ledger.spec, ledger.partition, ledger.rank
        query = partition.num_heads(rank) * spec.head_dim
        per_key = 2 * partition.num_kv_heads(rank) * spec.head_dim * ledger.kv_dtype.num_bytes
        by_op = costs(ledger, step)
        for layer in range(spec.num_layers):
            cost = by_op[f"layers.{layer}.attn.core"]
            num_pairs, num_keys = step.attended(spec.window(layer))
            vectors = step.num_tokens * query * ledger.compute_dtype.num_bytes
            assert cost.flops == num_pairs * query * 4, "two matmuls, a multiply and an add each"
            assert cost.bytes_read == num_keys * per_key + vectors
            assert cost.bytes_written == vectors


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 30)), max_size=4),
    st.none() | st.integers(1, 40),
)
def test_window_sums_equal_those_of_a_mask(
    lengths: list[tuple[int, int]], window: int | None
) -> None:
    step = Step(tuple((sq, sq + before) for sq, before in lengths), 0, True)
    sums = step.aggregates(window)
    assert (sums.pairs_window, sums.sk_window) == step.attended(window)
    full_pairs = sums.sqsk - (sums.sqsq - sums.tokens) // 2
    assert full_pairs == step.attended(None)[0]


@given(ledgers(), steps())
def test_weights_are_read_once_a_step(group: list[CostLedger], step: Step) -> None:
    """The constant terms of all ops are the weights that a step reads, no more and no less."""
    for ledger in group:
        formulas = [ledger.op_formula(op) for op in ledger.op_ids()]
        once = sum(f.bytes_read.to_json().get("one", 0) for f in formulas)
        assert once == ledger.weight_bytes_read
        assert not any(f.flops.to_json().get("one") for f in formulas)
        rows, hidden = weights(ledger)["embed.weight"]
        embedding = rows * hidden * ledger.compute_dtype.num_bytes
        unread = 0 if ledger.spec.tie_embeddings else embedding
        assert ledger.weight_bytes == ledger.weight_bytes_read + unread


@given(ledgers(), steps())
def test_ranks_together_do_the_work_of_one(group: list[CostLedger], step: Step) -> None:
    """FLOPs of linears and attention add up to the unsharded ones; a KV head that two ranks hold
    is projected, cached and read on both."""
    first = group[0]
    spec, partition = first.spec, first.partition
    alone = CostLedger(spec, partition_model(spec, 1), 0, first.compute_dtype, first.kv_dtype)
    whole, parts = costs(alone, step), [costs(ledger, step) for ledger in group]
    copies = partition.num_replicated_kv_heads()
    assert copies == sum(map(partition.num_kv_heads, range(partition.size))) - spec.num_kv_heads
    bias = 1 if spec.qkv_bias else 0
    for op in ops_of(alone, OpKind.LINEAR, OpKind.ATTENTION):
        extra = 0
        if op.endswith("attn.qkv"):
            extra = step.num_tokens * 2 * copies * spec.head_dim * (2 * spec.hidden_size + bias)
        found = total([part[op] for part in parts], "flops")
        assert found == whole[op].flops + extra, op
    stored = sum(ledger.kv_bytes_per_token for ledger in group)
    per_head = 2 * spec.num_layers * spec.head_dim * first.kv_dtype.num_bytes
    assert stored == alone.kv_bytes_per_token + copies * per_head


@given(specs(), st.integers(2, 4))
def test_replicated_kv_heads_count_once_a_rank(spec: ModelSpec, size: int) -> None:
    size = min(size, spec.num_heads)
    partition = partition_model(spec, size)
    for rank in range(size):
        first, last = partition.heads[rank][0], partition.heads[rank][1] - 1
        group = spec.num_heads // spec.num_kv_heads
        held = {head // group for head in range(first, last + 1)}
        ledger = CostLedger(spec, partition, rank, DType.FLOAT32, DType.BFLOAT16)
        assert ledger.kv_bytes_per_token == len(held) * 2 * spec.head_dim * 2 * spec.num_layers


def ring_bytes_sent(num_values: int, size: int, value_bytes: int) -> int:
    """Bytes that all ranks of a ring all-reduce send, chunk by chunk."""
    chunks = [num_values // size + (i < num_values % size) for i in range(size)]
    sent = 0
    for phase_steps in (size - 1, size - 1):  # reduce-scatter, then all-gather
        for hop in range(phase_steps):
            sent += sum(chunks[(rank - hop) % size] * value_bytes for rank in range(size))
    return sent


@given(ledgers(), steps())
def test_an_all_reduce_sends_what_a_ring_sends(group: list[CostLedger], step: Step) -> None:
    for ledger in group:
        size, hidden = ledger.partition.size, ledger.spec.hidden_size
        reduces = ops_of(ledger, OpKind.REDUCE)
        assert len(reduces) == (2 * ledger.spec.num_layers + 1 if size > 1 else 0)
        for op in reduces:
            cost = costs(ledger, step)[op]
            num_values = step.num_tokens * hidden
            everybody = ring_bytes_sent(num_values, size, ledger.compute_dtype.num_bytes)
            assert abs(size * cost.bytes_sent - everybody) <= size / 2
            assert cost.flops == (size - 1) * num_values, "every value takes p - 1 additions"


@given(ledgers(), steps())
def test_sampling_sends_eight_bytes_a_row_and_gather(group: list[CostLedger], step: Step) -> None:
    """A row travels as its likeliest key; one that is drawn also as its mass and as its token."""
    for ledger in group:
        peers = ledger.partition.size - 1
        gathers = ops_of(ledger, OpKind.GATHER)
        sent = {op: costs(ledger, step)[op].bytes_sent for op in gathers}
        drawn = 0 if step.is_greedy else 8 * step.num_rows * peers
        every = {"head.gather": 8 * step.num_rows * peers, "mass.gather": drawn,
                 "sample.search": 0, "draw.gather": drawn}  # fmt: skip
        assert sent == (every if peers else {})


@given(ledgers(), steps())
def test_only_collectives_send(group: list[CostLedger], step: Step) -> None:
    for ledger in group:
        for op, cost in costs(ledger, step).items():
            assert (cost.bytes_sent > 0) <= ledger.kind(op).is_collective


@given(ledgers(), steps())
def test_elementwise_ops_move_their_tensors(group: list[CostLedger], step: Step) -> None:
    for ledger in group:
        spec, size = ledger.spec, ledger.compute_dtype.num_bytes
        query = ledger.partition.num_heads(ledger.rank) * spec.head_dim
        kv = ledger.partition.num_kv_heads(ledger.rank) * spec.head_dim
        columns = weights(ledger)["layers.0.mlp.down.weight"][1]
        tokens, rows, by_op = step.num_tokens, step.num_rows, costs(ledger, step)
        cache = 2 * kv * ledger.kv_dtype.num_bytes
        norms = 2 * spec.head_dim if spec.qk_norm else 0
        moved = {
            "embed": tokens * (2 * spec.hidden_size * size + 8),
            "layers.0.attn.norm": (4 * tokens + 1) * spec.hidden_size * size,
            "layers.0.attn.rope": tokens * ((2 * query + 3 * kv + 2 * spec.head_dim) * size + cache)
            + norms * size,
            "layers.0.mlp.act": tokens * 3 * columns * size,
            "final_norm": (4 * rows + 1) * spec.hidden_size * size,
        }
        assert {op: by_op[op].bytes_moved for op in moved} == moved


@given(ledgers(), steps())
def test_the_working_set_is_weights_and_attended_context(
    group: list[CostLedger], step: Step
) -> None:
    for ledger in group:
        spec = ledger.spec
        heads = ledger.partition.num_kv_heads(ledger.rank)
        per_key = 2 * heads * spec.head_dim * ledger.kv_dtype.num_bytes
        keys = sum(step.attended(spec.window(layer))[1] for layer in range(spec.num_layers))
        found = ledger.step_working_set_bytes(step.aggregates(spec.sliding_window))
        assert found == ledger.weight_bytes_read + keys * per_key


@given(
    st.integers(1, 3),
    st.integers(2, 4),
    st.integers(1, 3),
    steps(),
    st.sampled_from(list(DType)[:5]),
)
def test_ranks_that_share_a_kv_head_do_the_work_of_one(
    num_kv_heads: int, ranks: int, per_rank: int, step: Step, kv: DType
) -> None:
    """Of `num_kv_heads` heads each is read by `ranks` ranks: together they read every key once, and
    multiply what one rank would."""
    size = num_kv_heads * ranks
    spec = tiny(num_heads=size * per_rank, num_kv_heads=num_kv_heads, head_dim=8)
    shared = partition_model(spec, size, None, "auto")
    assert shared.kv_group_size == ranks
    alone = CostLedger(spec, partition_model(spec, 1), 0, DType.FLOAT32, kv)
    op = "layers.0.attn.core"
    vector = 8 * kv.num_bytes + (4 if kv.num_bytes == 1 else 0)
    found = [costs(CostLedger(spec, shared, rank, DType.FLOAT32, kv), step) for rank in range(size)]
    pairs, keys = step.attended(None)
    scaling = 2 * keys * num_kv_heads * 8 if kv.num_bytes == 1 else 0
    expected = 4 * pairs * spec.num_heads * 8 + scaling
    assert costs(alone, step)[op].flops == expected
    assert abs(total([part[op] for part in found], "flops") - expected) <= size
    queries = step.num_tokens * spec.num_heads * 8 * 4 * ranks  # every rank of a group reads them
    read = total([part[op] for part in found], "bytes_read") - queries
    assert abs(read - 2 * keys * num_kv_heads * vector) <= size
    for part in found:
        gather, merge = part["layers.0.attn.gather_q"], part["layers.0.attn.merge"]
        assert gather.bytes_sent == (ranks - 1) * step.num_tokens * per_rank * 8 * 4
        assert merge.bytes_sent == (ranks - 1) * step.num_tokens * per_rank * 9 * 4


def test_a_scaled_cache_costs_its_scales() -> None:
    spec = tiny(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)
    plain, scaled = (
        CostLedger(spec, partition_model(spec, 1), 0, DType.FLOAT32, dtype)
        for dtype in (DType.FLOAT32, DType.INT8)
    )
    assert plain.kv_bytes_per_token == 2 * 2 * 8 * 4
    assert scaled.kv_bytes_per_token == 2 * 2 * (8 + 4)
    sums = aggregate([3], [10], 1)
    rope = "layers.0.attn.rope"
    saved = plain.cost(rope, sums).bytes_written - scaled.cost(rope, sums).bytes_written
    assert saved == 3 * (plain.kv_bytes_per_token - scaled.kv_bytes_per_token)


def test_the_program_of_one_rank_and_of_two() -> None:
    spec = tiny(num_layers=1)
    ids = {
        tp: CostLedger(spec, partition_model(spec, tp), 0, DType.FLOAT32, DType.FLOAT32).op_ids()
        for tp in (1, 2)
    }
    layer = ["attn.norm", "attn.qkv", "attn.rope", "attn.core", "attn.out"]
    layer += ["mlp.norm", "mlp.gate_up", "mlp.act", "mlp.down"]
    behind = ("final_norm", "head", "sample", "prompt_logprobs")
    assert ids[1] == ("embed", *(f"layers.0.{op}" for op in layer), *behind)
    only_sharded = [op for op in ids[2] if op not in ids[1]]
    assert only_sharded == ["embed.reduce", "layers.0.attn.reduce", "layers.0.mlp.reduce",
                            "sample.local", "head.gather", "sample.mass", "mass.gather",
                            "sample.search", "sample.draw", "draw.gather"]  # fmt: skip
    assert [op for op in ids[2] if op not in only_sharded] == list(ids[1])


def test_an_unknown_op_is_refused() -> None:
    spec = tiny()
    ledger = CostLedger(spec, partition_model(spec, 1), 0, DType.FLOAT32, DType.FLOAT32)
    with pytest.raises(KeyError, match=r"layers\.9"):
        ledger.kind("layers.9.attn.qkv")


factors = st.dictionaries(st.sampled_from(TERMS), st.integers(-9, 9), max_size=9)


@given(factors, factors, st.integers(0, 5), st.lists(st.integers(0, 99), min_size=13, max_size=13))
def test_formulas_are_linear(
    one: dict[str, int], other: dict[str, int], count: int, values: list[int]
) -> None:
    terms = [1, *values]
    a, b = formula(**one), formula(**other)
    assert a.value(terms) == sum(one.get(name, 0) * terms[i] for i, name in enumerate(TERMS))
    assert (a + b).value(terms) == a.value(terms) + b.value(terms)
    assert a.times(count).value(terms) == count * a.value(terms)
    assert a.to_json() == {name: one[name] for name in TERMS if one.get(name)}
    assert Formula().value(terms) == 0


def test_aggregates_of_a_step_with_a_prompt_and_a_decode() -> None:
    sums = aggregate([3, 1], [3, 8], num_logit_rows=2, num_full_rows=2, window=4)
    assert sums.values() == (1, 4, 2, 2, 11, 17, 10, 3 + 4, 6 + 4, 0, 0, 0, 0, 0)
    assert dict(zip(TERMS, sums.values(), strict=True))["sqsk"] == 3 * 3 + 1 * 8


def test_log_probabilities_of_prompts_are_counted_by_pass_of_the_head() -> None:
    sums = aggregate([70], [70], 1, 1, None, 3, 1, prompt_targets=[(69, 2), (1, 5)])
    assert (sums.candidates, sums.logprob_rows) == (3, 1)
    assert (sums.prompt_rows, sums.prompt_passes) == (70, 2)
    assert sums.prompt_candidates == 64 * (2 + 1) + 6 * (5 + 1)
    spec = tiny()
    for tp in (1, 2):
        ledger = CostLedger(spec, partition_model(spec, tp), 0, DType.FLOAT32, DType.FLOAT32)
        start, stop = ledger.partition.vocab[0]
        cost = ledger.cost("prompt_logprobs", sums)
        assert cost.flops == 70 * 2 * spec.hidden_size * (stop - start)
        weights = 2 * (stop - start + 1) * spec.hidden_size * 4
        assert cost.bytes_read == weights + 70 * (5 * spec.hidden_size * 4 + 28 * (stop - start))
        assert cost.bytes_sent == (tp - 1) * 8 * (sums.prompt_candidates + 70)
        assert ledger.cost("prompt_logprobs", aggregate([1], [9], 1)).bytes_moved == 0


def test_lengths_must_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        aggregate([1, 1], [4], 1)
