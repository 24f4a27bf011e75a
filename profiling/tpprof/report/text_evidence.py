"""Parts of the terminal report that the sums rest on: collectives, floors, coverage, clocks."""

from collections.abc import Mapping, Sequence

from tpinfer.config.units import format_flops, format_rate, format_size, format_time
from tpprof.ranks.wait import EARLIER
from tpprof.report.clock_wording import describe_clock, describe_lost_to_clocks
from tpprof.report.collective_sums import CollectiveSum, sum_collectives
from tpprof.report.op_sums import OpSum, add_clocks, sum_ops
from tpprof.report.rates import flop_rates, memory_levels, positive
from tpprof.report.wording import (
    duration,
    kernel_label,
    milliseconds,
    percent,
    plural,
    printable,
    shorten,
    wrapped,
)
from tpprof.results import Alignment, Report

_MOST_COLLECTIVES, _MOST_OPS, _MOST_RANKS = 8, 12, 8
COVERED = {
    "layer": ("device time", "with a layer"),
    "flop_model": ("device time", "with a FLOP and byte model"),
    "launch_link": ("device time", "with its launch"),
    "comm_bytes": ("collectives", "with known bytes"),
    "matched_ranks": ("collectives", "matched over ranks"),
    "explained": ("the wall", "explained"),
}
"""Field of `Coverage` -> (what it is a share of, what that share has)."""


def render_collectives(report: Report) -> str:
    """A line per kind and one for the wait and transfer of each rank; empty without any."""
    sums = sum_collectives(report.collectives)
    if not sums:
        return ""
    lines = [
        f"{'collectives':<34}{'count':>7}{'bytes':>10}{'busbw GB/s':>12}"
        "  who came last, and doing what"
    ]
    for one in sums[:_MOST_COLLECTIVES]:
        lines += _collective_lines(one)
    left = sums[_MOST_COLLECTIVES:]
    if left:
        spent = duration(sum(one.time_ns for one in left))
        lines.append(f"({plural(len(left), 'more kind')}: {spent} over all ranks)")
    return "\n".join(lines)


def _collective_lines(one: CollectiveSum) -> list[str]:
    size = format_size(one.bytes) if one.bytes >= 0 else "?"
    busbw = f"{one.busbw_gbps:.3g}" if one.busbw_gbps is not None else "?"
    mark = "" if one.method == "matched" else " (estimated)"
    first = f"{shorten(one.name, 34 - len(mark)) + mark:<34}{one.count:>7}{size:>10}{busbw:>12}"
    lines = [f"{first}  {_late(one)}".rstrip()]
    for what, spent in (("wait", one.wait_ns), ("transfer", one.transfer_ns)):
        lines.append(f"  {what:<9}{_each_rank(one.ranks, spent)}")
    return lines


def _each_rank(ranks: Sequence[int], spent_ns: Sequence[int]) -> str:
    if len(ranks) <= 4:
        each = (f"rank {r} {milliseconds(ns)} ms" for r, ns in zip(ranks, spent_ns, strict=True))
        return ", ".join(each)
    low, high = min(spent_ns), max(spent_ns)
    return (
        f"{milliseconds(low)} (rank {ranks[spent_ns.index(low)]}) to {milliseconds(high)} ms "
        f"(rank {ranks[spent_ns.index(high)]}), mean {milliseconds(sum(spent_ns) / len(ranks))} ms"
    )


def _late(one: CollectiveSum) -> str:
    rank, doing, share = one.worst
    if rank < 0:
        return "not told"
    doing = doing.replace(EARLIER, "in ", 1) if doing.startswith(EARLIER) else doing
    return f"rank {rank} {100 * share:.0f}%" + (f": {shorten(doing, 22)}" if doing else "")


def render_ops(report: Report) -> str:
    """Floor and lost of the ops that took longest on the rank shown, and what of it the clocks are
    where they were sampled; empty without any."""
    sums = sum_ops(report.ops, report.rank_shown)
    if not sums:
        return ""
    shows = any(one.clocks_ns is not None for one in sums)
    title = f"{f'rank {report.rank_shown}: time against its limit':<38}"
    clocks = f"{'clocks':>9}" if shows else ""
    lines = [
        f"{title[: _label_width(shows)]}{'count':>7}{'ms':>10}{'floor':>10}{'lost':>10}"
        f"{clocks}{'of limit':>9}  bound by"
    ]
    lines += [_op_line(one, shows) for one in sums[:_MOST_OPS]]
    if len(sums) > _MOST_OPS:
        left = sums[_MOST_OPS:]
        lines.append(_op_line(_added(f"({plural(len(left), 'smaller one')})", left), shows))
    lines.append(_op_line(_added("all", sums), shows))
    shown = [one for one in report.device_clocks if one.rank == report.rank_shown]
    lines += [line for one in shown for line in wrapped(describe_lost_to_clocks(one), 0)]
    return "\n".join(lines)


