"""tpprof against truth on runs drawn at random: every feature may meet every other."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces.agreement import analysed, faults, window_faults
from tests.traces.kineto import KinetoStyle, write_kineto
from tests.traces.names import ENGINES
from tests.traces.nsight import write_nsight_per_rank
from tests.traces.scenario import Clock, Delay, Scenario
from tests.traces.simulate import simulate
from tests.traces.truth import Truth, truth_of

LATE = st.sampled_from([0, 20_000, 150_000, 700_000])


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Any run with enough collectives for clocks to be found."""
    ranks = draw(st.integers(1, 4))
    is_graph = draw(st.booleans())
    is_hidden = not is_graph and draw(st.booleans())
    clocks = st.builds(Clock, st.integers(-(10**10), 10**10), st.integers(-100, 100))
    delays = st.builds(
        Delay,
        st.integers(0, ranks - 1),
        LATE,
        st.sampled_from(["host", "kernel"]),
        st.one_of(st.none(), st.integers(0, 3)),
        st.one_of(st.none(), st.integers(0, 1)),
    )
    return Scenario(
        "random",
        num_ranks=ranks,
        num_steps=draw(st.integers(3, 6)),
        num_layers=draw(st.integers(2, 3)),
        seed=draw(st.integers(0, 10**6)),
        clocks=(Clock(), *draw(st.lists(clocks, max_size=3))),
        delays=tuple(draw(st.lists(delays, max_size=2))),
        is_graph=is_graph,
        is_async=draw(st.booleans()),
        is_hidden=is_hidden,
        collective=draw(st.sampled_from(["nccl", "custom", "fused"])),
        overlap_ns=draw(st.sampled_from([0, 0, 1500])),
        queue_gap_ns=draw(st.sampled_from([0, 0, 700])),
        event_latency_ns=draw(st.sampled_from([0, 30_000])),
        late_start_ns=0 if is_hidden else draw(st.sampled_from([0, 0, 40_000])),
        launch_ns=draw(st.sampled_from([1500, 4000, 12_000])),
        operator_ns=draw(st.sampled_from([600, 30_000])),
        batch=draw(st.sampled_from([1, 8])),
    )


def wrong_steps(scenario: Scenario, paths: list[Path], truth: Truth) -> list[str]:
    """Of all step windows."""
    steps = [truth.steps(rank) for rank in range(scenario.num_ranks)]
    windows = analysed(paths, "steps").windows
    assert len(windows) == scenario.num_steps
    return [
        text
        for index, window in enumerate(windows)
        for text in window_faults(window, truth, [mine[index] for mine in steps])
    ]


def wrong_whole(paths: list[Path], truth: Truth) -> list[str]:
    """Of the whole run."""
    return [
        text
        for split in analysed(paths).ranks
        for text in faults(split, truth.split(split.rank, *truth.whole(split.rank)))
    ]


@settings(max_examples=25)
@given(
    scenarios(),
    st.sampled_from(ENGINES),
    st.sampled_from(["seq", "plain", "none"]),
    st.integers(0, 9),
)
def test_kineto(scenario: Scenario, engine: str, args: str, order: int) -> None:
    run = simulate(scenario)
    style = KinetoStyle(engine, collective_args=args, shuffle_seed=order, is_compressed=False)
    with TemporaryDirectory() as directory:
        write_kineto(run, Path(directory), style)
        assert wrong_whole([Path(directory)], truth_of(run)) == []
        assert wrong_steps(scenario, [Path(directory)], truth_of(run)) == []


@settings(max_examples=10)
@given(scenarios())
def test_nsight(scenario: Scenario) -> None:
    run = simulate(scenario)
    truth = truth_of(run, has_shapes=False)
    with TemporaryDirectory() as directory:
        write_nsight_per_rank(run, Path(directory))
        assert wrong_whole([Path(directory)], truth) == []
        assert wrong_steps(scenario, [Path(directory)], truth) == []
