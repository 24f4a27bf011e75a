"""The whole analysis: traces of one run in, one `Report` out.

`prepare` does what does not depend on the question (verdicts, matching, clocks, waits, sweep);
`analyze` asks for windows and groups and puts the report together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from tpinfer.config.ceilings import Ceilings
from tpinfer.config.model import ModelSpec
from tpprof import intervals
from tpprof.attribute.clock_losses import ClockLosses, clock_losses, device_clock
from tpprof.attribute.coverage import cover
from tpprof.attribute.findings import RankFindings, prepare_works
from tpprof.attribute.floors import ops_table
from tpprof.attribute.grouping import GROUPINGS, group
from tpprof.attribute.idle import LaunchFloors
from tpprof.attribute.timeline import add_splits
from tpprof.attribute.windows import WINDOWS, Stretch, Wanted, wanted_windows
from tpprof.classify.work import Work, WorkKind
from tpprof.errors import TraceError
from tpprof.events import Trace
from tpprof.ranks.table import estimated_results, matched_results
from tpprof.results import CollectiveResult, Group, OpResult, Report, Split, Window

MOST_DILATION = 1.05
"""Recording that slows a run more than this says little about its gaps."""

_WHERE_FROM = {
    "all": "was the profiler stopped?",
    "steps": "its engine must annotate steps; ask for --window all",
    "ttft": "record a tpinfer run from its first step (--profile-skip 0), or ask for --window all",
    "itl": "record two tokens of a tpinfer run, or ask for --window steps or all",
}
"""By window what a recording without any of it needs."""


@dataclass(frozen=True)
class AnalysisOptions:
    """What is asked, and what kernels are judged by."""

    window: str = "all"
    """Of WINDOWS."""
    by: str = ""
    """Of GROUPINGS; "" for no table."""
    ceilings: Ceilings | None = None
    """Of one rank; None takes what the recording brings along."""
    model: ModelSpec | Path | None = None
    """Shape of the model, or its config.json, for kernels that carry no shapes."""
    tp: int | None = None
    """Tensor-parallel ranks, where the recording does not tell."""
    manifests: Mapping[int, Path] | None = None
    """Cost manifest per rank; None looks beside the traces."""
    dilation: float | None = None
    """Profiled over unprofiled wall; None looks for `run.json` beside the traces."""
    floors: LaunchFloors = field(default_factory=LaunchFloors)


def analyze(traces: Sequence[Trace], options: AnalysisOptions | None = None) -> Report:
    """Where the wall of these ranks went.

    Raises TraceError for no traces, two of one rank, or options that do not exist.
    """
    options = options or AnalysisOptions()
    _check_options(options)
    return report_on(prepare(traces, options), options)


def prepare(traces: Sequence[Trace], options: AnalysisOptions | None = None) -> RankFindings:
    """Judge, match, align and sweep. Raises TraceError as `analyze`."""
    from tpprof.classify.classify import classify_trace
    from tpprof.classify.sources import cost_source

    options = options or AnalysisOptions()
    traces = _in_rank_order(traces)
    manifests = options.manifests or {}
    sources = [
        cost_source(trace, manifests.get(trace.rank), options.model, options.tp) for trace in traces
    ]
    works = [
        classify_trace(trace, options.ceilings, source)
        for trace, source in zip(traces, sources, strict=True)
    ]
    manifest = sources[0].manifest
    ceilings = options.ceilings or (manifest.ceilings if manifest else None)
    return prepare_works(traces, works, options.floors, ceilings)


def _check_options(options: AnalysisOptions) -> None:
    if options.window not in WINDOWS:
        raise TraceError(
            f"window {options.window!r} does not exist; there are {', '.join(WINDOWS)}"
        )
    if options.by and options.by not in GROUPINGS:
        raise TraceError(
            f"grouping by {options.by!r} does not exist; there are {', '.join(GROUPINGS)}"
        )


def _in_rank_order(traces: Sequence[Trace]) -> list[Trace]:
    if not traces:
        raise TraceError("no traces were given; name the files of one run, one a rank")
    traces = sorted(traces, key=lambda trace: trace.rank)
    for one, other in pairwise(traces):
        if one.rank == other.rank:
            raise TraceError(
                f"rank {one.rank} is in {one.source} and in {other.source}; name the files of one "
                "run, one a rank"
            )
    return traces


def report_on(found: RankFindings, options: AnalysisOptions) -> Report:
    """The report about one kind of window."""
    wanted, told = wanted_windows(options.window, found.hosts, found.clocks)
    columns = range(len(found.traces))
    stretches = [[w.by_column[i] for w in wanted if i in w.by_column] for i in columns]
    windows = [_window(found, one) for one in wanted]
    splits = _totals(found, windows)
    by_step = options.window in ("all", "steps")
    chosen = [_in_windows(found.works[i], stretches[i], by_step) for i in columns]
    shown = splits[0]
    losses = _clock_losses(found)
    dilation = found.capture.dilation if options.dilation is None else options.dilation
    if dilation is not None and dilation > MOST_DILATION:
        told.append(
            f"recording made the run {dilation:.2f} times as long: nothing is claimed about gaps"
        )
    if found.capture.emulation:
        told.insert(0, f"{found.capture.emulation}; no cause is named")
    if not wanted:
        remedy = _WHERE_FROM[options.window]
        told.append(f"the recording has no windows of the kind {options.window}; {remedy}")
    return Report(
        wall_ns=shown.wall_ns,
        leaves=shown.leaves,
        rollup=shown.rollup,
        ranks=splits,
        collectives=_collectives(found, chosen),
        coverage=cover(found.traces, found.works, chosen, _matched_rows(found), splits),
        clock_alignment={str(clock.rank): clock.alignment() for clock in found.clocks},
        dilation=dilation,
        warnings=[*found.warnings, *told],
        rank_shown=found.traces[0].rank,
        windows=windows,
        by=options.by,
        groups=_groups(found, options.by, wanted) if options.by else [],
        ops=_ops(found, chosen, losses),
        device_clocks=[
            device_clock(
                found.works[i], chosen[i], found.capture.samples[found.traces[i].rank], one
            )
            for i, one in losses.items()
        ],
        ceilings=_describe_ceilings(found.ceilings),
        emulation=found.capture.emulation,
        sources=list(dict.fromkeys(trace.source for trace in found.traces)),
    )


def _window(found: RankFindings, wanted: Wanted) -> Window:
    splits = [
        found.timelines[i].split(one.start_ns, one.end_ns, one.begun_ns)
        for i, one in wanted.by_column.items()
    ]
    first = min(wanted.by_column)
    edges = np.array([wanted.by_column[first].start_ns, wanted.by_column[first].end_ns])
    if first and found.clocks[first].accepted:
        edges = found.clocks[first].to_reference(edges)
    return Window(wanted.label, int(edges[0]), int(edges[1]), splits)


def _totals(found: RankFindings, windows: Sequence[Window]) -> list[Split]:
    """Per rank the sum of its windows."""
    by_rank: dict[int, list[Split]] = {trace.rank: [] for trace in found.traces}
    for window in windows:
        for split in window.ranks:
            by_rank[split.rank].append(split)
    nothing = [timeline.split(0, 0) for timeline in found.timelines]
    return [
        add_splits(splits) if splits else none
        for splits, none in zip(by_rank.values(), nothing, strict=True)
    ]


def _in_windows(work: Work, stretches: Sequence[Stretch], by_step: bool) -> np.ndarray:
    """Rows of the Work that started inside any of the stretches; with `by_step` also those that a
    step launched and that ran behind its annotation."""
    union = intervals.merge(
        np.array([one.start_ns for one in stretches], np.int64),
        np.array([one.end_ns for one in stretches], np.int64),
    )
    inside = intervals.locate(*union, work.start_ns) >= 0
    return np.flatnonzero(inside | (work.step >= 0) if by_step else inside)


def _matched_rows(found: RankFindings) -> list[np.ndarray]:
    if found.is_estimated:
        return [np.zeros(len(work), bool) for work in found.works]
    return [one.known for one in found.ready]


def _collectives(found: RankFindings, chosen: Sequence[np.ndarray]) -> list[CollectiveResult]:
    if found.is_estimated:
        mine, work = chosen[0], found.works[0]
        comm = np.isin(work.kind[mine], (WorkKind.COMM, WorkKind.FUSED_COMM))
        comm &= work.comm_size[mine] != 1
        return estimated_results(found.traces[0], found.works[0], found.ready[0], chosen[0][comm])
    inside = np.zeros(len(found.waits.row), bool)
    for i, rows in enumerate(chosen):
        entry = found.matched.work[found.waits.row, i]
        inside |= np.isin(entry, rows) & (entry >= 0)
    results = matched_results(
        found.matched, found.waits, inside, found.traces, found.works, found.clocks
    )
    if not found.capture.emulation:
        return results
    # Ranks take turns on one GPU: who comes last says nothing about a machine.
    return [replace(one, last_rank=-1, last_rank_was="") for one in results]


def _groups(found: RankFindings, by: str, wanted: Sequence[Wanted]) -> list[Group]:
    groups: list[Group] = []
    for i, (trace, work, host) in enumerate(
        zip(found.traces, found.works, found.hosts, strict=True)
    ):
        windows = []
        for one in wanted:
            if i in one.by_column:
                stretch = one.by_column[i]
                begun = stretch.begun_ns
                pieces = found.timelines[i].clip(begun, stretch.end_ns)
                wall = stretch.end_ns - stretch.start_ns
                windows.append((pieces, wall, begun - stretch.start_ns))
        groups += group(by, trace, work, host.steps, windows)
    return groups


def _ops(
    found: RankFindings, chosen: Sequence[np.ndarray], losses: Mapping[int, ClockLosses]
) -> list[OpResult]:
    rows = enumerate(zip(found.traces, found.works, chosen, strict=True))
    return [op for i, row in rows for op in ops_table(*row, losses.get(i))]


def _clock_losses(found: RankFindings) -> dict[int, ClockLosses]:
    """By place of the rank, where its clocks were sampled while it was recorded."""
    losses = {}
    for i, (trace, work) in enumerate(zip(found.traces, found.works, strict=True)):
        samples = found.capture.samples.get(trace.rank)
        if samples is not None and found.ceilings is not None:
            one = clock_losses(work, samples, found.ceilings)
            if one is not None:
                losses[i] = one
    return losses


def _describe_ceilings(ceilings: Ceilings | None) -> dict[str, object]:
    if ceilings is None:
        return {}
    return {
        "memory": [
            {
                "name": level.name,
                "capacity_bytes": level.capacity_bytes,
                "bytes_per_s": level.bytes_per_s,
            }
            for level in ceilings.memory
        ],
        "flops_per_s": {dtype.value: rate for dtype, rate in ceilings.flops_per_s.items()},
        "kernel_floor_s": ceilings.kernel_floor_s,
        "collective_latency_s": ceilings.collective_latency_s,
        "collective_bytes_per_s": ceilings.collective_bytes_per_s,
        "origin": ceilings.origin,
    }
