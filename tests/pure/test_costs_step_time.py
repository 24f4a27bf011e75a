"""The predicted time of a step: the same as every op priced by itself, and what a scheduler may
ask."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pure.cost_cases import Step, ledgers, steps
from tests.pure.models import tiny
from tests.traces.cpu_ranks import CPU_CEILINGS
from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.costs.bound import classify
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import StepAggregates, aggregate
from tpinfer.costs.step_time import StepSums, StepTime
from tpinfer.sharding.partition import partition_model

LEVELS = st.tuples(st.integers(1, 200_000), st.floats(1e6, 1e12))


@st.composite
def ceilings(draw: st.DrawFn) -> Ceilings:
    """Two levels of memory and any rates."""
    cache, main = draw(LEVELS), draw(LEVELS)
    return Ceilings(
        memory=(MemoryLevel("L3", *cache), MemoryLevel("DRAM", 1 << 40, main[1])),
        flops_per_s={DType.FLOAT32: draw(st.floats(1e6, 1e13))},
        kernel_floor_s=draw(st.sampled_from([1e-9, 1e-6, 1e-4])),
        collective_latency_s=draw(st.sampled_from([0.0, 1e-6])),
        collective_bytes_per_s=draw(st.sampled_from([1e6, 1e9, float("inf")])),
        origin="drawn",
    )


def priced_one_by_one(ledger: CostLedger, found: Ceilings, sums: StepAggregates) -> int:
    """The floors of all ops, each rounded to ns."""
    level = found.memory_level(ledger.step_working_set_bytes(sums))
    return sum(
        classify(
            ledger.kind(op), ledger.cost(op, sums), ledger.compute_dtype, level, found
        ).floor_ns
        for op in ledger.op_ids()
    )


@settings(deadline=None)
@given(ledgers(), ceilings(), steps())
def test_the_closed_form_is_the_sum_over_the_ops(
    group: list[CostLedger], found: Ceilings, step: Step
) -> None:
    for ledger in group:
        sums = step.aggregates(ledger.spec.sliding_window)
        time = StepTime(ledger, found, 16, 1e9)
        # Each op's bytes, FLOPs and time are rounded by themselves.
        slowest = max(1 / found.memory[0].bytes_per_s, 1 / found.memory[1].bytes_per_s)
        slowest = max(slowest, 1 / found.flops_per_s[DType.FLOAT32])
        slack = len(ledger.op_ids()) * (1 + 2e9 * max(slowest, 1 / found.collective_bytes_per_s))
        expected = priced_one_by_one(ledger, found, sums)
        assert abs(time.step_ns(sums) - expected) <= slack + 1e-9 * expected


@given(steps(), st.none() | st.integers(1, 9), st.lists(st.integers(1, 30), max_size=5))
def test_sums_added_one_by_one_are_the_sums_of_the_step(
    step: Step, window: int | None, decodes: list[int]
) -> None:
    sums = StepSums(window)
    sums.add_decodes(decodes, full_rows=len(decodes))
    *others, last = step.sequences
    for sq, sk in others:
        sums.add(sq, sk, 1, 0)
    expected = Step((*[(1, sk) for sk in decodes], *step.sequences), 0, True).aggregates(window)
    found = sums.with_one(*last, 1, 1)
    sums.add(*last, 1, 1)
    for name, value in expected.named().items():
        if name not in ("rows", "full_rows") and hasattr(sums, name):
            assert getattr(sums, name) == getattr(found, name) == value, name
    assert sums.rows == found.rows == len(decodes) + len(step.sequences)
    assert sums.full_rows == found.full_rows == len(decodes) + 1


@settings(deadline=None)
@given(ledgers(), ceilings(), steps(), st.integers(1, 40))
def test_more_tokens_never_take_less(
    group: list[CostLedger], found: Ceilings, step: Step, count: int
) -> None:
    """What the search for the largest chunk relies on."""
    found_faster = found.memory[0].bytes_per_s >= found.memory[1].bytes_per_s
    ledger, sums = group[0], StepSums(group[0].spec.sliding_window)
    for sq, sk in step.sequences:
        sums.add(sq, sk, 0, 0)
    time = StepTime(ledger, found, 16, 1e9)
    if found_faster:  # as caches are
        fewer = time.step_ns(sums.with_one(count, count, 0, 0))
        assert fewer <= time.step_ns(sums.with_one(count + 1, count + 1, 0, 0))
    assert time.recompute_ns(count) > 0
    assert time.swap_ns(3) == round(2e9 * 3 * 16 * ledger.kv_bytes_per_token / 1e9)


@pytest.mark.parametrize(
    ("rows", "full_rows", "num_gathers"),
    [(0, 0, 0), (3, 0, 1), (3, 1, 3)],
    ids=["in the middle of a prompt", "greedy", "one row by mass"],
)
def test_a_step_pays_for_the_collectives_that_take_place(
    rows: int, full_rows: int, num_gathers: int
) -> None:
    """Greedy rows send their likeliest keys and no more, although the program has other gathers."""
    spec = tiny()
    ledger = CostLedger(spec, partition_model(spec, 2), 0, DType.FLOAT32, DType.FLOAT32)
    sums = aggregate([1, 1, 1], [5, 6, 7], rows, full_rows)
    slow, slower = (
        StepTime(ledger, replace(CPU_CEILINGS, collective_latency_s=latency_s), 16, 1e9)
        for latency_s in (1e-3, 2e-3)
    )
    num_reduces = 1 + 2 * spec.num_layers
    added_ns = slower.step_ns(sums) - slow.step_ns(sums)
    assert added_ns == pytest.approx(1e6 * (num_reduces + num_gathers), abs=2)


def test_ranks_that_share_a_kv_head_move_blocks_together() -> None:
    """Each its part of them, at the same time."""
    spec = tiny(num_heads=8, num_kv_heads=2)
    swaps = []
    for kv_layout in ("replicated", "auto"):
        partition = partition_model(spec, 8, None, kv_layout)
        ledger = CostLedger(spec, partition, 0, DType.FLOAT32, DType.FLOAT32)
        swaps.append(StepTime(ledger, CPU_CEILINGS, 16, 1e9).swap_ns(100))
    assert swaps[0] == 4 * swaps[1] > 0
