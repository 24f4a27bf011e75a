"""The scheduler on a modelled clock: requests are conserved, times add up, and the closed form says
nearly the same."""

import math
from dataclasses import replace
from itertools import product
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pure.planner_cases import FlatPrices, limits
from tpinfer.config.errors import ConfigError
from tpinfer.planner.estimate import Estimator
from tpinfer.planner.outcome import Outcome, outcome_of
from tpinfer.planner.simulate import Run, settled_requests, simulate
from tpinfer.planner.workload import Slo, Workload, parse_slo

PRICES = FlatPrices()
workloads = st.builds(
    lambda length, output, arrivals, seed: Workload(length, output, *arrivals, seed=seed),
    st.integers(1, 600),
    st.integers(1, 40),
    st.one_of(
        st.integers(1, 40).map(lambda count: (count, None)),
        st.floats(1.0, 2000.0).map(lambda rate: (None, rate)),
    ),
    st.integers(0, 5),
)


def run(work: Workload, num_requests: int | None = None, **changes: int) -> Run:
    return simulate(PRICES, limits(**changes), work, num_requests)


@settings(max_examples=60, deadline=None)
@given(work=workloads, count=st.integers(1, 50), num_blocks=st.integers(45, 400))
def test_requests_and_tokens_are_conserved(work: Workload, count: int, num_blocks: int) -> None:
    """`simulate` itself ends with the scheduler's own audit at rest."""
    found = run(work, count, num_blocks=num_blocks)
    assert len(found.requests) == count
    assert sum(found.tokens) == count * work.output_len
    for one in found.requests:
        assert 0 <= one.arrived_s <= one.started_s < one.first_token_s <= one.ended_s
        assert one.first_step <= one.first_token_step <= one.last_step
    assert all(a < b for a, b in zip(found.ends_s, found.ends_s[1:], strict=False))


@settings(max_examples=60, deadline=None)
@given(work=workloads, num_blocks=st.integers(45, 400))
def test_splits_sum_to_their_totals(work: Workload, num_blocks: int) -> None:
    found = outcome_of(run(work, 30, num_blocks=num_blocks))
    assert math.isclose(found.ttft_split.total, found.ttft.mean, rel_tol=1e-6)
    assert math.isclose(found.tpot_split.total, found.tpot.mean, rel_tol=1e-6, abs_tol=1e-12)
    assert found.tpot_split.queue == 0
    assert list(found.ttft.percentiles) == sorted(found.ttft.percentiles)


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    ends = [run(Workload(64, 8, rate=100.0, seed=seed), 50).ends_s for seed in (1, 1, 2)]
    assert ends[0] == ends[1] != ends[2]


def test_arrivals_come_at_their_rate() -> None:
    found = run(Workload(8, 2, rate=50.0), 4000)
    assert found.requests[-1].arrived_s == pytest.approx(4000 / 50, rel=0.05)


def test_a_closed_loop_keeps_its_number_in_flight() -> None:
    found = run(Workload(64, 8, 6), 60)
    moments = [(one.arrived_s, 1) for one in found.requests]
    moments += [(one.ended_s, -1) for one in found.requests]
    in_flight = most = 0
    for _, change in sorted(moments):
        in_flight += change
        most = max(most, in_flight)
    assert most == 6


def test_one_alone_takes_its_steps_and_nothing_else() -> None:
    found = outcome_of(run(Workload(512, 11, 1), 4))
    # 512 tokens are two chunks of 256; each step 1.1 ms and 1 us a token.
    assert found.ttft.mean == pytest.approx(2 * 1.1e-3 + 512e-6)
    assert found.tpot.mean == pytest.approx(1.1e-3 + 1e-6)
    assert found.ttft_split.queue == 0


def test_waiting_for_a_row_is_queue_and_named() -> None:
    found = outcome_of(run(Workload(16, 16, 32), max_num_seqs=4))
    assert found.ttft_split.queue > 5 * (found.ttft.mean - found.ttft_split.queue)
    assert found.short_of_rows > 0.9 and found.short_of_kv == 0


def test_waiting_for_blocks_is_told_apart() -> None:
    found = outcome_of(run(Workload(64, 64, 16), num_blocks=24))
    assert found.short_of_kv > 0.5 and found.short_of_rows == 0
    assert found.num_running < 6


def test_a_preempted_request_still_ends_and_is_counted() -> None:
    found = outcome_of(run(Workload(16, 200, 8), num_blocks=40))
    assert found.num_preemptions > 0


def test_a_request_that_could_never_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="KV blocks"):
        run(Workload(640, 64, 1), num_blocks=4)


def test_slower_steps_take_longer_in_proportion() -> None:
    work = Workload(64, 16, 8)
    one, two = (
        outcome_of(simulate(PRICES, limits(), work, 40, scale=scale)) for scale in (1.0, 2.0)
    )
    assert two.tpot.mean == pytest.approx(2 * one.tpot.mean)
    assert two.output_tokens_per_s == pytest.approx(one.output_tokens_per_s / 2)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(16, 400), output=st.integers(16, 100), concurrency=st.integers(1, 16),
    budget=st.sampled_from([128, 256, 1024]),
)  # fmt: skip
def test_the_closed_form_is_near_the_simulation(
    length: int, output: int, concurrency: int, budget: int
) -> None:
    room = limits(max_num_batched_tokens=budget)
    work = Workload(length, output, concurrency)
    found = outcome_of(simulate(PRICES, room, work, 10 * concurrency))
    guess = Estimator(PRICES, room, work, None).estimate()
    assert guess.tpot_s == pytest.approx(found.tpot.mean, rel=0.12)
    assert guess.output_tokens_per_s == pytest.approx(found.output_tokens_per_s, rel=0.08)


