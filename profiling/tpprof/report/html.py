"""One self-contained HTML file: no network, charts as inline SVG, light, dark and paper.

Everything that comes from a trace is escaped by `html_svg`, and the page's own policy forbids
loading anything.
"""

from collections.abc import Iterable, Sequence
from importlib.resources import files

from tpprof.report.collective_sums import sum_collectives
from tpprof.report.html_bars import (
    group_bars,
    leaf_table,
    rank_bars,
    window_columns,
    word_legend,
)
from tpprof.report.html_evidence import certainty, collective_bars, count_of, limit_bars
from tpprof.report.html_roofline import roofline
from tpprof.report.html_svg import element, section, text_of
from tpprof.report.html_waterfall import waterfall_chart
from tpprof.report.html_whatif import whatif_bars
from tpprof.report.op_sums import sum_ops
from tpprof.report.scale import Waterfall
from tpprof.report.whatif import Answer
from tpprof.report.wording import TITLES, duration, percent, plural, printable
from tpprof.results import Report, Split

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_MOST_PANELS = 8


def render_html(
    report: Report,
    steps: Report | None = None,
    waterfalls: Sequence[Waterfall] = (),
    answer: Answer | None = None,
) -> str:
    """The page. `steps` is the same run by step, where `report` asked another question: its windows
    are then drawn beside it. `answer` says what removing one cause would win."""
    by_window = report if len(report.windows) > 1 or steps is None else steps
    parts = [
        _masthead(report),
        _first(report.advice),
        _scale(waterfalls),
        _whatif(answer),
        _wall(report),
        _windows(by_window),
        _groups(report),
        _collectives(report),
        _limits(report),
        section("How sure this is", "What the numbers above rest on.", certainty(report)),
    ]
    return page(f"{_headline(report)} - tpprof", "".join(parts))


def page_head(kicker: str, headline: str, tiles: Iterable[tuple[str, str, str]]) -> str:
    """The head of a page: a line above, the headline, and tiles of (name, value, note)."""
    figures = "".join(
        element(
            "div",
            element("span", text_of(name))
            + element("b", text_of(value))
            + element("small", text_of(note)),
        )
        for name, value, note in tiles
    )
    return element(
        "header",
        element("p", text_of(kicker), class_="kicker")
        + element("h1", text_of(headline))
        + element("div", figures, class_="tiles"),
    )


def page(title: str, body: str) -> str:
    """A whole page around markup that is safe already."""
    static = files("tpprof.report")
    style = static.joinpath("page.css").read_text(encoding="utf-8")
    script = static.joinpath("page.js").read_text(encoding="utf-8")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'{policy}<meta name="color-scheme" content="light dark">'
        f"<title>{text_of(title)}</title>\n<style>\n{style}</style></head>\n<body>"
        f"{_PATTERNS}<main>{body}</main>"
        f'<div id="tip" role="status" hidden></div>\n<script>\n{script}</script></body></html>\n'
    )


_PATTERNS = (
    '<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs>'
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="6" height="6" class="hatch-ground"/>'
    '<rect width="2.4" height="6" class="hatch-line"/></pattern></defs></svg>'
)


def _headline(report: Report) -> str:
    word, spent = max(report.rollup.items(), key=lambda item: item[1], default=("host", 0))
    if not spent:
        return "No time was recorded"
    share = percent(spent, report.wall_ns)
    return f"{share} of {duration(report.wall_ns)} is {TITLES.get(word, word)}"


def _masthead(report: Report) -> str:
    windows = f" in {plural(len(report.windows), 'window')}" if len(report.windows) > 1 else ""
    ranks = plural(len(report.ranks), "rank")
    whose = f"{ranks}, {duration(report.wall_ns)} of wall on rank {report.rank_shown}{windows}"
    waiting = report.leaves.get("comm_wait", 0)
    tiles = [
        ("wall", duration(report.wall_ns), f"rank {report.rank_shown}"),
        ("waiting for ranks", percent(waiting, report.wall_ns), duration(waiting)),
        ("explained", percent(report.coverage.explained, 1), "of the wall"),
        (
            "recording",
            "?" if report.dilation is None else f"{report.dilation:.2f}x",
            "not measured" if report.dilation is None else "as long as unrecorded",
        ),
    ]
    return page_head(f"tpprof · where the time went · {whose}", _headline(report), tiles)


def _first(advice: Sequence[str]) -> str:
    if not advice:
        return ""
    items = "".join(element("li", text_of(printable(sentence))) for sentence in advice)
    return section("What to do first", "", element("ol", items, class_="advice"))


