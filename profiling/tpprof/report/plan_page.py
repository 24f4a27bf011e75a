"""A planner's page in the manner of the reports: which placements no other beats, how the time of
an output token changes over tensor-parallel ranks, and where prefill and decode lie under the
roofline.

It draws what it is handed and knows nothing of how plans are made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tpprof.report.html import page, page_head
from tpprof.report.html_bars import duration_bars
from tpprof.report.html_roofline import roofline
from tpprof.report.html_svg import (
    WIDTH,
    chart,
    element,
    label,
    legend,
    line,
    section,
    table,
    text_of,
    ticks,
)
from tpprof.report.op_sums import OpSum
from tpprof.report.wording import TITLES, duration

_LEFT, _RIGHT, _TOP, _HEIGHT = 70, 30, 24, 320


@dataclass(frozen=True, slots=True)
class PlanMark:
    """One placement in the pictures."""

    name: str
    """`tp 4 pp 1 dp 2`."""
    tpot_s: float
    ttft_s: float
    tokens_per_s: float
    num_devices: int
    cost_per_mtok: float | None
    bound: str
    """As people write it."""
    intervals: Mapping[str, str]
    """Column -> `[low, high]`."""
    split_s: Mapping[str, float]
    """Of an output token, by the six words."""
    is_on_front: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class PlanPage:
    """All that is drawn."""

    title: str
    headline: str
    mode: str
    plans: Sequence[PlanMark]
    scaling: Sequence[tuple[str, Mapping[str, float]]]
    """(`tp 2`, seconds of an output token by the six words); empty words where it does not fit."""
    steps: Sequence[OpSum]
    ceilings: Mapping[str, object]
    sentences: Sequence[str] = field(default_factory=list)


def render_plan_page(plan: PlanPage) -> str:
    """The page, complete in itself."""
    parts = [
        _masthead(plan),
        section(
            "What no other plan beats",
            "Each circle is a placement: further left its tokens come faster, further up a device "
            "makes more of them. Pale ones are beaten by another in everything.",
            _pareto(plan.plans),
            _plan_table(plan.plans),
        ),
        section(
            "Where an output token's time goes",
            "Each bar is the predicted time of one output token in the same six words, for the "
            "first plan of each placement.",
            duration_bars(list(_first_of_each(plan.plans).items())[:_MOST_BARS]),
        ),
    ]
    scaled = [(name, words) for name, words in plan.scaling if words]
    if len(scaled) > 1:
        too_small = [name for name, words in plan.scaling if not words]
        left_out = f" Too small for the model: {', '.join(too_small)}." if too_small else ""
        parts.append(
            section(
                "More tensor-parallel ranks under the same load",
                "One replica on 1, 2, 4 ... ranks. Ideal scaling would halve each bar." + left_out,
                duration_bars(scaled),
                _scaling_table(scaled),
            )
        )
    picture = roofline(plan.steps, plan.ceilings)
    if picture:
        parts.append(
            section(
                "Roofline of prefill and decode",
                "One step of each on the slowest rank of the first plan, against what its device "
                "sustains.",
                picture,
            )
        )
    items = "".join(element("p", text_of(sentence)) for sentence in plan.sentences)
    parts.append(section("How sure this is", "", items))
    return page(plan.title, "".join(parts))


_MOST_BARS = 12


def _first_of_each(plans: Sequence[PlanMark]) -> dict[str, Mapping[str, float]]:
    """The split of the first plan of each placement."""
    found: dict[str, Mapping[str, float]] = {}
    for one in plans:
        found.setdefault(one.name, one.split_s)
    return found


def _masthead(plan: PlanPage) -> str:
    best = plan.plans[0]
    tiles = [
        ("time to first token", duration(best.ttft_s * 1e9), best.intervals.get("TTFT", "")),
        ("per output token", duration(best.tpot_s * 1e9), best.intervals.get("TPOT", "")),
        ("output tokens/s", f"{best.tokens_per_s:.0f}", best.intervals.get("tokens/s", "")),
        (
            "USD per million",
            "-" if best.cost_per_mtok is None else f"{best.cost_per_mtok:.3g}",
            "no price is known" if best.cost_per_mtok is None else best.intervals.get("USD", ""),
        ),
    ]
    kicker = f"tpinfer plan · {plan.title} · mode {plan.mode}"
    return page_head(kicker, plan.headline, tiles)


def _pareto(plans: Sequence[PlanMark]) -> str:
    """TPOT to the right, tokens a second and device upwards; a circle's area is its devices."""
    across = ticks(max(one.tpot_s for one in plans) * 1e3 * 1.08)
    up = ticks(max(one.tokens_per_s / one.num_devices for one in plans) * 1.08)
    width, bottom = WIDTH - _LEFT - _RIGHT, _TOP + _HEIGHT
    marks = [label(0, 12, "output tokens/s and device")]
    for value in across:
        x = _LEFT + width * value / across[-1]
        marks += [
            line(x, _TOP, x, bottom, "grid"),
            label(x, bottom + 18, f"{value:g}", "", "middle"),
        ]
    for value in up:
        y = bottom - _HEIGHT * value / up[-1]
        marks += [
            line(_LEFT, y, WIDTH - _RIGHT, y, "grid"),
            label(_LEFT - 8, y + 4, f"{value:g}", "", "end"),
        ]
    marks.append(label(WIDTH - _RIGHT, bottom + 38, "ms per output token", "", "end"))
    named: list[tuple[float, float]] = []
    texts = []
    for one in sorted(plans, key=lambda plan: (not plan.is_on_front, plan.num_devices)):
        x = _LEFT + width * one.tpot_s * 1e3 / across[-1]
        y = bottom - _HEIGHT * one.tokens_per_s / one.num_devices / up[-1]
        colour = "compute" if one.is_on_front else "unmodelled pale"
        title = element("title", text_of(_tip(one)))
        radius = 4 + 2.2 * one.num_devices**0.5
        marks.append(
            element(
                "circle", title, cx=x, cy=y, r=radius, class_=f"dot {colour}", data_tip=_tip(one)
            )
        )  # fmt: skip
        is_free = all(abs(y - other) > 15 or abs(x - before) > 120 for before, other in named)
        if one.is_on_front and is_free:
            named.append((x, y))
            at_right = x < WIDTH - 160
            where, anchor = (x + radius + 4, "start") if at_right else (x - radius - 4, "end")
            texts.append(label(where, y + 4, one.name, "name halo", anchor))
    names = {"compute": "no other plan beats it", "unmodelled": "beaten"}
    return legend(names) + chart(marks + texts, bottom + 46, "Plans by speed and by throughput")


