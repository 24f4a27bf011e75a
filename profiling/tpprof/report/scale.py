"""The scale waterfall: from the wall that n ranks should need to the wall they do need, by cause.

Ideal is the wall of the smallest run divided by how many times more ranks there are. Each bar is
what one cause adds to it, in integer ns; the bars sum exactly from ideal to real. Kernel time of an
op that does `w` work in `t` is compared with the smallest run's `w1` and `t1` (s = share that this
rank should have had):

    t - s*t1  =  t * (1 - s*w1/w)   unsharded: this rank does more than its share
              +  t * s*w1/w - s*t1  thin: its share takes longer per unit of work

A bar below zero is a gain, such as a share that fits a cache.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from tpprof.errors import TraceError
from tpprof.report.collective_sums import waits_by_cause
from tpprof.report.op_sums import OpSum, sum_ops
from tpprof.report.whatif import Answer
from tpprof.report.wording import printable
from tpprof.results import ROLLUP, Report

FIXES = {
    "unsharded": "shard what every rank repeats (KV heads, norms by sequence, embedding)",
    "thin_gemms": "use kernels for thin shapes, fuse neighbours, or give them larger batches",
    "unmodelled": "price these kernels: --model config.json --tp N, or record with shapes",
    "kernel_gaps": "fewer and larger kernels; programmatic dependent launch",
    "transfer": "faster collective for these sizes, fewer bytes, or hide it under compute",
    "unsplit": "pass the traces of all ranks of that run",
    "wait": "make that rank arrive with the others",
    "host": "graphs, and preparing the next step while this one runs",
    "unrecorded": "record again with fewer steps or larger buffers",
    "queue": "more rows or KV blocks, or more replicas",
}
"""Kind of bar -> what would remove it."""

_TITLES = {
    "unsharded": "unsharded work",
    "thin_gemms": "thin GEMMs",
    "unmodelled": "kernels without a model",
    "kernel_gaps": "gaps and overlap of kernels",
    "transfer": "transfer",
    "unsplit": "communication, not split",
    "wait": "wait",
    "host": "host",
    "unrecorded": "unrecorded",
    "queue": "queue",
}
_ALWAYS = ("unsharded", "thin_gemms", "transfer", "wait", "host")
"""Kinds shown even where they are zero."""
_KERNELS = ("compute", "memory", "copy", "latency", "unmodelled", "graph_gap")
_HOST = tuple(leaf for leaf in ROLLUP["host"] if leaf != "unrecorded")
_MOST_CAUSES, _MOST_NAMED = 3, 3


@dataclass(frozen=True, slots=True)
class Bar:
    """What one cause adds."""

    kind: str
    """Key of FIXES."""
    title: str
    spent_ns: int
    """Negative where the larger run gains."""
    detail: str = ""
    """Ops or activities behind it, the largest first."""
    rank: int = -1
    """Whom a wait was for; -1 for other bars."""


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
    """Whose wall it is."""
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
    smallest = min(runs)
    return [
        _waterfall(smallest, runs[smallest], tp, runs[tp]) for tp in sorted(runs) if tp != smallest
    ]


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

    bars = _kernel_bars(smallest, report, share, growth(*_KERNELS))
    bars += [
        _bar("transfer", growth("comm_transfer", "fused_comm"), _collectives_named(report)),
        _bar("unsplit", growth("comm_unsplit")),
        *_wait_bars(report, growth("comm_wait")),
        _bar("host", growth(*_HOST), _host_named(report)),
        _bar("unrecorded", growth("unrecorded")),
        _bar("queue", growth("queue")),
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


def apportion(parts: Mapping[str, Fraction | int], total: int) -> dict[str, int]:
    """Whole numbers next to `parts` that sum to `total`: floors, and the largest remainders up."""
    floors = {key: int(part // 1) for key, part in parts.items()}
    missing = total - sum(floors.values())
    by_remainder = sorted(parts, key=lambda key: (floors[key] - parts[key], key))
    for i in range(abs(missing)):
        key = by_remainder[i % len(by_remainder)] if by_remainder else None
        if key is None:
            break
        floors[key] += 1 if missing > 0 else -1
    return floors


def _bar(kind: str, spent_ns: int, detail: str = "") -> Bar:
    return Bar(kind, _TITLES[kind], spent_ns, detail)


def _kernel_bars(smallest: Report, report: Report, share: Fraction, growth_ns: int) -> list[Bar]:
    """Four bars that sum to what kernel leaves grew by."""
    before = {op.key: op for op in sum_ops(smallest.ops, smallest.rank_shown)}
    after = {op.key: op for op in sum_ops(report.ops, report.rank_shown)}
    by_kind: dict[str, dict[str, Fraction]] = {"unsharded": {}, "thin_gemms": {}, "unmodelled": {}}
    for key in dict.fromkeys([*after, *before]):
        new, old = after.get(key), before.get(key)
        if "communication" in (new.bound if new else "", old.bound if old else ""):
            continue
        for kind, spent in _divide(old, new, share).items():
            by_kind[kind][key] = spent
    rounded = {kind: round(sum(each.values(), Fraction(0))) for kind, each in by_kind.items()}
    rest = growth_ns - sum(rounded.values())
    if abs(rest) * 1000 <= report.wall_ns and after:
        rounded["thin_gemms"] += rest
        rest = 0
    bars = [_bar(kind, ns, _largest(by_kind[kind])) for kind, ns in rounded.items()]
    return [*bars, _bar("kernel_gaps", rest)]


def _divide(old: OpSum | None, new: OpSum | None, share: Fraction) -> dict[str, Fraction]:
    """What one op adds, by kind of bar."""
    old_ns = Fraction(old.time_ns) * share if old else Fraction(0)
    new_ns = Fraction(new.time_ns) if new else Fraction(0)
    if old is None or new is None:
        return {"unmodelled": new_ns - old_ns}
    for names in ("flops", "bytes") if new.bound == "compute" else ("bytes", "flops"):
        work, fair = getattr(new, names), getattr(old, names) * share
        if work > 0 and fair > 0:
            kept = new_ns * fair / work
            return {"unsharded": new_ns - kept, "thin_gemms": kept - old_ns}
    return {"unmodelled": new_ns - old_ns}


def _largest(spent: Mapping[str, Fraction]) -> str:
    """The names behind a bar."""
    ordered = sorted(spent, key=lambda key: (-abs(spent[key]), key))
    return ", ".join(printable(key) for key in ordered[:_MOST_NAMED] if spent[key])


def _wait_bars(report: Report, growth_ns: int) -> list[Bar]:
    """What comm_wait grew by, divided like the waiting of this rank by whom and what it was for."""
    causes = waits_by_cause(report, report.rank_shown)
    total = sum(causes.values())
    if not total or growth_ns <= 0:
        return [_bar("wait", growth_ns)]
    named = list(causes.items())[:_MOST_CAUSES]
    parts = {str(i): Fraction(growth_ns * spent, total) for i, (_, spent) in enumerate(named)}
    parts["others"] = growth_ns - sum(parts.values(), Fraction(0))
    whole = apportion(parts, growth_ns)
    bars = []
    for i, ((rank, doing), _) in enumerate(named):
        title = f"wait for rank {rank}" if rank >= 0 else "wait, rank not told"
        bars.append(Bar("wait", title, whole[str(i)], printable(doing), rank))
    if whole["others"]:
        bars.append(Bar("wait", "wait, other causes", whole["others"]))
    return bars


def _collectives_named(report: Report) -> str:
    spent: dict[str, Fraction] = {}
    for one in report.collectives:
        if report.rank_shown in one.ranks:
            took = one.transfer_ns[one.ranks.index(report.rank_shown)]
            spent[one.name] = spent.get(one.name, Fraction(0)) + took
    return _largest(spent)


def _host_named(report: Report) -> str:
    shown = next((one for one in report.ranks if one.rank == report.rank_shown), None)
    parts = shown.host_parts if shown else {}
    return _largest({part: Fraction(spent) for part, spent in parts.items()})


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
