"""Tokens of a step by the ridge of the linears, bounded; the same for runtime and planner."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.planner_cases import machine, shape
from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.config.engine import DEFAULT_BATCHED_TOKENS
from tpinfer.config.topology_reader import load_topology
from tpinfer.costs.chunk import (
    BEYOND_FIXED,
    LEAST_TOKENS,
    MOST_OF_MEMORY,
    MOST_TOKENS,
    LinearFormat,
    choose_chunk,
    fixed_tokens,
)
from tpinfer.costs.ledger import CostLedger
from tpinfer.planner.placement import EngineSettings
from tpinfer.planner.precision import precision_named
from tpinfer.planner.predict import Planner
from tpinfer.planner.search import estimate_all
from tpinfer.planner.workload import Workload
from tpinfer.sharding.partition import partition_model

SPEC = shape("llama-3.1-8b")
LEDGER = CostLedger(SPEC, partition_model(SPEC, 1), 0, DType.BFLOAT16, DType.BFLOAT16)
WORK = Workload(64, 16, 8)


def ceilings(flops: float, bytes_per_s: float, capacity: float = 80e9) -> Ceilings:
    level = MemoryLevel("HBM", int(capacity), bytes_per_s)
    return Ceilings((level,), {DType.BFLOAT16: flops}, 1e-6, 0.0, float("inf"), "made up")


def test_the_ridge_is_that_of_the_roofline() -> None:
    # A weight of two bytes is two FLOPs a token: peak / bandwidth tokens, as good as exactly.
    at_once = replace(ceilings(800e12, 3e12), kernel_floor_s=0.0)
    assert fixed_tokens(LEDGER, at_once) == pytest.approx(800 / 3, rel=1e-6)
    ops = sum(not LEDGER.kind(op_id).is_collective for op_id in LEDGER.op_ids())
    per_token_s = 2 * 7e9 / 800e12  # about: layers of the 8 billion parameters
    more = fixed_tokens(LEDGER, ceilings(800e12, 3e12)) - 800 / 3
    assert more == pytest.approx(ops * 1e-6 / per_token_s, rel=0.05)


@pytest.mark.parametrize(
    ("flops", "rate", "tokens"),
    [(800e12, 3e12, 2048), (800e12, 1e12, 4096), (1e12, 1e12, 256), (9e15, 1e12, 8192)],
)
def test_four_ridges_as_a_power_of_two_within_bounds(
    flops: float, rate: float, tokens: int
) -> None:
    found = choose_chunk([LEDGER], [ceilings(flops, rate)], 256, 0.9)
    assert found.tokens == tokens
    assert f"multiplying {fixed_tokens(LEDGER, ceilings(flops, rate)):.0f} tokens" in found.reason


def test_activations_bound_it() -> None:
    tight = ceilings(9e15, 1e12, LEDGER.weight_bytes / 0.9 + 3e9)
    found = choose_chunk([LEDGER], [tight], 32, 0.9)
    assert LEAST_TOKENS < found.tokens < MOST_TOKENS
    assert "activations of 8192 would take" in found.reason


def test_without_ceilings_it_is_the_default() -> None:
    found = choose_chunk([LEDGER, LEDGER], [None, ceilings(1e12, 1e12)], 256, 0.9)
    assert found.tokens == DEFAULT_BATCHED_TOKENS and "no topology" in found.reason


@given(st.floats(1e9, 1e16), st.floats(1e9, 1e13), st.floats(20e9, 300e9), st.integers(1, 512))
def test_bounds_hold(flops: float, rate: float, capacity: float, rows: int) -> None:
    one = ceilings(flops, rate, capacity)
    found = choose_chunk([LEDGER], [one], rows, 0.9).tokens
    assert LEAST_TOKENS <= found <= MOST_TOKENS
    assert found.bit_count() == 1
    if found > LEAST_TOKENS:
        room = MOST_OF_MEMORY * (capacity * 0.9 - LEDGER.weight_bytes)
        assert LEDGER.activation_bytes(found, rows) <= room
        assert found < 2 * BEYOND_FIXED * fixed_tokens(LEDGER, one)
    slower = ceilings(flops, rate / 2, capacity)
    assert choose_chunk([LEDGER], [slower], rows, 0.9).tokens >= found


def test_all_ranks_of_unequal_devices_take_the_least() -> None:
    fast, slow = ceilings(800e12, 1e12), ceilings(100e12, 1e12)
    both = choose_chunk([LEDGER, LEDGER], [fast, slow], 256, 0.9)
    assert both == choose_chunk([LEDGER], [slow], 256, 0.9)


def test_the_plan_takes_what_the_runtime_takes() -> None:
    topology = machine("dgx-h100")
    planner = Planner(SPEC, topology, precision_named("bf16"), WORK)
    for tp in (1, 2):
        partition = partition_model(SPEC, tp)
        ledgers = [
            CostLedger(SPEC, partition, rank, DType.BFLOAT16, DType.BFLOAT16) for rank in range(tp)
        ]
        rates = [topology.ceilings_of_rank(rank, tp) for rank in range(tp)]
        wanted = choose_chunk(ledgers, rates, 64, 0.9)
        assert planned(planner, tp) == wanted.tokens
    assert planned(planner, 64) == DEFAULT_BATCHED_TOKENS, "too few devices"
    laptop = load_topology("cpu-laptop")
    assert planned(Planner(SPEC, laptop, precision_named("fp32"), WORK), 2) == LEAST_TOKENS


def planned(planner: Planner, tp: int) -> int:
    """Tokens of a step on so many ranks."""
    return planner.with_chunk((tp, 1, 1), EngineSettings(64)).max_num_batched_tokens


def test_quantized_linears_leave_room_and_are_read_sooner() -> None:
    large, topology = shape("llama-3.1-70b"), machine("hgx-h200")
    wide, narrow = (
        planned(Planner(large, topology, precision_named(name), WORK), 1)
        for name in ("bf16", "fp8")
    )
    # 141 GB of bfloat16 weights leave an H200 nothing; 73 GB of float8 some 50 GB.
    assert wide == LEAST_TOKENS < narrow
    one = replace(ceilings(800e12, 3e12), kernel_floor_s=0.0)
    stored = LinearFormat(1.0, DType.INT8)
    assert fixed_tokens(LEDGER, one, stored) == pytest.approx(fixed_tokens(LEDGER, one) / 2)
    twice = replace(one, flops_per_s={**one.flops_per_s, DType.INT8: 1600e12})
    assert fixed_tokens(LEDGER, twice, stored) == pytest.approx(fixed_tokens(LEDGER, one))
    same = LinearFormat(2.0, DType.BFLOAT16)
    assert choose_chunk([LEDGER], [one], 64, 0.9, same) == choose_chunk([LEDGER], [one], 64, 0.9)


def test_a_search_gives_each_placement_the_chunk_the_runtime_would_choose_there() -> None:
    planner = Planner(SPEC, machine("dgx-h100"), precision_named("bf16"), WORK)
    named = EngineSettings(8, 77)
    estimates, _ = estimate_all(planner, named, (False, True))
    for tp in (1, 8):
        tried = {p.settings.max_num_batched_tokens for p, _ in estimates if p.tp == tp}
        assert (
            planner.with_chunk((tp, 1, 1), named).max_num_batched_tokens in tried
            and 77 not in tried
        )
    estimates, _ = estimate_all(planner, named, (False, False))
    assert {plan.settings.max_num_batched_tokens for plan, _ in estimates} == {77}
