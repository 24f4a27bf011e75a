"""The scale waterfall: bars sum exactly from ideal to real whatever the reports, and each cause
lands in its own bar."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpprof.errors import TraceError
from tpprof.report.html import render_html
from tpprof.report.scale import (
    Waterfall,
    build_waterfalls,
    replayed_causes,
    seen_from_who_waits,
    with_replay,
)
from tpprof.report.scale_causes import FIXES, apportion
from tpprof.report.scale_text import render_waterfalls
from tpprof.report.whatif import Answer, Removal
from tpprof.results import CollectiveResult, OpResult, Report, Window

from tests.pure.tpprof_reports import one_rank as report_of
from tests.pure.tpprof_reports import ops, split, two_ranks, windows
from tpinfer.costs.leaves import LEAVES

BOUNDS = ("compute", "memory", "balanced", "latency", "communication", "unmodelled")


def op(key: str, time_ns: int, work: int, bound: str = "memory") -> OpResult:
    """An op that moves `work` bytes."""
    return OpResult(key, 0, time_ns, 0, time_ns, bound, 1, flops=work, bytes=work)


def meeting(wait_ns: int, last: int, was: str) -> CollectiveResult:
    return CollectiveResult("allreduce", 8, [0, 1], [wait_ns, 0], [5, 5], None, last, was)


def bars(one: Waterfall) -> dict[str, int]:
    """ns by title."""
    return {bar.title: bar.spent_ns for bar in one.bars}


@st.composite
def reports(draw: st.DrawFn) -> Report:
    leaves = draw(st.dictionaries(st.sampled_from(LEAVES), st.integers(1, 10**12), min_size=1))
    found = [
        OpResult(
            draw(st.sampled_from("abcd")), 0, time, 0, time, draw(st.sampled_from(BOUNDS)), 1,
            draw(st.integers(0, 10**6)), draw(st.integers(0, 10**6)),
        )
        for time in draw(st.lists(st.integers(0, 10**12), max_size=6))
    ]  # fmt: skip
    met = [
        meeting(wait, draw(st.integers(-1, 3)), draw(st.sampled_from(["x", "y", "host late"])))
        for wait in draw(st.lists(st.integers(0, 10**9), max_size=6))
    ]
    count = draw(st.integers(0, 7))
    labels = [Window(f"step {i} decode", 0, 0, []) for i in range(count)]
    return report_of(leaves, ops=found, collectives=met, windows=labels)


@given(st.dictionaries(st.sampled_from([1, 2, 3, 4, 8, 16]), reports(), min_size=2, max_size=4))
def test_bars_sum_from_ideal_to_real(runs: dict[int, Report]) -> None:
    found = build_waterfalls(runs)
    assert [one.tp for one in found] == sorted(runs)[1:]
    for one in found:
        assert all(isinstance(bar.spent_ns, int) for bar in one.bars)
        assert one.ideal_ns + sum(bar.spent_ns for bar in one.bars) == one.real_ns
        assert one.real_ns == runs[one.tp].wall_ns
        assert {bar.kind for bar in one.bars} <= set(FIXES)
    text = render_waterfalls(found)
    assert max(map(len, text.splitlines())) <= 100
    assert render_html(runs[max(runs)], waterfalls=found).count("<h3>") >= len(found)


@given(st.dictionaries(st.text(max_size=3), st.fractions(-1000, 1000), min_size=1), st.data())
def test_apportioned_parts_are_near_and_sum(
    parts: dict[str, Fraction], data: st.DataObject
) -> None:
    exact = sum(parts.values(), Fraction(0))
    total = int(exact // 1) + data.draw(st.integers(0, 1))
    found = apportion(parts, total)
    assert sum(found.values()) == total
    assert all(abs(found[key] - parts[key]) < 2 for key in parts)


def test_a_perfect_cut_costs_nothing() -> None:
    one = report_of({"memory": 8000, "host": 800}, ops=[op("mlp", 8000, 100)])
    four = report_of({"memory": 2000, "host": 200}, ops=[op("mlp", 2000, 25)])
    found = build_waterfalls({1: one, 4: four})[0]
    assert found.ideal_ns == found.real_ns == 2200
    assert (found.speedup, found.efficiency) == (4.0, 1.0)
    assert set(bars(found).values()) == {0}
    assert "lost nothing" in render_waterfalls([found])


def test_repeated_work_is_unsharded_and_slow_shares_are_thin() -> None:
    """A norm that every rank repeats, and a GEMM that moves a quarter in a third of the time."""
    one = report_of(
        {"memory": 12_400}, ops=[op("layers.0.norm", 400, 50), op("layers.0.mlp", 12_000, 1000)]
    )
    four = report_of(
        {"memory": 4_400}, ops=[op("layers.0.norm", 400, 50), op("layers.0.mlp", 4000, 250)]
    )
    found = build_waterfalls({1: one, 4: four})[0]
    assert found.ideal_ns == 3100
    assert bars(found) == {
        "unsharded work": 300, "thin GEMMs": 1000, "transfer": 0, "wait": 0, "host": 0,
    }  # fmt: skip
    details = {bar.kind: bar.detail for bar in found.bars}
    assert details["unsharded"] == "layers.*.norm"
    assert details["thin_gemms"] == "layers.*.mlp"


def test_work_that_is_bound_by_arithmetic_is_compared_by_its_flops() -> None:
    """Half the FLOPs in half the time is a perfect cut, even where bytes do not halve."""
    whole = OpResult("mlp", 0, 1000, 0, 1000, "compute", 1, flops=800, bytes=100)
    half = OpResult("mlp", 0, 500, 0, 500, "compute", 1, flops=400, bytes=90)
    runs = {
        1: report_of({"compute": 1000}, ops=[whole]),
        2: report_of({"compute": 500}, ops=[half]),
    }
    assert set(bars(build_waterfalls(runs)[0]).values()) == {0}


def test_kernels_of_unknown_work_and_other_names_are_told_apart() -> None:
    one = report_of({"unmodelled": 1000}, ops=[op("tile256", 1000, 0, "unmodelled")])
    two = report_of({"unmodelled": 700}, ops=[op("tile64", 700, 0, "unmodelled")])
    assert bars(build_waterfalls({1: one, 2: two})[0])["kernels without a model"] == 200


def test_waiting_is_divided_by_whom_and_what_it_was_for() -> None:
    one = report_of({"memory": 2000})
    met = [meeting(300, 1, "layers.3.mlp"), meeting(100, 1, "layers.4.mlp")]
    met += [meeting(200, 3, "host late"), meeting(50, 2, "head"), meeting(50, 2, "norm")]
    two = report_of({"memory": 1000, "comm_wait": 700, "comm_transfer": 40}, collectives=met)
    found = build_waterfalls({1: one, 2: two})[0]
    waits = [(b.title, b.detail, b.spent_ns) for b in found.bars if b.kind == "wait"]
    assert waits == [
        ("wait for rank 1", "layers.*.mlp", 400),
        ("wait for rank 3", "host late", 200),
        ("wait for rank 2", "head", 50),
        ("wait, other causes", "", 50),
    ]
    assert bars(found)["transfer"] == 40
    assert [(fix.title, fix.saved_ns) for fix in found.fixes][:2] == [
        ("wait for rank 1", 400),
        ("wait for rank 3", 200),
    ]


def test_a_slow_rank_0_is_seen_by_who_waits_for_it() -> None:
    """Rank 0's kernels are slow and rank 1 waits: not thin GEMMs but a wait for rank 0."""
    one = report_of({"memory": 2000}, ops=[op("mlp", 2000, 100)])
    ranks = [split(0, {"memory": 1500, "comm_transfer": 10})]
    ranks.append(split(1, {"memory": 1000, "comm_transfer": 10, "comm_wait": 500}))
    found = CollectiveResult("allreduce", 8, [0, 1], [0, 500], [10, 10], None, 0, "mlp")
    slow = [op("mlp", 1500, 50), replace(op("mlp", 1000, 50), rank=1)]
    two = report_of(ranks[0].leaves, ops=slow, collectives=[found])
    waterfall = build_waterfalls({1: one, 2: replace(two, ranks=ranks)})[0]
    assert waterfall.rank == 1
    assert bars(waterfall) == {
        "unsharded work": 0, "thin GEMMs": 0, "transfer": 10, "wait for rank 0": 500, "host": 0,
    }  # fmt: skip
    far = replace(two, ranks=[ranks[0], split(1, {"comm_wait": 9000})])
    assert seen_from_who_waits(far) is far


