"""What a search keeps: nobody beats what is called unbeaten, the best comes first, and what is told
of a plan adds up."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pure.planner_cases import SETTINGS, four_hosts, machine, made_up, planner
from tpinfer.config.topology_reader import load_topology
from tpinfer.planner.outcome import as_words
from tpinfer.planner.pictures import PrefillLaw, prefill_law, prefill_s, roofline, scaling
from tpinfer.planner.placement import EngineSettings
from tpinfer.planner.plan import Plan
from tpinfer.planner.search import (
    MOST_SIMULATED,
    Found,
    estimate_all,
    fixed,
    merit,
    pareto,
    search,
    shortlist,
)
from tpinfer.planner.simulate import settled_requests
from tpinfer.planner.workload import Slo, Workload

plans = st.builds(
    lambda tp, dp, tpot, ttft, rate: made_up(tp, dp, tpot, ttft, rate),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.floats(1e-3, 1.0),
    st.floats(1e-3, 1.0),
    st.floats(1.0, 1e4),
)


def goals(plan: Plan) -> tuple[float, ...]:
    assert plan.tpot_s and plan.ttft_s and plan.output_tokens_per_s
    return plan.tpot_s, plan.ttft_s, -plan.output_tokens_per_s, plan.device_s_per_token


def beats(one: Plan, other: Plan) -> bool:
    pairs = list(zip(goals(one), goals(other), strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


@given(st.lists(plans, min_size=1, max_size=30))
def test_the_front_is_what_nobody_beats(found: list[Plan]) -> None:
    front = pareto(found)
    assert front
    for place, plan in enumerate(found):
        beaten = any(beats(other, plan) for other in found)
        if place in front:
            assert not beaten
        else:
            assert beaten or any(goals(found[i]) == goals(plan) for i in front)


@given(st.lists(plans, min_size=1, max_size=60), st.integers(1, 25))
def test_a_shortlist_has_the_best_and_nothing_twice(found: list[Plan], most: int) -> None:
    chosen = shortlist(found, most)
    assert 1 <= len(chosen) <= most and len(set(chosen)) == len(chosen)
    best = min(range(len(found)), key=lambda i: merit(found[i]))
    assert merit(found[chosen[0]]) == merit(found[best])


def test_misfits_are_on_no_front_and_come_last() -> None:
    misfit = made_up(reason="too small", tpot_s=1e-6)
    assert pareto([misfit, made_up()]) == {1}
    assert sorted([misfit, made_up()], key=merit)[1] is misfit


def test_promises_come_before_price() -> None:
    cheap, dear = made_up(rate=9000.0, slo_misses=("ttft",)), made_up(rate=10.0)
    assert sorted([cheap, dear], key=merit)[0] is dear
    drowning = replace(cheap, keeps_up=False, slo_misses=())
    assert sorted([drowning, cheap, dear], key=merit) == [dear, cheap, drowning]


@pytest.fixture(scope="module")
def found() -> Found:
    return search(planner("llama-3.1-70b", work=Workload(256, 32, 32)), SETTINGS)


def test_a_search_simulates_a_few_of_what_it_estimated(found: Found) -> None:
    fitting = [plan for plan in found.plans if plan.fits]
    assert 1 <= len(fitting) == found.num_simulated <= MOST_SIMULATED
    assert found.num_estimated > 200
    assert all(plan.method == "simulated" for plan in fitting)
    keys = [merit(plan) for plan in found.plans]
    assert keys == sorted(keys)
    assert found.front == pareto(found.plans)
    assert all(plan.tp > 1 or plan.pp > 1 for plan in fitting)
    assert {"weights"} == {plan.binding for plan in found.plans if not plan.fits}


def test_many_in_flight_leave_fewer_to_simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    served = settled_requests(Workload(64, 4, 8))
    monkeypatch.setattr("tpinfer.planner.search._MOST_SERVED", 5 * served)
    few = search(planner("llama-3.1-70b", work=Workload(64, 4, 8)), SETTINGS)
    assert few.num_simulated <= 5 < few.num_estimated


def test_numbers_of_a_plan_add_up(found: Found) -> None:
    for plan in found.plans:
        if not plan.fits:
            assert plan.intervals() == {} and plan.tpot_s is None
            continue
        assert plan.tpot_s is not None and plan.ttft_s is not None
        assert math.isclose(plan.tpot_split.total, plan.tpot_s, rel_tol=1e-6)
        assert math.isclose(plan.ttft_split.total, plan.ttft_s, rel_tol=1e-6)
        assert plan.output_tokens_per_s and plan.cost_per_mtok
        assert plan.cost_per_mtok == pytest.approx(2.5 / 3600 * plan.device_s_per_token * 1e6)
        for name, (low, high) in plan.intervals().items():
            assert low <= getattr(plan, name) <= high, name


def test_keys_of_a_plan_are_kept_stable(found: Found) -> None:
    keys = [
        "tp", "pp", "dp", "fits", "ttft_s", "tpot_s", "output_tokens_per_s", "cost_per_mtok",
        "mode", "interval", "split", "kv_capacity_tokens", "binding",
    ]  # fmt: skip
    words = ["compute", "memory", "communication", "small_kernels", "host", "queue"]
    for plan in found.plans:
        written = plan.to_json()
        assert list(written) == keys
        assert list(as_words(plan.tpot_split)) == words == list(written["split"])  # pyright: ignore


def test_one_placement_by_name() -> None:
    done = fixed(planner(), (2, 1, 1), SETTINGS)
    assert len(done.plans) == 1 and done.front == {0}
    assert (done.plans[0].tp, done.plans[0].binding) in {(2, "memory"), (2, "compute")}
    misfit = fixed(planner("llama-3.1-405b"), (1, 1, 1), SETTINGS)
    assert not misfit.plans[0].fits and misfit.front == frozenset()


def test_all_placements_are_estimated_before_settings_vary() -> None:
    made = planner(topology=four_hosts(), work=Workload(128, 32, 64))
    estimates, misfits = estimate_all(made, SETTINGS, (False, False))
    sizes = {(plan.tp, plan.pp, plan.dp) for plan, _ in estimates}
    assert len(sizes) == len(estimates) and len(sizes) + len(misfits) > 150
    assert {tp for tp, _, _ in sizes} == {1, 2, 4, 8, 16, 32}


def test_half_a_link_moves_communication_and_nothing_else() -> None:
    halved = load_topology("dgx-h100", ["hosts.h0.links.0.bw=225GB/s"])
    splits = [
        fixed(planner("llama-3.1-70b", topology=one), (8, 1, 1), SETTINGS).plans[0].tpot_split
        for one in (machine(), halved)
    ]
    assert splits[1].communication > 1.05 * splits[0].communication
    for word in ("compute", "memory", "small_kernels"):
        assert getattr(splits[1], word) == pytest.approx(getattr(splits[0], word), rel=0.1)


def test_settings_that_are_given_are_kept() -> None:
    estimates, _ = estimate_all(planner(), EngineSettings(4, 128), (False, False))
    assert {plan.settings.max_num_batched_tokens for plan, _ in estimates} == {128}
    assert max(plan.settings.max_num_seqs for plan, _ in estimates) == 4


def test_a_promise_that_is_broken_is_told() -> None:
    done = fixed(planner(slo=Slo(1e-6, 10.0)), (1, 1, 1), SETTINGS)
    assert done.plans[0].slo_misses == ("ttft",)


def test_waits_make_an_interval_wider() -> None:
    calm, busy = (
        fixed(planner(work=Workload(512, 64, rate=rate)), (1, 1, 1), SETTINGS).plans[0]
        for rate in (0.5, 42.0)
    )
    widths = []
    for plan in (calm, busy):
        low, high = plan.intervals()["ttft_s"]
        assert plan.ttft_s is not None and low < plan.ttft_s < high
        widths.append((high - low) / plan.ttft_s)
    assert widths[1] > 1.2 * widths[0]


def test_replicas_and_stages_multiply() -> None:
    one = fixed(planner(work=Workload(128, 32, 8)), (1, 1, 1), SETTINGS).plans[0]
    two = fixed(planner(work=Workload(128, 32, 16)), (1, 1, 2), SETTINGS).plans[0]
    assert one.tpot_s == two.tpot_s
    assert one.output_tokens_per_s and two.output_tokens_per_s
    assert two.output_tokens_per_s == pytest.approx(2 * one.output_tokens_per_s)
    assert two.cost_per_mtok == pytest.approx(one.cost_per_mtok)


def test_running_out_of_cache_is_named() -> None:
    """A 70B model in fp8 on one card of 80 GB has hardly any room for keys; two cards have."""
    work = Workload(128, 512, 128)
    made = planner("llama-3.1-70b", work=work, precision="fp8")
    one, two = (fixed(made, (tp, 1, 1), EngineSettings(128)).plans[0] for tp in (1, 2))
    assert one.binding == "kv_capacity" and two.binding != "kv_capacity"
    assert two.kv_capacity_tokens > 10 * one.kv_capacity_tokens
    assert one.output_tokens_per_s and two.output_tokens_per_s
    assert two.output_tokens_per_s > 3 * one.output_tokens_per_s


@settings(max_examples=20, deadline=None)
@given(st.integers(64, 8000), st.sampled_from([512, 2048, 8192]))
def test_a_prefill_law_is_near_the_times_it_came_from(length: int, chunk: int) -> None:
    made = planner()
    model = made.model(made.fit((1, 1, 1), SETTINGS).placement)
    law = prefill_law(model, length, chunk)
    assert min(law.fixed_s, law.linear_s, law.quadratic_s) >= 0
    assert sum(law.parts_s(length)) == pytest.approx(prefill_s(model, length, chunk), rel=0.35)


def test_a_law_is_exact_where_there_is_one() -> None:
    assert PrefillLaw(10, 1.0, 2.0, 3.0).parts_s(10) == (1.0, 20.0, 300.0)


def test_scaling_over_ranks_shows_what_is_too_small() -> None:
    done = scaling(planner("llama-3.1-70b"), SETTINGS)
    assert [plan.tp for plan in done] == [1, 2, 4, 8]
    assert [plan.fits for plan in done] == [False, True, True, True]


def test_decode_lies_under_the_slope_and_prefill_under_the_roof() -> None:
    made = planner(work=Workload(2048, 32, 16), topology=machine())
    roof = roofline(made, fixed(made, (1, 1, 1), SETTINGS).plans[0])
    prefill, decode = roof.points
    top, slope = max(roof.flops_per_s.values()), max(roof.bytes_per_s.values())
    for point in roof.points:
        ceiling = min(top, slope * point.flops / point.bytes_moved)
        assert point.flops / point.time_s <= ceiling * 1.01
    assert prefill.flops / prefill.bytes_moved > top / slope > decode.flops / decode.bytes_moved
    assert (prefill.bound, decode.bound) == ("compute", "memory")


def test_stored_weights_count_in_the_roofline() -> None:
    points = []
    for precision in ("bf16", "int4"):
        made = planner(precision=precision)
        points.append(roofline(made, fixed(made, (1, 1, 1), SETTINGS).plans[0]).points[1])
    assert points[1].bytes_moved < 0.5 * points[0].bytes_moved
