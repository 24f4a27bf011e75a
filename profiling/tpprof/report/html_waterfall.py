"""The scale waterfall as a chart: from ideal down to real, one bar a cause, and what fixes buy."""

from dataclasses import dataclass

from tpprof.report.html_svg import WIDTH, chart, element, label, line, rect, table, text_of
from tpprof.report.scale import Waterfall
from tpprof.report.wording import milliseconds, percent, plural, printable, shorten

_LEFT, _STEP, _BAR = 230, 34, 22
_COLOURS = {
    "unsharded": "memory",
    "thin_gemms": "compute",
    "unmodelled": "unmodelled",
    "kernel_gaps": "small_kernels",
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
    who = ", which waits longest for the others," if one.waits else ""
    explained = f"Wall of rank {one.rank}{who} in ms{windows}."
    heads = ("cause", "saves ms", "speed-up without it", "behind it", "what would remove it")
    rows = [
        (
            printable(fix.title), milliseconds(fix.saved_ns / one.num_windows),
            f"{one.speedup:.2f}x to {fix.speedup:.2f}x" + (", replayed" if fix.is_replayed else ""),
            shorten(fix.detail, 90), fix.remedy,
        )
        for fix in one.fixes
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
    levels = [one.ideal_ns]
    for bar in one.bars:
        levels.append(levels[-1] + bar.spent_ns)
    axis = _Axis(min(0, *levels), max(one.real_ns, *levels))
    marks = _row(one, axis, 0, ("ideal", "total", ""), (0, one.ideal_ns))
    for i, bar in enumerate(one.bars, 1):
        colour = "gain" if bar.spent_ns < 0 else _COLOURS[bar.kind]
        marks.append(_link(axis, i, levels[i - 1]))
        marks += _row(one, axis, i, (bar.title, colour, bar.detail), (levels[i - 1], levels[i]))
    last = len(one.bars) + 1
    marks.append(_link(axis, last, one.real_ns))
    marks += _row(one, axis, last, ("real", "total", ""), (0, one.real_ns))
    height = 8 + (last + 1) * _STEP
    return chart(marks, height, f"From ideal to real at {one.tp} ranks by cause")


@dataclass(frozen=True, slots=True)
class _Axis:
    """Range of ns that the chart shows."""

    lowest: int
    highest: int

    def x(self, moment: float) -> float:
        width = (self.highest - self.lowest) or 1
        return _LEFT + (moment - self.lowest) / width * (WIDTH - _LEFT - 130)


def _link(axis: _Axis, i: int, level: int) -> str:
    """From the end of one bar down to the next."""
    y = 4 + (i - 1) * _STEP
    return line(axis.x(level), y + _BAR, axis.x(level), y + _STEP, "link")


def _row(
    one: Waterfall, axis: _Axis, i: int, named: tuple[str, str, str], span: tuple[int, int]
) -> list[str]:
    """Label, bar and value; `named` is (title, colour, what is behind it)."""
    (title, colour, detail), (start, end) = named, span
    y = 4 + i * _STEP
    x, until = axis.x(min(span)), axis.x(max(span))
    spent = (end - start) / one.num_windows
    sign = "+" if 0 < i <= len(one.bars) and spent > 0 else ""
    text = f"{sign}{milliseconds(spent)} ({percent(end - start, one.real_ns)})"
    tip = f"{title}: {sign}{milliseconds(spent)} ms" + (f"\n{detail}" if detail else "")
    beside = label(x - 8, y + 15, shorten(detail, 40), "", "end") if x > 520 and detail else ""
    return [
        label(_LEFT - 10, y + 15, shorten(title, 34), "name", "end"),
        beside,
        rect(x, y, max(until - x, 1), _BAR, f"bar {colour}", tip),
        label(until + 8, y + 15, text, "value"),
    ]
