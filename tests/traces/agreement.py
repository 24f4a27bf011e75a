"""Compares what an analysis reports with what is true, leaf by leaf."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tpprof.analyze import AnalysisOptions, analyze
from tpprof.readers.read import read_traces
from tpprof.results import Report, Split, Window

from tests.traces.kineto import KinetoStyle, write_kineto
from tests.traces.scenario import CEILINGS, Scenario
from tests.traces.simulate import Run, simulate
from tests.traces.truth import SplitTruth, Truth
from tpinfer.costs.leaves import ROLLUP

TOLERANCE_NS = 1000
"""Per leaf and window."""


def analysed(paths: Sequence[Path], window: str = "all", **options: object) -> Report:
    """What tpprof finds in these files, judged by the ceilings that the truth is judged by."""
    given = {"ceilings": CEILINGS, "window": window, **options}
    return analyze(read_traces(paths), AnalysisOptions(**given))  # type: ignore[arg-type]


def recorded(
    scenario: Scenario,
    directory: Path,
    style: KinetoStyle | None = None,
    ranks: Sequence[int] | None = None,
) -> tuple[Run, list[Path]]:
    """A run and its Kineto files."""
    run = simulate(scenario)
    write_kineto(run, directory, style, ranks)
    return run, [directory]


def differences(
    found: Mapping[str, int], true: Mapping[str, int], tolerance_ns: int = TOLERANCE_NS
) -> dict[str, tuple[int, int]]:
    """Leaves that are further apart than allowed: (found, true)."""
    pairs = {leaf: (found.get(leaf, 0), true.get(leaf, 0)) for leaf in {*found, *true}}
    return {leaf: pair for leaf, pair in pairs.items() if abs(pair[0] - pair[1]) > tolerance_ns}


def faults(split: Split, true: SplitTruth, tolerance_ns: int = TOLERANCE_NS) -> list[str]:
    """What is wrong with one rank's split of one window; nothing if all is right."""
    wrong = [
        f"{leaf}: found {pair[0]}, true {pair[1]}"
        for leaf, pair in differences(split.leaves, true.leaves, tolerance_ns).items()
    ]
    if abs(split.wall_ns - true.wall_ns) > 1:
        wrong.append(f"wall: found {split.wall_ns}, true {true.wall_ns}")
    if abs(split.comm_hidden_ns - true.comm_hidden_ns) > tolerance_ns:
        wrong.append(f"hidden: found {split.comm_hidden_ns}, true {true.comm_hidden_ns}")
    return [f"rank {split.rank}: {text}" for text in wrong + inexact(split)]


def inexact(split: Split) -> list[str]:
    """Where a split does not add up; holds for every input."""
    wrong = []
    if sum(split.leaves.values()) != split.wall_ns:
        wrong.append(f"leaves sum to {sum(split.leaves.values())}, wall is {split.wall_ns}")
    if min(split.leaves.values(), default=0) < 0:
        wrong.append(f"a leaf is negative: {split.leaves}")
    if set(split.rollup) != set(ROLLUP) or sum(split.rollup.values()) != split.wall_ns:
        wrong.append(f"roll-up {split.rollup} is not the wall {split.wall_ns}")
    if sum(split.host_parts.values()) != split.leaves.get("host", 0):
        wrong.append(f"host parts {split.host_parts} are not the leaf host")
    return wrong


def window_faults(
    window: Window, truth: Truth, spans: Sequence[tuple[int, ...]], tolerance_ns: int = TOLERANCE_NS
) -> list[str]:
    """Of one window on every rank; `spans` holds (start, end) or (start, end, queued until) on
    each rank's clock."""
    if [split.rank for split in window.ranks] != list(range(len(spans))):
        return [f"{window.label}: ranks {[split.rank for split in window.ranks]}"]
    return [
        f"{window.label}: {text}"
        for split, span in zip(window.ranks, spans, strict=True)
        for text in faults(split, truth.split(split.rank, *span), tolerance_ns)
    ]
