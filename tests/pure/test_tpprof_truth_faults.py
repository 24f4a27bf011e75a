"""tpprof against truth where recordings are spoilt, incomplete or hold secrets: what cannot be
known is said, and nothing else goes wrong.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tpprof.__main__ import main
from tpprof.readers.read import read_traces
from tpprof.results import Report, Split

from tests.traces.agreement import analysed, differences, faults, inexact, recorded
from tests.traces.catalogue import DAMAGED, FAR_CLOCKS, SCENARIOS
from tests.traces.kineto import SECRET, KinetoStyle, write_kineto
from tests.traces.nsight import NsightStyle, write_nsight, write_nsight_per_rank
from tests.traces.scenario import Scenario
from tests.traces.simulate import simulate
from tests.traces.truth import Truth, truth_of

SPLIT = ("comm_wait", "comm_transfer", "comm_unsplit", "fused_comm")


def joined(leaves: Mapping[str, int]) -> dict[str, int]:
    """With communication as one leaf: whether it can be split is another matter."""
    rest = {leaf: ns for leaf, ns in leaves.items() if leaf not in SPLIT}
    return {**rest, "communication": sum(leaves.get(leaf, 0) for leaf in SPLIT)}


def wrong_steps(report: Report, truth: Truth, damaged: int) -> list[str]:
    """Every step is right on every rank. Where rows are missing on one rank no other can tell
    its collectives' waits, unless they are numbered."""
    wrong = []
    for index, window in enumerate(report.windows):
        for split in window.ranks:
            true = truth.split(split.rank, *truth.steps(split.rank)[index])
            if index != damaged:
                wrong += faults(split, true)
                continue
            wrong += inexact(split)
            found = differences(joined(split.leaves), joined(true.leaves))
            wrong += [f"rank {split.rank} {leaf}: {pair}" for leaf, pair in found.items()]
    return wrong


@pytest.mark.parametrize("kind", ["kineto", "nsight"])
@pytest.mark.parametrize("name", DAMAGED)
def test_what_was_not_recorded_is_never_idle(name: str, kind: str, tmp_path: Path) -> None:
    """In the step that lost rows all that would be idle is `unrecorded`, and what was recorded
    keeps its leaf; every other step is right."""
    scenario = DAMAGED[name]
    [damage] = scenario.damages
    run, paths = recorded(scenario, tmp_path / "kineto")
    if kind == "nsight":
        paths = write_nsight_per_rank(run, tmp_path / "nsight")
    report = analysed(paths, "steps")
    truth = truth_of(run, has_shapes=kind == "kineto")
    assert wrong_steps(report, truth, damage.step) == []
    assert report.windows[damage.step].ranks[damage.rank].leaves["unrecorded"] > 50_000
    assert any(
        "lost" in text and f"rank {damage.rank}" in text and "unrecorded" in text
        for text in report.warnings
    )


def test_lost_kernels_take_their_time_along(tmp_path: Path) -> None:
    """`unrecorded` is at least as long as what was lost was alone on the device."""
    scenario = DAMAGED["replay lost kernels"]
    run, paths = recorded(scenario, tmp_path)
    whole, seen = truth_of(simulate(replace(scenario, damages=()))), truth_of(run)
    spans = [truth.split(1, *truth.steps(1)[3]).leaves for truth in (whole, seen)]
    lost = spans[0]["unmodelled"] - spans[1]["unmodelled"]
    found = analysed(paths, "steps").windows[3].ranks[1].leaves
    assert 400_000 < lost <= found["unrecorded"]


def test_a_missing_rank_is_told_and_nobody_else_is_blamed(tmp_path: Path) -> None:
    """Rank 2 is always last, and its file is not there."""
    run, paths = recorded(SCENARIOS["kernel late"], tmp_path, ranks=[0, 1, 3])
    report, truth = analysed(paths), truth_of(run, present=(0, 1, 3))
    assert [split.rank for split in report.ranks] == [0, 1, 3]
    communication = ("comm_wait", "comm_transfer", "comm_unsplit", "fused_comm")
    for split in report.ranks:
        true = truth.split(split.rank, *truth.whole(split.rank)).leaves
        assert inexact(split) == []
        assert abs(split.rollup["communication"] - true["comm_unsplit"]) <= 1000
        for leaf in {*split.leaves, *true} - set(communication):
            assert abs(split.leaves.get(leaf, 0) - true.get(leaf, 0)) <= 1000, leaf
    assert not [c for c in report.collectives if c.method == "matched" and c.last_rank >= 0]
    assert any("rank" in text and "2" in text for text in report.warnings)