def _label_width(shows_clocks: bool) -> int:
    return 30 if shows_clocks else 38


def _added(key: str, sums: Sequence[OpSum]) -> OpSum:
    return OpSum(
        key,
        sum(one.time_ns for one in sums),
        sum(one.floor_ns for one in sums),
        sum(one.count for one in sums),
        0,
        0,
        "",
        add_clocks(one.clocks_ns for one in sums),
    )


def _op_line(one: OpSum, shows_clocks: bool) -> str:
    floor = milliseconds(one.floor_ns) if one.floor_ns else "?"
    lost = milliseconds(one.lost_ns) if one.floor_ns else "?"
    share = percent(one.floor_ns, one.time_ns) if one.floor_ns else "?"
    is_known = one.floor_ns and one.clocks_ns is not None
    clocks = milliseconds(one.clocks_ns or 0) if is_known else "?"
    column = f"{clocks:>9}" if shows_clocks else ""
    width = _label_width(shows_clocks)
    return (
        f"{kernel_label(one.key, width):<{width}}{one.count:>7}{milliseconds(one.time_ns):>10}"
        f"{floor:>10}{lost:>10}{column}{share:>9}  {one.bound}"
    ).rstrip()


def render_evidence(report: Report) -> str:
    """What the statements rest on, and what could not be told."""
    lines = ["How sure this is"]
    if report.method == "trace":
        lines += _item("coverage", describe_coverage(report))
    lines += [line for text in clocks_of(report) for line in _item("clock", text)]
    lines += [line for one in report.device_clocks for line in _item("device", describe_clock(one))]
    lines += _item("recorder", describe_dilation(report.dilation))
    if report.ceilings:
        lines += _item("ceilings", describe_ceilings(report.ceilings))
    lines += _item("sum", f"the leaves and the wall differ by {report.residual_ns} ns")
    for warning in report.warnings:
        lines += _item("warning", printable(warning))
    return "\n".join(lines)


def _item(label: str, text: str) -> list[str]:
    first, *others = wrapped(text, 11)
    return [f"{label:<11}{first[11:]}", *others]


def covered(report: Report) -> list[tuple[str, str, float]]:
    """(whole, what the share has, share) of everything that this run has at all."""
    found = [(whole, has, getattr(report.coverage, name)) for name, (whole, has) in COVERED.items()]
    communicates = bool(report.collectives or report.rollup.get("communication"))
    return [one for one in found if communicates or one[0] != "collectives"]


def describe_coverage(report: Report) -> str:
    """The shares that the report rests on."""
    by_whole: dict[str, list[str]] = {}
    for whole, has, share in covered(report):
        by_whole.setdefault(whole, []).append(f"{has} {percent(share, 1)}")
    return "; ".join(f"of {whole}: {', '.join(each)}" for whole, each in by_whole.items())


def clocks_of(report: Report) -> list[str]:
    """A line for each rank's clock; none for a rank alone."""
    found = report.clock_alignment
    return [describe_alignment(rank, one) for rank, one in found.items()] if len(found) > 1 else []


def describe_alignment(rank: str, one: Alignment) -> str:
    """One rank's clock in one line."""
    if not one.accepted:
        return f"rank {rank}: not aligned, {printable(one.reason) or 'no reason was recorded'}"
    if not one.num_samples:
        return f"rank {rank}: {printable(one.reason) or 'the clock that others are aligned to'}"
    return (
        f"rank {rank}: {duration(one.offset_ns)} off, drift {one.drift_ppm:.2f} ppm, residual "
        f"{duration(one.residual_ns)} over {plural(one.num_samples, 'collective')}"
    )


def describe_dilation(dilation: float | None) -> str:
    """What recording did to the wall."""
    if dilation is None:
        return "nobody measured how much slower the run was while it was recorded"
    claim = "; above 5% nothing is claimed about gaps" if dilation > 1.05 else ""
    return f"the run took {dilation:.3f} times as long while it was recorded{claim}"


def describe_ceilings(ceilings: Mapping[str, object]) -> str:
    """The rates that were used, whichever of them are there."""
    parts = [f"{name} {format_rate(rate)}" for name, rate in memory_levels(ceilings).items()]
    parts += [f"{dtype} {format_flops(rate)}" for dtype, rate in flop_rates(ceilings).items()]
    kernel, meeting, bus = (
        positive(ceilings, key)
        for key in ("kernel_floor_s", "collective_latency_s", "collective_bytes_per_s")
    )
    if kernel is not None:
        parts.append(f"a kernel at least {format_time(kernel)}")
    if meeting is not None:
        parts.append(f"a collective {format_time(meeting)}")
    if bus is not None:
        parts.append(f"bus {format_rate(bus)}")
    origin = printable(str(ceilings.get("origin") or "origin not recorded"))
    return f"{printable(', '.join(parts)) or 'none'} ({origin})"
