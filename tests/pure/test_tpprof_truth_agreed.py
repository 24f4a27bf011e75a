"""Cases on which the analyser and the specification once differed."""

from pathlib import Path

import pytest
from tpprof.readers.read import read_traces

from tests.pure.test_tpprof_truth_faults import wrong_steps
from tests.pure.test_tpprof_truth_reading import as_read, origin_of, truly
from tests.traces.agreement import analysed, faults, recorded
from tests.traces.catalogue import DAMAGED, SCENARIOS
from tests.traces.kineto import KinetoStyle
from tests.traces.nsight import NsightStyle, write_nsight
from tests.traces.scenario import Damage, Scenario
from tests.traces.simulate import simulate
from tests.traces.truth import truth_of


@pytest.mark.parametrize(
    "damage",
    [Damage("lost", 0, 2, first=9), Damage("lost", 1, 2, first=5)],
    ids=["a kernel", "a reduce"],
)
def test_a_launch_without_its_kernel_is_a_lost_event(damage: Damage, tmp_path: Path) -> None:
    """Not in a replay, and no row is broken: one cudaLaunchKernel of hundreds has no kernel."""
    run, paths = recorded(Scenario("eager", num_steps=6, damages=(damage,)), tmp_path)
    assert wrong_steps(analysed(paths, "steps"), truth_of(run), damage.step) == []


def test_a_stream_wait_issued_later_explains_nothing(tmp_path: Path) -> None:
    """The first kernel of each layer lies on the device for 40 us. Waits that the host issues
    meanwhile are for rows behind it on its stream, or for another stream."""
    scenario = Scenario("idle", is_hidden=True, late_start_ns=40_000, launch_ns=1500, batch=1)
    run, paths = recorded(scenario, tmp_path, KinetoStyle("tpinfer"))
    truth = truth_of(run)
    for split in analysed(paths).ranks:
        assert faults(split, truth.split(split.rank, *truth.whole(split.rank))) == []


@pytest.mark.parametrize("name", ["zero time", "backwards"])
def test_broken_rows_count_for_the_process_they_belong_to(name: str, tmp_path: Path) -> None:
    run = simulate(DAMAGED[name])
    write_nsight(run, tmp_path / "all.sqlite")
    [damage] = run.scenario.damages
    lost = [trace.num_lost for trace in read_traces([tmp_path])]
    assert lost == [int(rank == damage.rank) for rank in range(2)]


def test_ranks_on_gpus_are_who_they_say_they_are(tmp_path: Path) -> None:
    """Nothing else tells them apart: each sees device 0, and process ids run backwards."""
    run = simulate(SCENARIOS["steady"])
    style = NsightStyle(pids=(91, 90), device_of_all=0, says_rank=True)
    traces = read_traces([write_nsight(run, tmp_path / "all.sqlite", style)])
    for trace, rank in zip(traces, run.ranks, strict=True):
        assert as_read(trace, origin_of(trace, rank)) == truly(rank, "tpinfer")