def test_runs_of_different_length_are_compared_per_window() -> None:
    steps = [Window(f"step {i} decode", 0, 0, []) for i in range(10)]
    one = report_of({"memory": 1000}, windows=steps[:5])
    two = report_of({"memory": 1500}, windows=steps)
    found = build_waterfalls({1: one, 2: two})[0]
    assert (found.ideal_ns, found.real_ns, found.num_windows) == (1000, 1500, 10)
    assert found.warnings == []
    mixed = replace(two, windows=[*steps[:9], Window("step 9 prefill", 0, 0, [])])
    assert "record the same steps" in build_waterfalls({1: one, 2: mixed})[0].warnings[0]


def test_a_run_that_recording_slowed_down_is_doubted() -> None:
    one = report_of({"host": 10}, dilation=1.3)
    found = build_waterfalls({1: one, 2: report_of({"host": 10})})[0]
    assert "1.30 times" in found.warnings[0]


def test_fixes_come_with_what_they_buy() -> None:
    one = report_of({"memory": 2000, "host": 400})
    two = report_of({"memory": 1000, "host": 400, "comm_transfer": 100})
    found = build_waterfalls({1: one, 2: two})[0]
    fixes = [(fix.title, fix.saved_ns, round(fix.speedup, 3)) for fix in found.fixes]
    assert fixes == [("host", 200, 1.846), ("transfer", 100, 1.714)]
    assert found.speedup == pytest.approx(1.6)
    assert "graphs" in found.fixes[0].remedy


