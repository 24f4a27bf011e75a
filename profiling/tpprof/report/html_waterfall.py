"""The scale waterfall as a chart: from ideal down to real, one bar a cause, and what fixes buy."""

from tpprof.report.html_svg import WIDTH, chart, element, label, line, rect, table, text_of
from tpprof.report.scale import Waterfall
from tpprof.report.scale_text import fixes_of
from tpprof.report.wording import milliseconds, percent, plural, printable, shorten

_LEFT, _STEP, _BAR = 230, 34, 22
_COLOURS = {
    "unsharded": "memory",
    "thin_gemms": "compute",
    "unmodelled": "unmodelled",
    "kernel_gaps": "small_kernels",
    "copies": "memory",
    "transfer": "communication",
    "unsplit": "communication",
    "wait": "wait",
    "host": "host",
    "unrecorded": "unmodelled",
    "queue": "queue",
}
"""Kind of bar -> colour class."""


def waterfall_chart(one: Waterfall) -> str:
    """Headline, chart, and a table of what each fix buys at most."""
    windows = f", mean of {plural(one.num_windows, 'window')}" if one.num_windows > 1 else ""
    headline = (
        f"tp={one.tp}: {one.speedup:.2f}x as fast as tp={one.smallest_tp}, "
        f"{percent(one.efficiency, 1)} of ideal"
    )
    explained = f"Wall of rank {one.rank} in ms{windows}."
    heads = ("cause", "ms", "speed-up without it", "behind it", "what would remove it")
    rows = [
        (
            printable(bar.title), milliseconds(bar.spent_ns / one.num_windows),
            f"{one.speedup:.2f}x to {speedup:.2f}x", shorten(bar.detail, 60), fix,
        )
        for bar, speedup, fix in fixes_of(one)
    ]  # fmt: skip
    warnings = "".join(
        element("p", text_of(printable(text)), class_="warning") for text in one.warnings
    )
    return (
        element("h3", text_of(headline))
        + element("p", text_of(explained), class_="explained")
        + _chart(one)
        + (table(heads, rows) if rows else "")
        + warnings
    )


def _chart(one: Waterfall) -> str:
    reached, highest = one.ideal_ns, max(one.ideal_ns, one.real_ns)
    for bar in one.bars:
        reached += bar.spent_ns
        highest = max(highest, reached)
    scale = (WIDTH - _LEFT - 130) / (highest or 1)
    marks = _row(one, 0, "ideal", 0, one.ideal_ns, "total", scale, "")
    reached = one.ideal_ns
    for i, bar in enumerate(one.bars, 1):
        until = reached + bar.spent_ns
        colour = "gain" if bar.spent_ns < 0 else _COLOURS[bar.kind]
        x = _LEFT + reached * scale
        y = 4 + (i - 1) * _STEP
        marks.append(line(x, y + _BAR, x, y + _STEP, "link"))
        marks += _row(one, i, bar.title, reached, until, colour, scale, bar.detail)
        reached = until
    x, y = _LEFT + reached * scale, 4 + len(one.bars) * _STEP
    marks.append(line(x, y + _BAR, x, y + _STEP, "link"))
    marks += _row(one, len(one.bars) + 1, "real", 0, one.real_ns, "total", scale, "")
    return chart(
        marks, 8 + (len(one.bars) + 2) * _STEP, f"From ideal to real at {one.tp} ranks by cause"
    )


def _row(
    one: Waterfall, i: int, title: str, start: int, end: int, colour: str, scale: float, detail: str
) -> list[str]:
    y = 4 + i * _STEP
    low, high = min(start, end), max(start, end)
    spent = (end - start) / one.num_windows
    sign = "+" if 0 < i <= len(one.bars) and spent > 0 else ""
    text = f"{sign}{milliseconds(spent)} ({percent(end - start, one.real_ns)})"
    tip = f"{title}: {sign}{milliseconds(spent)} ms" + (f"\n{detail}" if detail else "")
    x = _LEFT + low * scale
    beside = label(x - 8, y + 15, shorten(detail, 40), "", "end") if x > 520 and detail else ""
    return [
        label(_LEFT - 10, y + 15, shorten(title, 34), "name", "end"),
        beside,
        rect(_LEFT + low * scale, y, max((high - low) * scale, 1), _BAR, f"bar {colour}", tip),
        label(_LEFT + high * scale + 8, y + 15, text, "value"),
    ]
