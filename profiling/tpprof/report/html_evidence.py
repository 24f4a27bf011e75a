"""Charts of what the sums rest on: collectives, distance to the limit, coverage and clocks."""

from collections.abc import Sequence

from tpinfer.config.units import format_rate
from tpprof.ranks.wait import EARLIER
from tpprof.report.clock_wording import describe_clock, describe_lost_to_clocks
from tpprof.report.collective_sums import CollectiveSum
from tpprof.report.html_svg import (
    WIDTH,
    chart,
    element,
    label,
    legend,
    rect,
    table,
    text_of,
)
from tpprof.report.op_sums import OpSum
from tpprof.report.text_evidence import (
    clocks_of,
    covered,
    describe_ceilings,
    describe_dilation,
)
from tpprof.report.wording import (
    duration,
    kernel_label,
    milliseconds,
    percent,
    plural,
    printable,
    shorten,
)
from tpprof.results import Report

_MOST_COLLECTIVES, _MOST_OPS = 12, 20
_LEFT = 260
_LIMIT_COLOURS = {
    "compute": "bound by compute",
    "memory": "bound by memory",
    "balanced": "near both",
    "latency": "too small",
    "communication": "communication",
}
"""Bound -> what its colour stands for."""


def collective_bars(sums: Sequence[CollectiveSum]) -> str:
    """Per kind a bar a rank: waiting hatched, transfer solid."""
    shown = sums[:_MOST_COLLECTIVES]
    longest = max(
        (w + t for s in shown for w, t in zip(s.wait_ns, s.transfer_ns, strict=True)), default=0
    )
    scale = (WIDTH - _LEFT - 170) / (longest or 1)
    marks: list[str] = []
    y = 4.0
    for one in shown:
        marks.append(label(0, y + 14, shorten(one.name, 34), "name"))
        marks += [label(0, y + 32 + 17 * i, text, "") for i, text in enumerate(_facts(one))]
        begin = y
        for rank, wait, transfer in zip(one.ranks, one.wait_ns, one.transfer_ns, strict=True):
            marks += _collective_bar(one, rank, wait, transfer, y, scale)
            y += 22
        y = max(y, begin + 32 + 17 * len(_facts(one))) + 14
    heads = ("collective", "bytes", "count", "rank", "wait ms", "transfer ms", "busbw GB/s")
    rows = [
        (
            printable(s.name), s.bytes, s.count, s.ranks[i], milliseconds(s.wait_ns[i]),
            milliseconds(s.transfer_ns[i]),
            "?" if s.busbw_gbps is None else f"{s.busbw_gbps:.3g}",
        )
        for s in sums
        for i in range(len(s.ranks))
    ]  # fmt: skip
    return (
        legend({"wait": "waiting for a later rank", "communication": "transfer"})
        + chart(marks, y, "Waiting and transfer of each kind of collective on every rank")
        + table(heads, rows, "the same as a table")
    )


def _facts(one: CollectiveSum) -> list[str]:
    size = f"{one.bytes:,} B" if one.bytes >= 0 else "size unknown"
    busbw = "" if one.busbw_gbps is None else f", {format_rate(one.busbw_gbps * 1e9)}"
    facts = [f"{one.count} x {size}{busbw}"]
    rank, doing, share = one.worst
    if rank >= 0:
        facts.append(f"{percent(share, 1)} of the wait is for rank {rank}")
        if doing:
            facts.append(shorten(doing.removeprefix(EARLIER), 36))
    if one.method != "matched":
        facts.append("estimated from one rank's file")
    return facts


def _collective_bar(
    one: CollectiveSum, rank: int, wait: int, transfer: int, y: float, scale: float
) -> list[str]:
    name = f"{one.name} on rank {rank}"
    waited = rect(
        _LEFT + 50, y, wait * scale, 16, "bar wait",
        f"{name}: {duration(wait)} waiting for a later rank",
    )  # fmt: skip
    sent = rect(
        _LEFT + 50 + wait * scale, y, transfer * scale, 16, "bar communication",
        f"{name}: {duration(transfer)} transfer",
    )  # fmt: skip
    text = f"{milliseconds(wait)} + {milliseconds(transfer)}"
    end = _LEFT + 50 + (wait + transfer) * scale + 6
    return [
        label(_LEFT + 42, y + 12, f"rank {rank}", "", "end"),
        waited,
        sent,
        label(end, y + 12, text, "value"),
    ]