def test_what_was_replayed_counts_for_more_than_a_bar() -> None:
    """The bar is what rank 0 waited; without rank 1 it would wait for the next-latest."""
    one = report_of({"memory": 2000})
    met = [meeting(300, 1, "mlp")]
    two = report_of({"memory": 1000, "comm_wait": 300, "comm_transfer": 80}, collectives=met)
    found = build_waterfalls({1: one, 2: two})[0]
    assert replayed_causes(found) == ["transfer", "host", "wait:1"]
    gains = [Removal("wait:1", "", 0, 400), Removal("transfer", "", 0, 120)]
    found = with_replay(found, Answer(0, 2760, 2, 9, gains))
    fixes = [(fix.title, fix.saved_ns, fix.is_replayed) for fix in found.fixes]
    assert fixes == [("wait for rank 1", 200, True), ("transfer", 60, True)]
    assert found.fixes[0].speedup == pytest.approx(2 * 1000 / (1380 - 200))
    assert "by replay" in render_waterfalls([found])


def test_gains_are_bars_below_zero() -> None:
    """A share that fits a cache runs faster than its share of the time."""
    one = report_of({"memory": 4000}, ops=[op("mlp", 4000, 400)])
    two = report_of({"memory": 1200}, ops=[op("mlp", 1200, 200)])
    assert bars(build_waterfalls({1: one, 2: two})[0])["thin GEMMs"] == -800


def test_the_example_page_shows_the_waterfall() -> None:
    smallest = report_of(
        {"memory": 20_000_000, "host": 2_000_000}, windows=windows(),
        ops=[replace(one, flops=2 * one.flops, bytes=2 * one.bytes) for one in ops(0)],
    )  # fmt: skip
    page = render_html(two_ranks(), waterfalls=build_waterfalls({1: smallest, 2: two_ranks()}))
    for text in ("What ate the speed-up", "wait for rank 1", "thin GEMMs", "unsharded work"):
        assert text in page


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ({1: report_of({"host": 1})}, "at least two"),
        ({1: report_of({"host": 1}), 2: report_of({})}, "tp=2 has no wall time"),
    ],
)
def test_what_cannot_be_compared_is_an_error(runs: dict[int, Report], said: str) -> None:
    with pytest.raises(TraceError, match=said):
        build_waterfalls(runs)
