"""The bars of a scale waterfall: what each cause adds to the ideal wall, in whole ns."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from tpprof.report.collective_sums import waits_by_cause
from tpprof.report.op_sums import OpSum, sum_ops
from tpprof.report.wording import printable
from tpprof.results import Report

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


def make_bar(kind: str, spent_ns: int, detail: str = "") -> Bar:
    """A bar with the title of its kind."""
    return Bar(kind, _TITLES[kind], spent_ns, detail)


def kernel_bars(smallest: Report, report: Report, share: Fraction, growth_ns: int) -> list[Bar]:
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
    bars = [make_bar(kind, ns, _largest(by_kind[kind])) for kind, ns in rounded.items()]
    return [*bars, make_bar("kernel_gaps", rest)]


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


def wait_bars(report: Report, growth_ns: int) -> list[Bar]:
    """What comm_wait grew by, divided like the waiting of this rank by whom and what it was for."""
    causes = waits_by_cause(report, report.rank_shown)
    total = sum(causes.values())
    if not total or growth_ns <= 0:
        return [make_bar("wait", growth_ns)]
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


def collectives_named(report: Report) -> str:
    """The collectives that the rank shown spent most transfer on."""
    spent: dict[str, Fraction] = {}
    for one in report.collectives:
        if report.rank_shown in one.ranks:
            took = one.transfer_ns[one.ranks.index(report.rank_shown)]
            spent[one.name] = spent.get(one.name, Fraction(0)) + took
    return _largest(spent)


def host_named(report: Report) -> str:
    """What the host of the rank shown did most."""
    shown = next((one for one in report.ranks if one.rank == report.rank_shown), None)
    parts = shown.host_parts if shown else {}
    return _largest({part: Fraction(spent) for part, spent in parts.items()})
