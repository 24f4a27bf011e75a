"""What-if on made-up ranks whose truth is known: removing an injected cause gives the wall of the
run without it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tpprof.analyze import AnalysisOptions, prepare
from tpprof.attribute.findings import RankFindings, prepare_works
from tpprof.classify.work import WorkKind
from tpprof.readers.read import read_traces
from tpprof.report.whatif import PLAN_WAIT, WhatIf
from tpprof.report.whatif_text import render_whatif

from tests.pure.tpprof_builders import THREAD, Recording
from tests.traces.catalogue import SCENARIOS
from tests.traces.kineto import KinetoStyle, write_kineto
from tests.traces.scenario import CEILINGS
from tests.traces.simulate import simulate
from tpinfer.config.errors import ConfigError

TRANSFER_NS, FLOOR_NS = 20_000, 5_000
LATE = sorted(name for name, scenario in SCENARIOS.items() if scenario.delays)
NUM_STEPS, NUM_RANKS = 10, 3
COMPUTE_NS = np.random.default_rng(3).integers(40_000, 60_000, NUM_STEPS).tolist()
HOST_NS = 30_000


def record(
    late: int = -1, by_ns: int = 0, host_ns: int = HOST_NS, waits: bool = True
) -> RankFindings:
    """CPU ranks: rank 0 plans, sends, all compute and all-reduce; rank `late` computes longer.

    Steps follow each other; the others wait for the plan, which takes no time to arrive.
    """
    recordings = [Recording(rank=rank, is_cpu=True) for rank in range(NUM_RANKS)]
    now = [1_000_000] * NUM_RANKS
    for step, compute_ns in enumerate(COMPUTE_NS):
        sent = now[0] + host_ns
        recordings[0].range("tpinfer.host schedule", now[0], sent)
        arrive, begins = [], []
        for rank, one in enumerate(recordings):
            if rank and waits:
                one.range(PLAN_WAIT, now[rank], max(sent, now[rank]))
            begun = max(sent, now[rank])
            done = begun + compute_ns + (by_ns if rank == late else 0)
            begins.append(begun)
            one.kernel("mlp", begun, done, lane=THREAD, key="mlp", step=step)
            arrive.append(done)
        end = max(arrive) + TRANSFER_NS
        for rank, one in enumerate(recordings):
            one.step(step, begins[rank], end)
            one.kernel(
                "reduce", arrive[rank], end, lane=THREAD, kind=WorkKind.COMM, op="allreduce",
                group="tp", size=NUM_RANKS, sequence=step, key="reduce", floor=FLOOR_NS, step=step,
            )  # fmt: skip
        now = [end] * NUM_RANKS
    return _analyzed(recordings)


def _analyzed(recordings: list[Recording]) -> RankFindings:
    built = [one.build() for one in recordings]
    return prepare_works([trace for trace, _ in built], [work for _, work in built])


def gain(run: RankFindings, cause: str) -> int:
    return WhatIf(run).answer([cause]).removals[0].gain_ns


def test_the_wall_is_the_recorded_one() -> None:
    answer = WhatIf(record()).answer()
    host_ns = (NUM_STEPS - 1) * HOST_NS
    assert answer.wall_ns == sum(COMPUTE_NS) + NUM_STEPS * TRANSFER_NS + host_ns
    assert answer.num_meetings == 2 * NUM_STEPS - 1
    assert answer.warnings == []


@pytest.mark.parametrize("late", range(NUM_RANKS))
@pytest.mark.parametrize("by_ns", [1, 50_000, 1_000_000])
def test_removing_a_late_rank_gives_the_run_without_its_delay(late: int, by_ns: int) -> None:
    slow, fast = record(late, by_ns), record()
    without = WhatIf(slow).answer([f"wait:{late}"]).removals[0]
    assert without.wall_ns == WhatIf(fast).answer().wall_ns
    assert gain(slow, "wait") == by_ns * NUM_STEPS
    other = (late + 1) % NUM_RANKS
    assert gain(slow, f"wait:{other}") == 0


def test_transfer_goes_down_to_its_ceiling() -> None:
    assert gain(record(), "transfer") == NUM_STEPS * (TRANSFER_NS - FLOOR_NS)


@pytest.mark.parametrize("cause", ["host", "host:schedule"])
def test_host_time_of_rank_0_is_won_by_all(cause: str) -> None:
    """The others' wait for a plan goes with it: nobody has to know that it was host time."""
    run = record(host_ns=200_000)
    assert gain(run, cause) == (NUM_STEPS - 1) * 200_000


def test_host_time_is_not_won_where_waiting_for_the_plan_is_not_recorded() -> None:
    """Then the other ranks are as late as ever, and the all-reduce waits for them."""
    run = record(host_ns=200_000, waits=False)
    answer = WhatIf(run).answer(["host:schedule"])
    assert answer.removals[0].gain_ns == 0


def test_compute_counts_where_it_holds_up_everybody() -> None:
    assert gain(record(), "compute") == sum(COMPUTE_NS)
    assert gain(record(), "memory") == 0


def test_without_a_cause_all_are_tried_and_the_largest_comes_first() -> None:
    answer = WhatIf(record(2, 100_000)).answer()
    gains = [one.gain_ns for one in answer.removals]
    assert gains == sorted(gains, reverse=True)
    assert min(gains) > 0
    assert {"wait", "wait:2", "transfer", "host", "host:schedule", "compute"} == {
        one.cause for one in answer.removals
    }


@pytest.mark.parametrize("cause", ["", "wait:7", "wait:x", "nothing", "memory:3", "queue:1"])
def test_a_cause_that_means_nothing_is_an_error(cause: str) -> None:
    with pytest.raises(ConfigError, match=f"--no {cause}"):
        WhatIf(record()).answer([cause])


@pytest.mark.parametrize("name", [name for name in LATE if name != "two groups"])
def test_gains_on_generated_gpu_runs_are_what_the_run_without_the_delay_wins(
    name: str, tmp_path: Path
) -> None:
    """Graphs, hidden and fused communication, drifting clocks. What chance makes of the rank's
    lateness in the other run counts too."""
    scenario = SCENARIOS[name]
    cause = f"wait:{scenario.delays[0].rank}"
    answers = []
    for case, one in (("slow", scenario), ("fast", replace(scenario, delays=()))):
        write_kineto(simulate(one), tmp_path / case, KinetoStyle())
        found = prepare(read_traces([tmp_path / case]), AnalysisOptions(ceilings=CEILINGS))
        answers.append(WhatIf(found).answer([cause]))
    slow, fast = answers
    won = slow.removals[0].gain_ns - fast.removals[0].gain_ns
    assert won == pytest.approx(slow.wall_ns - fast.wall_ns, rel=0.02, abs=2000)


def test_a_rank_alone_is_replayed_without_meetings() -> None:
    run = record()
    alone = prepare_works(run.traces[:1], run.works[:1])
    answer = WhatIf(alone).answer(["host", "wait:0"])
    assert answer.num_meetings == 0
    assert answer.removals[0].gain_ns == HOST_NS * (NUM_STEPS - 1)
    assert "one rank" in answer.warnings[0]


def test_text_keeps_to_100_columns() -> None:
    text = render_whatif(WhatIf(record(1, 10**9)).answer())
    assert max(map(len, text.splitlines())) <= 100
    assert "rank 1 never later" in text
    assert "mean of 10 steps" in text
