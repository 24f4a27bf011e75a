"""tpprof end to end against runs whose truth is known: made-up traces in, reports out."""

from pathlib import Path

import msgspec
import pytest
from tpprof.results import CollectiveResult, Report

from tests.traces.agreement import analysed, faults, recorded, window_faults
from tests.traces.catalogue import FAR_CLOCKS, SCENARIOS
from tests.traces.kernels import roofs_ns
from tests.traces.kineto import KinetoStyle, write_kineto
from tests.traces.names import ENGINES
from tests.traces.nsight import NsightStyle, write_nsight, write_nsight_per_rank
from tests.traces.scenario import CEILINGS, Delay, Scenario
from tests.traces.simulate import Run, simulate
from tests.traces.truth import CollectiveTruth, Truth, truth_of

RAGGED = {"ragged exits": 2500}
"""Looser where ranks leave collectives at different moments: each fit carries that error into
every collective of the window."""
TELLING_NS = 2000
"""A rank that came last by less cannot be told from the one before it."""


def tolerance(name: str) -> int:
    return RAGGED.get(name, 1000)


@pytest.mark.parametrize("name", SCENARIOS)
def test_whole_run(name: str, tmp_path: Path) -> None:
    run, paths = recorded(SCENARIOS[name], tmp_path)
    report, truth = analysed(paths), truth_of(run)
    assert [split.rank for split in report.ranks] == list(range(SCENARIOS[name].num_ranks))
    wrong = [
        text
        for split in report.ranks
        for text in faults(
            split, truth.split(split.rank, *truth.whole(split.rank)), tolerance(name)
        )
    ]
    assert wrong == []
    assert report.leaves == report.ranks[0].leaves and report.wall_ns == report.ranks[0].wall_ns
    assert report.residual_ns == 0


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_step(engine: str, name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    run, paths = recorded(scenario, tmp_path, KinetoStyle(engine))
    report, truth = analysed(paths, "steps"), truth_of(run)
    assert len(report.windows) == scenario.num_steps
    steps = [truth.steps(rank) for rank in range(scenario.num_ranks)]
    wrong = [
        text
        for index, window in enumerate(report.windows)
        for text in window_faults(window, truth, [s[index] for s in steps], tolerance(name))
    ]
    assert wrong == []


def requests(truth: Truth, ranks: int) -> tuple[list[tuple[int, ...]], list[list[tuple[int, ...]]]]:
    """Windows of the one request on each rank's clock: to the first token, and between tokens."""
    accepted, admitted, first = truth.ttft()
    whole = [truth.on_clock(rank, accepted, first, admitted) for rank in range(ranks)]
    return whole, [[truth.on_clock(rank, *pair) for rank in range(ranks)] for pair in truth.itl()]


@pytest.mark.parametrize("name", ["alone", "steady", "clock drift", "graph", "hidden", "host late"])
def test_request_windows(name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    run, paths = recorded(scenario, tmp_path, KinetoStyle("tpinfer"))
    truth = truth_of(run)
    first, between = requests(truth, scenario.num_ranks)
    [window] = analysed(paths, "ttft").windows
    assert window_faults(window, truth, first) == []
    assert window.ranks[0].rollup["queue"] == window.ranks[0].leaves["queue"] > 50_000
    windows = analysed(paths, "itl").windows
    assert len(windows) == scenario.num_steps - 1
    wrong = [window_faults(w, truth, spans) for w, spans in zip(windows, between, strict=True)]
    assert wrong == [[] for _ in windows]


def test_host_time_goes_to_what_the_host_did(tmp_path: Path) -> None:
    run, paths = recorded(SCENARIOS["three ranks"], tmp_path, KinetoStyle("tpinfer"))
    truth = truth_of(run)
    for split in analysed(paths).ranks:
        true = truth.split(split.rank, *truth.whole(split.rank)).host_parts
        for part in ("schedule", "plan_wait", "prepare", "sample", "detokenize"):
            assert abs(split.host_parts.get(part, 0) - true.get(part, 0)) <= 1000, part


def pairs_of(report: Report, run: Run) -> list[tuple[CollectiveResult, CollectiveTruth]]:
    """Each collective as found and as it was: the n-th of its group in order of time."""
    found = sorted(report.collectives, key=lambda one: (one.ranks[0], one.start_ns))
    return list(zip(found, truth_of(run).collectives(), strict=True))


def wait_faults(found: CollectiveResult, true: CollectiveTruth, tolerance_ns: int) -> list[str]:
    where = f"collective {true.number}"
    wrong = []
    if found.method != "matched" or found.ranks != true.ranks:
        wrong.append(f"{where}: {found.method} over ranks {found.ranks}")
    for word in ("wait_ns", "transfer_ns"):
        pairs = list(zip(getattr(found, word), getattr(true, word), strict=True))
        if any(abs(a - b) > tolerance_ns for a, b in pairs):
            wrong.append(f"{where}: {word} found and true {pairs}")
    if true.margin_ns > TELLING_NS and found.last_rank != true.last_rank:
        wrong.append(f"{where}: last was {true.last_rank}, not {found.last_rank}")
    return wrong


WITH_RANKS = [name for name, one in SCENARIOS.items() if one.num_ranks > 1]


@pytest.mark.parametrize("name", WITH_RANKS)
def test_waits_and_who_was_late(name: str, tmp_path: Path) -> None:
    """Each collective on its own. A launch ahead of its inputs is not yet an arrival."""
    run, paths = recorded(SCENARIOS[name], tmp_path)
    wrong = [wait_faults(*pair, 500) for pair in pairs_of(analysed(paths), run)]
    assert [text for texts in wrong for text in texts] == []


@pytest.mark.parametrize("args", ["seq", "plain", "none"])
@pytest.mark.parametrize("name", ["kernel late", "clock drift", "graph with drift", "hidden"])
def test_waits_whatever_the_recorder_tells_of_collectives(
    args: str, name: str, tmp_path: Path
) -> None:
    style = KinetoStyle(collective_args=args, shuffle_seed=4)
    run, paths = recorded(SCENARIOS[name], tmp_path, style)
    wrong = [wait_faults(*pair, 500) for pair in pairs_of(analysed(paths), run)]
    assert [text for texts in wrong for text in texts] == []


@pytest.mark.parametrize("late", range(4))
@pytest.mark.parametrize("delay_us", [50, 250, 1000])
def test_the_late_rank_is_named(late: int, delay_us: int, tmp_path: Path) -> None:
    delay = Delay(late, 1000 * delay_us, "kernel")
    scenario = Scenario("late", 4, seed=late, clocks=FAR_CLOCKS, delays=(delay,), num_layers=3)
    run, paths = recorded(scenario, tmp_path)
    delayed = [(a, b) for a, b in pairs_of(analysed(paths), run) if b.margin_ns > TELLING_NS]
    assert sum(b.last_rank == late for _, b in delayed) >= 12
    assert all(a.last_rank == b.last_rank and a.last_rank_was for a, b in delayed)


def test_bus_bandwidth_comes_from_the_transfer_alone(tmp_path: Path) -> None:
    run, paths = recorded(SCENARIOS["kernel late"], tmp_path)
    for result, truth in pairs_of(analysed(paths), run):
        assert result.bytes == truth.num_bytes
        factor = {"allreduce": 1.5, "allgather": 0.75}[truth.op]
        expected = factor * truth.num_bytes / max(truth.transfer_ns)
        assert result.busbw_gbps == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["clock offset", "clock drift", "graph with drift"])
def test_clocks_are_found(name: str, tmp_path: Path) -> None:
    run, paths = recorded(SCENARIOS[name], tmp_path)
    for rank, found in analysed(paths).clock_alignment.items():
        clock = run.scenario.clock(int(rank))
        assert found.accepted and found.residual_ns <= 100
        assert found.drift_ppm == pytest.approx(-clock.drift_ppm, abs=0.5)
        if not clock.drift_ppm:
            assert found.offset_ns == pytest.approx(-clock.offset_ns, abs=100)


def comparable(report: Report) -> dict[str, object]:
    """All that must not depend on the recorder."""
    found = msgspec.to_builtins(report)
    for word in ("sources", "warnings", "coverage", "clock_alignment"):
        found.pop(word)
    for one in (*found["collectives"], *found["windows"]):
        one.pop("start_ns")
        one.pop("end_ns", None)
    return found


@pytest.mark.parametrize("by", ["", "step", "kernel", "stream"])
@pytest.mark.parametrize("name", ["steady", "graph", "hidden", "host late", "dependent launch"])
def test_both_recorders_give_the_same_report(name: str, by: str, tmp_path: Path) -> None:
    run = simulate(SCENARIOS[name])
    plain = KinetoStyle("tpinfer", has_shapes=False, collective_args="none", has_graph_ids=True)
    write_kineto(run, tmp_path / "kineto", plain)
    one = write_nsight(run, tmp_path / "one" / "all.sqlite")
    write_nsight_per_rank(run, tmp_path / "ranks", NsightStyle(is_registered=True))
    places = [tmp_path / "kineto", one, tmp_path / "ranks"]
    truth = truth_of(run, has_shapes=False)
    for split in analysed(places[1:2]).ranks:
        assert faults(split, truth.split(split.rank, *truth.whole(split.rank))) == []
    for window in ("all", "steps", "ttft"):
        first, *others = [comparable(analysed([place], window, by=by)) for place in places]
        assert others == [first, first], window


@pytest.mark.parametrize("by", ["rank", "step", "phase", "layer", "op", "kernel", "stream"])
@pytest.mark.parametrize("name", ["hidden", "graph", "clock drift"])
def test_every_grouping_sums_to_the_wall(name: str, by: str, tmp_path: Path) -> None:
    _, paths = recorded(SCENARIOS[name], tmp_path, KinetoStyle("tpinfer", has_modules=True))
    report = analysed(paths, by=by)
    assert report.groups and report.by == by
    for split in report.ranks:
        rows = [row for row in report.groups if row.rank == split.rank]
        assert sum(row.wall_ns for row in rows) == split.wall_ns
        summed: dict[str, int] = {}
        for row in rows:
            assert sum(row.leaves.values()) == row.wall_ns
            for leaf, ns in row.leaves.items():
                summed[leaf] = summed.get(leaf, 0) + ns
        assert summed == split.leaves


def product_rows(run: Run) -> tuple[int, int]:
    """(time, floor) of rank 0's matrix products that are not too small for any ceiling."""
    rows = [row for row in run.ranks[0].rows if row.work.product]
    big = [row for row in rows if row.work.leaf in ("compute", "memory")]
    floor = sum(max(roofs_ns(row.work.product or (1, 1, 1))) for row in big)
    return sum(row.end_ns - row.start_ns for row in big), round(floor)


def test_floor_and_lost_time_of_products(tmp_path: Path) -> None:
    run, paths = recorded(SCENARIOS["steady"], tmp_path)
    report = analysed(paths)
    assert all(op.floor_ns + op.lost_ns == op.time_ns for op in report.ops)
    mine = [op for op in report.ops if op.rank == 0 and op.bound in ("compute", "memory")]
    time_ns, floor_ns = product_rows(run)
    assert sum(op.time_ns for op in mine) == pytest.approx(time_ns, abs=1000)
    assert sum(op.floor_ns for op in mine) == pytest.approx(floor_ns, rel=0.001)
    assert report.ceilings["origin"] == CEILINGS.origin


def test_vllm_coordinator_is_no_rank(tmp_path: Path) -> None:
    style = KinetoStyle("vllm", has_coordinator=True, is_detailed=True)
    run, paths = recorded(SCENARIOS["three ranks"], tmp_path, style)
    assert len(list(tmp_path.iterdir())) == 4
    report, truth = analysed(paths), truth_of(run)
    for split in report.ranks:
        assert faults(split, truth.split(split.rank, *truth.whole(split.rank))) == []
    assert len(report.ranks) == 3