def _scale(waterfalls: Sequence[Waterfall]) -> str:
    if not waterfalls:
        return ""
    return section(
        "What ate the speed-up",
        "Ideal is the smallest run's wall divided among the ranks. Each bar is what one cause "
        "adds; they sum exactly to the real wall.",
        *(waterfall_chart(one) for one in waterfalls),
    )


def _whatif(answer: Answer | None) -> str:
    bars = whatif_bars(answer) if answer is not None else ""
    if answer is None or not bars:
        return ""
    per = f", mean of {plural(answer.num_steps, 'step')}" if answer.num_steps > 1 else ""
    return section(
        "If one cause were gone",
        f"Rank {answer.rank} replayed along {plural(answer.num_meetings, 'meeting')} of the ranks"
        f"{per}: what each removal wins, at most. Gains do not add up.",
        bars,
    )


def _wall(report: Report) -> str:
    shown = next((one for one in report.ranks if one.rank == report.rank_shown), None)
    detail = ""
    if shown is not None:
        detail = element("h3", text_of(f"Rank {shown.rank} in detail")) + leaf_table(shown)
    return section(
        "The wall on every rank",
        "Each bar is the whole wall time of one rank; every nanosecond is in exactly one word.",
        rank_bars(report.ranks),
        _hidden(report.ranks),
        detail,
    )


def _hidden(ranks: Sequence[Split]) -> str:
    found = [f"rank {s.rank} {duration(s.comm_hidden_ns)}" for s in ranks if s.comm_hidden_ns]
    if not found:
        return ""
    text = f"Communication hidden under compute, beside the sum: {', '.join(found)}."
    return element("p", text_of(text), class_="explained")


def _windows(report: Report) -> str:
    columns = window_columns(report.windows, report.rank_shown)
    if not columns:
        return ""
    leaves = [s.leaves for w in report.windows for s in w.ranks if s.rank == report.rank_shown]
    return section(
        "Window by window",
        f"Wall of each window on rank {report.rank_shown}, stacked in the same words.",
        word_legend(leaves),
        columns,
    )


def _panels(name: str, panels: Sequence[tuple[int, str]], shown: int) -> str:
    """One panel a rank with buttons to choose; the shown rank's is open."""
    panels = [panel for panel in panels if panel[1]]
    if len(panels) < 2:
        return panels[0][1] if panels else ""
    first = shown if shown in [rank for rank, _ in panels] else panels[0][0]
    buttons = "".join(
        element(
            "button",
            text_of(f"rank {rank}"),
            type="button",
            data_panel=f"{name}-{rank}",
            aria_pressed="true" if rank == first else "false",
        )
        for rank, _ in panels
    )
    bodies = "".join(
        element(
            "div", content, id=f"{name}-{rank}", class_="panel" + (" open" if rank == first else "")
        )
        for rank, content in panels
    )
    return element("div", element("div", buttons, class_="choose") + bodies, class_="panels")


def _ranks(report: Report) -> list[int]:
    return [split.rank for split in report.ranks][:_MOST_PANELS]


def _groups(report: Report) -> str:
    if not report.groups:
        return ""
    panels = []
    for rank in _ranks(report):
        groups = [group for group in report.groups if group.rank == rank]
        if groups:
            panels.append((rank, group_bars(groups, report.by, rank)))
    return section(
        f"By {report.by}",
        "The rows of a rank sum to its wall. Idle time belongs to what came next.",
        word_legend([group.leaves for group in report.groups]),
        _panels("group", panels, report.rank_shown),
    )


def _collectives(report: Report) -> str:
    sums = sum_collectives(report.collectives)
    if not sums:
        return ""
    return section(
        "Waiting and transfer",
        f"{count_of(sums)}. A collective's kernel runs while it waits for the last rank; only the "
        "solid part moves bytes.",
        collective_bars(sums),
    )


def _limits(report: Report) -> str:
    panels, scatters = [], []
    for rank in _ranks(report):
        sums = sum_ops(report.ops, rank)
        if sums:
            panels.append((rank, limit_bars(sums)))
            scatters.append((rank, roofline(sums, report.ceilings)))
    if not panels:
        return ""
    found = section(
        "Distance to the limit",
        "Solid is the least time the ceilings allow, pale is what is lost above it.",
        _panels("limit", panels, report.rank_shown),
    )
    picture = _panels("roof", scatters, report.rank_shown)
    if picture:
        found += section(
            "Roofline",
            "Each circle is a kind of op, its area its time. The nearer to a line, the nearer to "
            "what the machine allows.",
            picture,
        )
    return found
