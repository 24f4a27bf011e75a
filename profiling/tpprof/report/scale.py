"""The scale waterfall: from the wall that n ranks should need to the wall they do need, by cause.

Ideal is the wall of the smallest run divided by how many times more ranks there are. Each bar is
what one cause adds to it, in integer ns; the bars sum exactly from ideal to real. Kernel time of an
op that does `w` work in `t` is compared with the smallest run's `w1` and `t1` (s = share that this
rank should have had):

    t - s*t1  =  t * (1 - s*w1/w)   unsharded: this rank does more than its share
              +  t * s*w1/w - s*t1  thin: its share takes longer per unit of work

A bar below zero is a gain, such as a share that fits a cache. Ranks in lockstep have one wall; the
rank that waits longest tells most about it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from tpinfer.costs.leaves import ROLLUP
from tpprof.errors import TraceError
from tpprof.report.scale_causes import (
    FIXES,
    Bar,
    apportion,
    collectives_named,
    host_named,
    kernel_bars,
    make_bar,
    wait_bars,
)
from tpprof.report.whatif import Answer
from tpprof.results import Report

_ALWAYS = ("unsharded", "thin_gemms", "transfer", "wait", "host")
"""Kinds shown even where they are zero."""
_KERNELS = ("compute", "memory", "copy", "latency", "unmodelled", "graph_gap")
_HOST = tuple(leaf for leaf in ROLLUP["host"] if leaf != "unrecorded")


@dataclass(frozen=True, slots=True)
class Fix:
    """What removing a cause would win, if nothing came in its place."""

    title: str
    saved_ns: int
    """By replay of the ranks where there was one, else all of the bar."""
    speedup: float
    """Against the smallest run, without this cause."""
    detail: str
    remedy: str
    is_replayed: bool = False


@dataclass(frozen=True, slots=True)
class Waterfall:
    """One run against the smallest one. Times are of `num_windows` windows of this run."""

    tp: int
    smallest_tp: int
    num_windows: int
    """Steps, or whatever windows were compared; 1 for a whole recording."""
    rank: int
    """Whose wall it is: the one that waits longest for the others."""
    ideal_ns: int
    real_ns: int
    bars: list[Bar]
    warnings: list[str] = field(default_factory=list)
    replayed_ns: dict[str, int] = field(default_factory=dict)
    """Gain by cause as `whatif` names them, where this run's traces were there to be replayed."""

    @property
    def speedup(self) -> float:
        """Against the smallest run."""
        scale = self.tp / self.smallest_tp
        return scale * self.ideal_ns / self.real_ns if self.real_ns else 0.0

    @property
    def efficiency(self) -> float:
        """Ideal over real."""
        return self.ideal_ns / self.real_ns if self.real_ns else 0.0

    @property
    def waits(self) -> bool:
        """Whether any waiting for a later rank was found."""
        return any(bar.kind == "wait" and bar.spent_ns > 0 for bar in self.bars)

    @property
    def fixes(self) -> list["Fix"]:
        """What costs time, waits for one rank together, the largest first."""
        costs: dict[tuple[str, int], list[Bar]] = {}
        for bar in self.bars:
            if bar.spent_ns > 0:
                costs.setdefault((bar.kind, bar.rank), []).append(bar)
        fixes = [self._fix(kind, rank, bars) for (kind, rank), bars in costs.items()]
        return sorted(fixes, key=lambda fix: -fix.saved_ns)

    def _fix(self, kind: str, rank: int, bars: list[Bar]) -> "Fix":
        replayed = self.replayed_ns.get(f"wait:{rank}" if kind == "wait" else kind)
        saved = sum(bar.spent_ns for bar in bars) if replayed is None else replayed
        left = self.real_ns - saved
        speedup = self.tp / self.smallest_tp * self.ideal_ns / left if left > 0 else 0.0
        detail = ", ".join(bar.detail for bar in bars if bar.detail)
        return Fix(bars[0].title, saved, speedup, detail, FIXES[kind], replayed is not None)


def build_waterfalls(runs: Mapping[int, Report]) -> list[Waterfall]:
    """One waterfall per run larger than the smallest; `runs` by number of tensor-parallel ranks.

    Raises TraceError for less than two runs or a run without wall time.
    """
    if len(runs) < 2:
        raise TraceError(
            f"{len(runs)} size of run was given, scale compares at least two; pass directories "
            "of traces with different numbers of ranks, such as runs/tp1 runs/tp2"
        )
    for tp, report in runs.items():
        if report.wall_ns <= 0:
            raise TraceError(f"the run of tp={tp} has no wall time; pass traces that hold steps")
    runs = {tp: seen_from_who_waits(report) for tp, report in runs.items()}
    smallest = min(runs)
    return [
        _waterfall(smallest, runs[smallest], tp, runs[tp]) for tp in sorted(runs) if tp != smallest
    ]