@pytest.mark.parametrize("budget", [256, 1024, 4096])
def test_the_closed_form_says_what_the_simulation_says(budget: int) -> None:
    """A prompt is paid once: as a first token's time, or inside the steps of the others."""
    room = limits(max_num_batched_tokens=budget, max_num_seqs=64, num_blocks=40_000)
    tpot, rates = [], []
    for concurrency, length, output in product((1, 4, 16, 64), (32, 512, 2048), (16, 128)):
        work = Workload(length, output, concurrency)
        found = outcome_of(simulate(PRICES, room, work))
        guess = Estimator(PRICES, room, work, None).estimate()
        tpot.append(abs(guess.tpot_s / found.tpot.mean - 1))
        rates.append(abs(guess.output_tokens_per_s / found.output_tokens_per_s - 1))
    assert mean(tpot) < 0.01 and mean(rates) < 0.01
    assert max(tpot) < 0.12 and max(rates) < 0.05


def poisson(rate: float) -> tuple[Outcome, bool]:
    work = Workload(64, 32, rate=rate)
    guess = Estimator(PRICES, limits(), work, None).estimate()
    return outcome_of(run(work, 600)), guess.keeps_up


def test_more_arrivals_than_are_served_are_noticed() -> None:
    (calm, keeps_up), (busy, drowns) = poisson(20.0), poisson(2000.0)
    assert keeps_up and not drowns
    assert calm.ttft.mean < 0.005 < busy.ttft.mean
    assert calm.requests_per_s == pytest.approx(20.0, rel=0.15)


def test_enough_requests_to_settle() -> None:
    assert settled_requests(Workload(1, 1, 100)) == 400
    assert settled_requests(Workload(1, 1, 1)) == 8
    assert settled_requests(Workload(1, 1, rate=1.0)) == 400


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 1, 1), "--input-len 0 must be a whole number from 1"),
        ((1, 0, 1), "--output-len 0"),
        ((1, 1, 0), "--concurrency 0"),
        ((1, 1, None, 0.0), "--rate 0 must be above 0"),
        ((1, 1, None, math.inf), "--rate inf"),
        ((1, 1, None, math.nan), "--rate nan"),
        ((1, 1), "give one of --concurrency C"),
        ((1, 1, 4, 2.0), "give one of --concurrency C"),
        ((10**9, 1, 1), "--input-len 1000000000"),
    ],
)
def test_workloads_that_cannot_be(arguments: tuple[int, ...], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Workload(*arguments)
    assert words in str(raised.value)


def test_lanes_share_the_work() -> None:
    work = Workload(10, 10, 10)
    assert work.lane(4).concurrency == 3 and work.num_busy_lanes(4) == pytest.approx(10 / 3)
    assert work.lane(20).concurrency == 1 and work.num_busy_lanes(20) == 10
    assert replace(work, concurrency=None, rate=8.0).lane(4).rate == 2.0


def test_promises() -> None:
    slo = parse_slo("ttft=500ms, tpot=30ms")
    assert slo == Slo(0.5, 0.03)
    assert slo.misses(0.6, 0.02) == ("ttft",) and slo.misses(0.5, 0.03) == ()
    assert parse_slo("tpot=1s") == Slo(None, 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is not a promise"),
        ("e2e=1s", "'e2e=1s' is not a promise; write ttft=500ms,tpot=30ms"),
        ("ttft=1s,ttft=2s", "each at most once"),
        ("ttft=500", "'500' has no unit"),
        ("ttft=-1s", "must be above 0"),
        ("ttft", "is not a promise"),
    ],
)
def test_promises_that_say_nothing(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_slo(text)
    assert words in str(raised.value)


def test_a_cached_prefix_is_not_computed_again() -> None:
    room = limits(max_num_batched_tokens=512, num_blocks=2000)
    cached = replace(room, prefix_caching=True)
    cold = Workload(512, 32, 8)
    warm = replace(cold, prefix_hit=0.75)
    found = outcome_of(simulate(PRICES, cached, warm, 80))
    full = outcome_of(simulate(PRICES, room, cold, 80))
    assert found.ttft.mean < 0.6 * full.ttft.mean
    assert found.output_tokens_per_s > full.output_tokens_per_s
    guess = Estimator(PRICES, cached, warm, None).estimate()
    assert guess.tpot_s == pytest.approx(found.tpot.mean, rel=0.05)
    assert guess.output_tokens_per_s == pytest.approx(found.output_tokens_per_s, rel=0.05)


def test_of_a_prompt_whole_blocks_are_cached_and_never_its_last_token() -> None:
    counts = [
        Workload(64, 8, 1, prefix_hit=share).num_cached(16) for share in (0, 0.2, 0.25, 0.5, 1)
    ]
    assert counts == [0, 0, 16, 32, 48]
    with pytest.raises(ConfigError, match=r"--prefix-hit 1\.5 must be a share"):
        Workload(64, 8, 1, prefix_hit=1.5)


def test_shared_blocks_leave_room_for_more() -> None:
    tight = limits(num_blocks=60, max_num_seqs=64)
    rates = [
        Estimator(PRICES, tight, Workload(256, 32, 32, prefix_hit=share), None)
        .estimate()
        .num_running
        for share in (0.0, 0.75)
    ]
    assert rates[1] > 1.5 * rates[0]
