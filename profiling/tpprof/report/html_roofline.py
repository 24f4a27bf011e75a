"""The roofline: what each op achieves against what arithmetic and memory allow, on log axes.

Source of the picture: Williams, Waterman and Patterson 2009.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tpinfer.config.units import format_flops, format_rate
from tpprof.report.html_svg import (
    WIDTH,
    chart,
    decades,
    element,
    label,
    legend,
    line,
    table,
    text_of,
)
from tpprof.report.op_sums import OpSum
from tpprof.report.rates import flop_rates, memory_levels
from tpprof.report.wording import duration, kernel_label, milliseconds, percent

_LEFT, _RIGHT, _TOP, _HEIGHT = 70, 20, 30, 400
_MOST_LABELS = 6
_CLASSES = {
    "compute": "bound by compute",
    "memory": "bound by memory",
    "balanced": "near both",
    "latency": "too small",
}


@dataclass(frozen=True, slots=True)
class _Axes:
    """Exponents of ten at the ends, and where they are drawn."""

    low_x: int
    high_x: int
    low_y: int
    high_y: int

    def x(self, intensity: float) -> float:
        span = (math.log10(intensity) - self.low_x) / (self.high_x - self.low_x)
        return _LEFT + span * (WIDTH - _LEFT - _RIGHT)

    def y(self, rate: float) -> float:
        span = (math.log10(rate) - self.low_y) / (self.high_y - self.low_y)
        return _TOP + _HEIGHT * (1 - span)


def roofline(ops: Sequence[OpSum], ceilings: Mapping[str, object]) -> str:
    """The scatter and its numbers; empty where no op has both FLOPs and bytes."""
    points = [op for op in ops if op.flops > 0 and op.bytes > 0 and op.time_ns > 0]
    points = [op for op in points if op.bound != "communication"]
    if not points:
        return ""
    rates, levels = flop_rates(ceilings), memory_levels(ceilings)
    axes = _axes(points, rates, levels)
    marks = [*_grid(axes), *_ceilings(axes, rates, levels), *_points(axes, points)]
    classes = {
        name: text for name, text in _CLASSES.items() if any(p.bound == name for p in points)
    }
    heads = ("op", "FLOP per byte", "achieved", "of limit", "ms", "bound by")
    rows = [
        (
            p.key, f"{p.flops / p.bytes:.3g}", format_flops(_achieved(p)),
            percent(p.floor_ns, p.time_ns), milliseconds(p.time_ns), p.bound,
        )
        for p in points
    ]  # fmt: skip
    return (
        legend(classes)
        + chart(marks, _TOP + _HEIGHT + 46, "Roofline of the ops on log axes")
        + table(heads, rows, "the same as a table")
    )


def _achieved(op: OpSum) -> float:
    """FLOP/s."""
    return op.flops * 1e9 / op.time_ns


def _axes(
    points: Sequence[OpSum], rates: Mapping[str, float], levels: Mapping[str, float]
) -> _Axes:
    """Wide enough for every point and every ridge."""
    intensities = [op.flops / op.bytes for op in points]
    achieved = [_achieved(op) for op in points]
    ridges = [rate / width for rate in rates.values() for width in levels.values()]
    across = decades(min(intensities), max([*intensities, *ridges]) * 1.5)
    up = decades(min(achieved), max([*achieved, *rates.values()]) * 1.1)
    return _Axes(across[0], max(across[-1], across[0] + 1), up[0], max(up[-1], up[0] + 1))


def _grid(axes: _Axes) -> list[str]:
    bottom, right = _TOP + _HEIGHT, WIDTH - _RIGHT
    marks = []
    for power in range(axes.low_x, axes.high_x + 1):
        x = axes.x(10.0**power)
        marks.append(line(x, _TOP, x, bottom, "grid"))
        marks.append(label(x, bottom + 18, f"{10.0**power:g}", "", "middle"))
    for power in range(axes.low_y, axes.high_y + 1):
        y = axes.y(10.0**power)
        marks.append(line(_LEFT, y, right, y, "grid"))
        marks.append(
            label(_LEFT - 8, y + 4, format_flops(10.0**power).removesuffix("FLOPS"), "", "end")
        )
    marks.append(label(right, bottom + 38, "FLOPs per byte of memory traffic", "", "end"))
    marks.append(label(0, 12, "FLOP/s achieved"))
    return marks


def _ceilings(axes: _Axes, rates: Mapping[str, float], levels: Mapping[str, float]) -> list[str]:
    """Memory levels as slopes up to the highest roof; dtypes as roofs from the nearest slope on."""
    highest = max(rates.values(), default=10.0**axes.high_y)
    marks = []
    left, right = 10.0**axes.low_x, 10.0**axes.high_x
    for name, width in levels.items():
        begin = max(left, 10.0**axes.low_y / width)
        end = min(right, highest / width)
        if end > begin:
            x1, y1, x2, y2 = axes.x(begin), axes.y(begin * width), axes.x(end), axes.y(end * width)
            marks.append(line(x1, y1, x2, y2, "ceiling"))
            turn = math.degrees(math.atan2(y2 - y1, x2 - x1))
            middle_x, middle_y = x1 + (x2 - x1) * 0.42, y1 + (y2 - y1) * 0.42 - 7
            marks.append(
                element(
                    "text", text_of(f"{name} {format_rate(width)}"), x=middle_x, y=middle_y,
                    class_="name", transform=f"rotate({turn:.1f} {middle_x:.1f} {middle_y:.1f})",
                )
            )  # fmt: skip
    fastest = max(levels.values(), default=0.0)
    for name, rate in rates.items():
        begin = max(left, rate / fastest) if fastest else left
        if begin < right and 10.0**axes.low_y < rate < 10.0**axes.high_y:
            y = axes.y(rate)
            marks.append(line(axes.x(begin), y, axes.x(right), y, "ceiling"))
            text = f"{name} {format_flops(rate)}"
            marks.append(label(axes.x(right) - 4, y - 6, text, "name", "end"))
    return marks


def _points(axes: _Axes, points: Sequence[OpSum]) -> list[str]:
    """Circles with an area in proportion to time; the longest are named where there is room."""
    longest = max(op.time_ns for op in points)
    marks, labels, named = [], [], []
    for i, op in enumerate(sorted(points, key=lambda one: -one.time_ns)):
        x, y = axes.x(op.flops / op.bytes), axes.y(_achieved(op))
        radius = max(3.5, 13 * math.sqrt(op.time_ns / longest))
        tip = (
            f"{op.key}: {duration(op.time_ns)} in {op.count}\n"
            f"{op.flops / op.bytes:.3g} FLOP per byte, {format_flops(_achieved(op))}, "
            f"{format_rate(op.bytes * 1e9 / op.time_ns)}\n"
            f"{percent(op.floor_ns, op.time_ns)} of its limit, bound by {op.bound}"
        )
        title = element("title", text_of(tip))
        colour = op.bound if op.bound in _CLASSES else "unmodelled"
        marks.append(
            element("circle", title, cx=x, cy=y, r=radius, class_=f"dot {colour}", data_tip=tip)
        )
        is_free = all(abs(y - other_y) > 17 or abs(x - other_x) > 190 for other_x, other_y in named)
        if i < _MOST_LABELS and is_free:
            named.append((x, y))
            at_right = x < WIDTH - 260
            where = x + radius + 5 if at_right else x - radius - 5
            anchor = "start" if at_right else "end"
            labels.append(label(where, y + 4, kernel_label(op.key, 32), "name halo", anchor))
    return marks + labels