def seen_from_who_waits(report: Report) -> Report:
    """The report as the rank that waits longest for the others sees it: its kernels are not the
    slow ones, and its waiting names whose are. Only ranks with nearly the wall of the rank shown
    count; without any waiting it stays that rank."""
    alike = [
        one for one in report.ranks if 20 * abs(one.wall_ns - report.wall_ns) <= report.wall_ns
    ]
    waits = {one.rank: one.leaves.get("comm_wait", 0) for one in alike}
    shown_wait = waits.get(report.rank_shown, 0)
    most = max(alike, key=lambda one: (waits[one.rank], -one.rank), default=None)
    if most is None or waits[most.rank] <= shown_wait:
        return report
    return replace(
        report,
        rank_shown=most.rank,
        wall_ns=most.wall_ns,
        leaves=most.leaves,
        rollup=most.rollup,
    )


def _waterfall(smallest_tp: int, smallest: Report, tp: int, report: Report) -> Waterfall:
    windows = max(1, len(report.windows)), max(1, len(smallest.windows))
    share = Fraction(smallest_tp * windows[0], tp * windows[1])
    ideal_ns = int(smallest.wall_ns * share)
    fair = apportion({leaf: ns * share for leaf, ns in smallest.leaves.items()}, ideal_ns)
    grown = {
        leaf: report.leaves.get(leaf, 0) - fair.get(leaf, 0) for leaf in {**report.leaves, **fair}
    }

    def growth(*leaves: str) -> int:
        return sum(grown.get(leaf, 0) for leaf in leaves)

    bars = kernel_bars(smallest, report, share, growth(*_KERNELS))
    bars += [
        make_bar("transfer", growth("comm_transfer", "fused_comm"), collectives_named(report)),
        make_bar("unsplit", growth("comm_unsplit")),
        *wait_bars(report, growth("comm_wait")),
        make_bar("host", growth(*_HOST), host_named(report)),
        make_bar("unrecorded", growth("unrecorded")),
        make_bar("queue", growth("queue")),
    ]
    bars = [bar for bar in bars if bar.spent_ns or bar.kind in _ALWAYS]
    total = ideal_ns + sum(bar.spent_ns for bar in bars)
    assert total == report.wall_ns, f"bars lead to {total} ns, the wall is {report.wall_ns} ns"
    return Waterfall(
        tp=tp,
        smallest_tp=smallest_tp,
        num_windows=windows[0],
        rank=report.rank_shown,
        ideal_ns=ideal_ns,
        real_ns=report.wall_ns,
        bars=bars,
        warnings=_doubts(smallest_tp, smallest, tp, report),
    )


def with_replay(one: Waterfall, answer: Answer) -> Waterfall:
    """The same with what removing a late rank, slow transfer or the host wins by replay."""
    share = Fraction(one.num_windows, answer.num_steps)
    gains = {removal.cause: round(removal.gain_ns * share) for removal in answer.removals}
    return replace(one, replayed_ns=gains)


def replayed_causes(one: Waterfall) -> list[str]:
    """What to ask `whatif` for the fixes of this waterfall."""
    late = {bar.rank for bar in one.bars if bar.kind == "wait" and bar.rank >= 0}
    return ["transfer", "host", *(f"wait:{rank}" for rank in sorted(late))]


def _doubts(smallest_tp: int, smallest: Report, tp: int, report: Report) -> list[str]:
    """Why two runs may not be comparable."""
    doubts = []
    counts = [_phases(one) for one in (smallest, report)]
    mixes = [{phase: Fraction(n, sum(c.values())) for phase, n in c.items()} for c in counts]
    if mixes[0] != mixes[1]:
        texts = [", ".join(f"{n} {phase}" for phase, n in sorted(c.items())) for c in counts]
        doubts.append(
            f"tp={smallest_tp} has windows {texts[0] or 'of no kind'}, tp={tp} has "
            f"{texts[1] or 'none'}: record the same steps at both sizes"
        )
    for size, one in ((smallest_tp, smallest), (tp, report)):
        if one.emulation:
            doubts.append(f"tp={size} is {one.emulation}")
        if one.dilation is not None and one.dilation > 1.05:
            doubts.append(
                f"tp={size} ran {one.dilation:.2f} times as long while it was recorded: gaps and "
                "host time of it are overstated"
            )
    return doubts


def _phases(report: Report) -> dict[str, int]:
    """Windows by the words of their labels, numbers left out."""
    counts: dict[str, int] = {}
    for window in report.windows:
        kind = " ".join(re.sub(r"\d+|[()]", "", window.label).split())
        counts[kind] = counts.get(kind, 0) + 1
    return counts