def limit_bars(sums: Sequence[OpSum]) -> str:
    """Per op its time, of which the floor is solid and the lost part pale."""
    shown = sums[:_MOST_OPS]
    longest = max((one.time_ns for one in shown), default=0) or 1
    scale = (WIDTH - _LEFT - 190) / longest
    marks: list[str] = []
    for i, one in enumerate(shown):
        y = 4 + i * 26
        colour = one.bound if one.bound in _LIMIT_COLOURS else "unmodelled"
        tip = (
            f"{one.key}: {duration(one.time_ns)} in {one.count}, floor {duration(one.floor_ns)}, "
            f"lost {duration(one.lost_ns)}"
        )
        floor = min(one.floor_ns, one.time_ns)
        marks.append(label(_LEFT - 10, y + 13, kernel_label(one.key, 38), "name", "end"))
        marks.append(rect(_LEFT, y, one.time_ns * scale, 18, f"bar pale {colour}", tip))
        marks.append(rect(_LEFT, y, floor * scale, 18, f"bar {colour}", tip))
        text = f"{milliseconds(one.lost_ns)} ms lost, {percent(one.floor_ns, one.time_ns)} of limit"
        if not one.floor_ns:
            text = f"{milliseconds(one.time_ns)} ms, no model"
        marks.append(label(_LEFT + one.time_ns * scale + 8, y + 13, text, "value"))
    heads = ["op", "count", "ms", "floor", "lost", "clocks", "of limit", "bound by"]
    rows = [
        [
            printable(s.key), s.count, milliseconds(s.time_ns), milliseconds(s.floor_ns),
            milliseconds(s.lost_ns), "?" if s.clocks_ns is None else milliseconds(s.clocks_ns),
            percent(s.floor_ns, s.time_ns) if s.floor_ns else "?", s.bound,
        ]
        for s in sums
    ]  # fmt: skip
    if all(one.clocks_ns is None for one in sums):
        for row in (heads, *rows):
            del row[5]
    present = {one.bound for one in shown}
    named = {bound: text for bound, text in _LIMIT_COLOURS.items() if bound in present}
    return (
        legend(named)
        + chart(marks, 8 + len(shown) * 26, "Time of each op against its floor")
        + table(heads, rows, "the same as a table")
    )


def certainty(report: Report) -> str:
    """Meters of coverage, clocks, ceilings, recorder, sum and warnings."""
    meters = "".join(_meter(f"{whole} {has}", share) for whole, has, share in covered(report))
    facts = [
        *(("clock", text) for text in clocks_of(report)),
        *(("device", describe_clock(one)) for one in report.device_clocks),
        *(
            ("lost", f"rank {one.rank}: {describe_lost_to_clocks(one)}")
            for one in report.device_clocks
        ),
        ("recorder", describe_dilation(report.dilation)),
        ("sum", f"the leaves and the wall differ by {report.residual_ns} ns"),
    ]
    if report.ceilings:
        facts.append(("ceilings", describe_ceilings(report.ceilings)))
    facts += [("source", printable(source)) for source in report.sources]
    rows = "".join(
        element("dt", text_of(name)) + element("dd", text_of(text)) for name, text in facts
    )
    warnings = "".join(
        element("p", text_of(printable(text)), class_="warning") for text in report.warnings
    )
    found = element("div", meters, class_="meters") if report.method == "trace" else ""
    return found + element("dl", rows) + warnings


def _meter(name: str, share: float) -> str:
    level = "good" if share >= 0.895 else "fair" if share >= 0.5 else "poor"
    filled = element(
        "i", class_=f"filled {level}", style=f"width:{100 * min(max(share, 0), 1):.1f}%"
    )
    text = element("b", text_of(percent(share, 1))) + text_of(f" of {name}")
    return element("div", element("span", text) + element("div", filled, class_="track"))


def count_of(sums: Sequence[CollectiveSum]) -> str:
    """`24 collectives of 2 kinds`."""
    total = sum(one.count for one in sums)
    return f"{plural(total, 'collective')} of {plural(len(sums), 'kind')}"