def _tip(one: PlanMark) -> str:
    lines = [
        f"{one.name}: {duration(one.tpot_s * 1e9)} an output token {one.intervals.get('TPOT', '')}",
        f"first token {duration(one.ttft_s * 1e9)} {one.intervals.get('TTFT', '')}",
        f"{one.tokens_per_s:.0f} tokens/s on {one.num_devices} devices",
    ]
    if one.cost_per_mtok is not None:
        lines.append(f"{one.cost_per_mtok:.3g} USD per million tokens")
    lines.append(f"bound by {one.bound}")
    return "\n".join([*lines, one.note] if one.note else lines)


def _plan_table(plans: Sequence[PlanMark]) -> str:
    heads = ("plan", "TTFT", "TPOT", "tokens/s", "USD/Mtok", "bound by", "settings", "")
    rows = [
        (
            one.name, duration(one.ttft_s * 1e9), duration(one.tpot_s * 1e9),
            f"{one.tokens_per_s:.0f}",
            "-" if one.cost_per_mtok is None else f"{one.cost_per_mtok:.3g}", one.bound, one.note,
            "" if one.is_on_front else "beaten",
        )
        for one in plans
    ]  # fmt: skip
    return table(heads, rows, "the same as a table")


def _scaling_table(scaled: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    first = sum(scaled[0][1].values())
    rows = [
        (
            name, duration(sum(words.values()) * 1e9), f"{first / sum(words.values()):.2f}x",
            *(duration(words[word] * 1e9) if words.get(word) else "-" for word in TITLES),
        )
        for name, words in scaled
    ]  # fmt: skip
    heads = ("ranks", "output token", "faster", *TITLES.values())
    return table(heads, rows, "the same as a table")