def test_one_rank_alone_of_several_is_estimated(tmp_path: Path) -> None:
    run, paths = recorded(SCENARIOS["kernel late"], tmp_path, ranks=[0])
    report = analysed(paths)
    true = truth_of(run).split(0, *truth_of(run).whole(0)).leaves
    communication = true["comm_wait"] + true["comm_transfer"]
    assert abs(report.ranks[0].rollup["communication"] - communication) <= 1000
    assert report.collectives and all(c.method == "estimated" for c in report.collectives)
    assert {c.last_rank for c in report.collectives} == {-1}


def test_nsight_without_graph_nodes_says_which_flag_is_missing(tmp_path: Path) -> None:
    run = simulate(SCENARIOS["graph"])
    path = write_nsight(run, tmp_path / "all.sqlite", NsightStyle(has_graph_nodes=False))
    report = analysed([path], "steps")
    assert any("--cuda-graph-trace=node" in text for text in report.warnings)
    for window in report.windows:
        for split in window.ranks:
            assert inexact(split) == [] and "idle_unexplained" not in split.leaves


def communication_alone(split: Split, truth: Truth) -> list[str]:
    """Everything but the division of communication is right, and none of it is claimed."""
    true = truth.split(split.rank, *truth.whole(split.rank)).leaves
    wrong = [f"{k}: {v}" for k, v in differences(joined(split.leaves), joined(true)).items()]
    claimed = [leaf for leaf in ("comm_wait", "comm_transfer") if split.leaves.get(leaf)]
    return wrong + claimed + inexact(split)


@pytest.mark.parametrize(
    "scenario",
    [
        replace(SCENARIOS["ragged exits"], exit_jitter_ns=30_000),
        Scenario("few", num_steps=1, num_layers=1),
        Scenario("few", num_steps=2, num_layers=1, clocks=FAR_CLOCKS),
    ],
    ids=["exits far apart", "three collectives", "six collectives and drift"],
)
def test_clocks_that_cannot_be_found_leave_collectives_unsplit(
    scenario: Scenario, tmp_path: Path
) -> None:
    run, paths = recorded(scenario, tmp_path)
    report, truth = analysed(paths), truth_of(run)
    for split in report.ranks:
        assert communication_alone(split, truth) == []
    others = [found for rank, found in report.clock_alignment.items() if rank != "0"]
    assert others and not any(found.accepted for found in others)
    assert all(found.reason for found in others)
    assert any("comm_unsplit" in text for text in report.warnings)


def test_without_launches_idle_time_is_unexplained(tmp_path: Path) -> None:
    run, paths = recorded(SCENARIOS["steady"], tmp_path, KinetoStyle(has_calls=False))
    truth = truth_of(run, has_calls=False)
    for split in analysed(paths).ranks:
        assert faults(split, truth.split(split.rank, *truth.whole(split.rank))) == []


def test_old_files_in_whole_microseconds(tmp_path: Path) -> None:
    """Every row is off by up to 1 us; sums over a hundred rows are off by little more."""
    style = KinetoStyle(has_fractions=False, collective_args="plain")
    run, paths = recorded(SCENARIOS["steady"], tmp_path, style)
    truth = truth_of(run)
    for split in analysed(paths).ranks:
        true = truth.split(split.rank, *truth.whole(split.rank))
        assert differences(split.leaves, true.leaves, 10_000) == {}
        assert inexact(split) == [] and abs(split.wall_ns - true.wall_ns) <= 1000


def outputs(arguments: Sequence[str], directory: Path) -> str:
    """What the command writes to files."""
    made = [directory / "report.json", directory / "report.html"]
    assert main(["analyze", *arguments, "--json", str(made[0]), "--html", str(made[1])]) == 0
    return "".join(path.read_text() for path in made)


@pytest.mark.parametrize("kind", ["kineto", "nsight"])
def test_secrets_reach_no_output(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = simulate(SCENARIOS["steady"])
    source = tmp_path / "traces"
    if kind == "kineto":
        write_kineto(run, source)
    else:
        write_nsight(run, source / "all.sqlite")
    for trace in read_traces([source]):
        assert not [text for text in trace.strings if SECRET in text]
    written = outputs([str(source)], tmp_path)
    printed = capsys.readouterr()
    assert SECRET not in written + printed.out + printed.err
    assert "comm_wait" in written and printed.out
    assert json.loads((tmp_path / "report.json").read_text())["wall_ns"] > 10**7
