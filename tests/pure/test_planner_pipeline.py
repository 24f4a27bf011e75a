"""Pipelines: batches that follow each other through the stages, and what they wait for."""

from dataclasses import replace
from itertools import product
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pure.planner_cases import FlatPrices, limits, machine, planner, shape
from tpinfer.config.topology import Placement
from tpinfer.costs.ops import aggregate
from tpinfer.planner.estimate import Estimator
from tpinfer.planner.outcome import Outcome, outcome_of
from tpinfer.planner.placement import EngineSettings
from tpinfer.planner.precision import precision_named
from tpinfer.planner.simulate import simulate, simulate_stages
from tpinfer.planner.step_model import StepModel, step_model
from tpinfer.planner.workload import Workload

PRICES = FlatPrices()
SETTINGS = EngineSettings(64)


def staged(
    num_layers: int, pp: int, num_busy: int | None = None, vocab_size: int = 128_256
) -> StepModel:
    spec = replace(shape("llama-3.1-8b"), num_layers=num_layers, vocab_size=vocab_size)
    placement = Placement(tp=1, pp=pp)
    return step_model(spec, machine(), placement, precision_named("bf16"), None, num_busy)


@settings(max_examples=30, deadline=None)
@given(
    stages=st.integers(1, 4), length=st.integers(1, 400), output=st.integers(1, 20),
    concurrency=st.integers(1, 12),
)  # fmt: skip
def test_every_batch_is_served_and_its_times_add_up(
    stages: int, length: int, output: int, concurrency: int
) -> None:
    work = Workload(length, output, concurrency)
    runs = simulate_stages(PRICES, limits(), work, stages, 20)
    assert len(runs) == stages
    for run in runs:
        assert sum(run.tokens) == 20 * output
        assert all(a < b for a, b in zip(run.ends_s, run.ends_s[1:], strict=False))
    found = outcome_of(*runs)
    assert found.tpot_split.total == pytest.approx(found.tpot.mean, abs=1e-12)
    assert found.ttft_split.total == pytest.approx(found.ttft.mean)


def test_one_stage_is_the_engine_alone() -> None:
    work = Workload(100, 20, rate=50.0)
    alone, (staged_run,) = (
        simulate(PRICES, limits(), work),
        simulate_stages(PRICES, limits(), work, 1),
    )
    assert alone.ends_s == staged_run.ends_s


def by_chance(stages: int) -> Outcome:
    work = Workload(200, 30, rate=60.0)
    return outcome_of(*simulate_stages(FlatPrices(1e-3, 2e-5), limits(), work, stages, 300))


def test_a_batch_with_prompts_holds_up_those_behind_it() -> None:
    one, four = by_chance(1), by_chance(4)
    assert one.tpot_split.communication == 0 < four.tpot_split.communication
    assert four.tpot.mean > 1.2 * one.tpot.mean


@pytest.mark.parametrize("stages", [2, 4])
def test_the_closed_form_of_a_pipeline_is_near_the_simulation(stages: int) -> None:
    errors, model = [], staged(32, stages)
    for concurrency, length, output in product((4, 16), (128, 1024), (32, 96)):
        work = Workload(length, output, concurrency)
        room = limits(max_num_batched_tokens=1024, num_blocks=20_000)
        found = outcome_of(*simulate_stages(model, room, work, stages))
        guess = Estimator(model, room, work, None, stages).estimate()
        errors.append(abs(guess.tpot_s / found.tpot.mean - 1))
    assert mean(errors) < 0.03 and max(errors) < 0.1


def test_bubbles_are_in_the_closed_form_of_arrivals_by_chance() -> None:
    room, prices = limits(), FlatPrices(1e-3, 2e-5)
    one, four = (
        Estimator(prices, room, Workload(200, 30, rate=60.0), None, stages).estimate()
        for stages in (1, 4)
    )
    assert four.tpot_split.communication > one.tpot_split.communication == 0
    assert four.tpot_s == pytest.approx(by_chance(4).tpot.mean, rel=0.2)


def test_stages_of_unequal_length_wait_for_the_longest() -> None:
    sums = aggregate([1] * 8, [500] * 8, 8)
    even, uneven = staged(8, 4, vocab_size=64), staged(9, 4, vocab_size=64)
    per_layer = even.step(sums).memory / 8
    grown = uneven.step(sums).total - even.step(sums).total
    assert grown > 3 * per_layer, "one layer more is paid in all four stages"
    lone = staged(9, 4, num_busy=1, vocab_size=64)
    assert lone.step(sums).communication < uneven.step(sums).communication
    assert lone.step(sums).memory == uneven.step(sums).memory


def test_the_head_makes_the_last_stage_the_longest() -> None:
    sums = aggregate([1] * 8, [500] * 8, 8)
    waits = [staged(32, 4, vocab_size=size).step(sums).communication for size in (64, 128_256)]
    assert waits[1] > waits[0] + 1e-3  # a gigabyte of head, three stages


def test_a_plan_of_stages_gives_more_tokens_and_no_faster_ones() -> None:
    made = planner("llama-3.1-70b", work=Workload(256, 32, 64))
    two, four = (made.simulate(made.fit((2, pp, 1), SETTINGS), SETTINGS) for pp in (1, 4))
    assert two.output_tokens_per_s and four.output_tokens_per_s
    assert four.output_tokens_per_s > 1.3 * two.output_tokens_per_s
    assert four.tpot_split.communication > two.tpot_split.communication


def test_stages_choose_their_own_chunk() -> None:
    """70B in bfloat16 leaves one H200 no room for activations; half of its layers does."""
    made = planner("llama-3.1-70b", topology=machine("hgx-h200"))
    one, two = (made.with_chunk((1, pp, 1), SETTINGS).max_num_batched_tokens for pp in (1, 2))
    assert one < two
