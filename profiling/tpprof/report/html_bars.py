"""Stacked bars of wall time: per rank, per window, per layer or whatever else was grouped by."""

from collections.abc import Mapping, Sequence

from tpinfer.costs.leaves import LEAVES, ROLLUP, roll_up
from tpprof.report.group_order import UNATTRIBUTED, in_order
from tpprof.report.html_svg import (
    WIDTH,
    chart,
    element,
    label,
    legend,
    line,
    rect,
    table,
    text_of,
    ticks,
)
from tpprof.report.wording import (
    MEANINGS,
    TITLES,
    WORD_OF,
    duration,
    milliseconds,
    percent,
    plural,
    printable,
    shorten,
)
from tpprof.results import Group, Split, Window

_LEFT, _RIGHT = 190, 90
_BAR, _STEP = 22, 30
_MOST_COLUMNS, _MOST_ROWS, _FEW = 240, 40, 16


def word_legend(leaves: Sequence[Mapping[str, int]]) -> str:
    """The words that occur, in their order; waiting for ranks is marked within communication."""
    present = {leaf for each in leaves for leaf, spent in each.items() if spent}
    words = {WORD_OF.get(leaf, "") for leaf in present}
    names: dict[str, str] = {}
    for word, title in TITLES.items():
        if word not in words:
            continue
        names[word] = title
        if word == "communication" and "comm_wait" in present:
            names["wait"] = "communication: waiting for a later rank"
    return legend(names)


def _segments(leaves: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """(word, colour, ns) in the order they are stacked; waiting is a segment of its own."""
    found = []
    for word, spent in roll_up(leaves).items():
        wait = leaves.get("comm_wait", 0) if word == "communication" else 0
        found.append((word, word, spent - wait))
        if wait:
            found.append((word, "wait", wait))
    return [segment for segment in found if segment[2] > 0]


def tip_of(name: str, wall_ns: int, leaves: Mapping[str, int]) -> str:
    """Name, wall and every leaf, a line each."""
    lines = [f"{name}: {duration(wall_ns)}"]
    lines += [
        f"{leaf}: {duration(leaves[leaf])} ({percent(leaves[leaf], wall_ns)})"
        for leaf in LEAVES
        if leaves.get(leaf)
    ]
    return "\n".join(lines)


def _segment_tip(name: str, word: str, wall_ns: int, leaves: Mapping[str, int]) -> str:
    spent = sum(leaves.get(leaf, 0) for leaf in ROLLUP[word])
    lines = [f"{name}: {TITLES[word]} {duration(spent)} ({percent(spent, wall_ns)})"]
    lines += [
        f"{leaf}: {duration(leaves[leaf])} - {MEANINGS[leaf]}"
        for leaf in ROLLUP[word]
        if leaves.get(leaf)
    ]
    return "\n".join(lines)


def _stack(name: str, y: float, scale: float, wall_ns: int, leaves: Mapping[str, int]) -> list[str]:
    """One horizontal bar of six words and its wall at the right."""
    marks, x = [label(_LEFT - 10, y + 15, shorten(name, 28), "name", "end")], float(_LEFT)
    for word, colour, spent in _segments(leaves):
        width = spent * scale
        tip = _segment_tip(name, word, wall_ns, leaves)
        marks.append(rect(x, y, width, _BAR, f"bar {colour}", tip))
        if width > 40:
            on = "name halo" if colour == "wait" else "on"
            marks.append(label(x + 6, y + 15, percent(spent, wall_ns), on))
        x += width
    marks.append(label(x + 8, y + 15, f"{milliseconds(wall_ns)} ms", "value"))
    return marks


def _bars(rows: Sequence[tuple[str, int, Mapping[str, int]]], described: str) -> str:
    """Horizontal bars of one scale, one per (name, wall, leaves)."""
    longest = max((wall for _, wall, _ in rows), default=0) or 1
    scale = (WIDTH - _LEFT - _RIGHT) / longest
    marks: list[str] = []
    for i, (name, wall_ns, leaves) in enumerate(rows):
        marks += _stack(name, 4 + i * _STEP, scale, wall_ns, leaves)
    return chart(marks, 8 + len(rows) * _STEP, described)


def duration_bars(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Bars of (name, seconds by the six words), for times that nobody measured."""
    shown = [
        (name, {ROLLUP[word][0]: round(spent * 1e9) for word, spent in words.items()})
        for name, words in rows
    ]
    leaves = [each for _, each in shown]
    bars = [(name, sum(each.values()), each) for name, each in shown]
    return word_legend(leaves) + _bars(bars, "Time in six words")


def rank_bars(ranks: Sequence[Split]) -> str:
    """One bar a rank, and the same as a table."""
    rows = [(f"rank {split.rank}", split.wall_ns, split.leaves) for split in ranks]
    cells = [
        (f"rank {s.rank}", milliseconds(s.wall_ns), *(_cell(s, word) for word in TITLES))
        for s in ranks
    ]
    return (
        word_legend([split.leaves for split in ranks])
        + _bars(rows, "Wall time of every rank in six words")
        + table(("ms", "wall", *TITLES.values()), cells, "the same as a table")
    )


def _cell(split: Split, word: str) -> str:
    spent = split.rollup.get(word, 0)
    return f"{milliseconds(spent)} ({percent(spent, split.wall_ns)})" if spent else "-"


def leaf_table(split: Split) -> str:
    """Every leaf of one rank with its meaning and the host's parts."""
    rows: list[Sequence[object]] = []
    for leaf in LEAVES:
        spent = split.leaves.get(leaf, 0)
        if not spent:
            continue
        share = percent(spent, split.wall_ns)
        rows.append((TITLES[WORD_OF[leaf]], leaf, milliseconds(spent), share, MEANINGS[leaf]))
        if leaf == "host":
            parts = sorted(split.host_parts.items(), key=lambda part: (-part[1], part[0]))
            rows += [
                ("", f"of it {printable(part)}", milliseconds(ns), percent(ns, split.wall_ns), "")
                for part, ns in parts
            ]
    return table(("word", "leaf", "ms", "of wall", "what it is"), rows)


def window_columns(windows: Sequence[Window], rank: int) -> str:
    """One stacked column per window, in order of time; empty with less than two."""
    rows = [(w.label, s.wall_ns, s.leaves) for w in windows for s in w.ranks if s.rank == rank]
    if len(rows) < 2:
        return ""
    note = ""
    if len(rows) > _MOST_COLUMNS:
        note = f"The first {_MOST_COLUMNS} of {len(rows)} windows."
        rows = rows[:_MOST_COLUMNS]
    return _caption(note) + _columns(rows, f"Wall of each window on rank {rank}")


def _caption(note: str) -> str:
    return element("p", text_of(note), class_="explained") if note else ""


def _columns(rows: Sequence[tuple[str, int, Mapping[str, int]]], described: str) -> str:
    """Stacked columns of (name, wall, leaves)."""
    left, top, height = 60, 24, 220
    grid = ticks(max(wall for _, wall, _ in rows) / 1e6)
    scale = height / (grid[-1] * 1e6)
    marks = [label(left - 8, 10, "ms", "", "end")]
    for value in grid:
        y = top + height - value * 1e6 * scale
        marks += [line(left, y, WIDTH, y, "grid"), label(left - 8, y + 4, f"{value:g}", "", "end")]
    step = (WIDTH - left) / len(rows)
    width = min(max(step - 2, step * 0.7), 60)
    for i, (name, wall_ns, leaves) in enumerate(rows):
        y = float(top + height)
        x = left + i * step + (step - width) / 2
        for _, colour, spent in _segments(leaves):
            y -= spent * scale
            marks.append(rect(x, y, width, spent * scale, f"bar {colour}"))
        marks.append(rect(left + i * step, top, step, height, "hit", tip_of(name, wall_ns, leaves)))
    longest = min(max(len(name) for name, _, _ in rows), 16)
    every = max(1, -(-len(rows) * (longest * 6.6 + 14) // (WIDTH - left)))
    for i in range(0, len(rows), int(every)):
        middle = left + (i + 0.5) * step
        marks.append(label(middle, top + height + 20, shorten(rows[i][0], 16), "", "middle"))
    return chart(marks, top + height + 30, described)


def group_bars(groups: Sequence[Group], by: str, rank: int) -> str:
    """One rank's groups: columns for many layers or steps, which have an order, else bars. What is
    left out of the picture is told with its time, so that the whole still sums."""
    rows = [(group.key, group.wall_ns, group.leaves) for group in in_order(groups, by)]
    described = f"Wall time of rank {rank} by {by}"
    if by in ("layer", "step") and len(rows) > _FEW:
        shown = [row for row in rows if row[0] != UNATTRIBUTED][:_MOST_COLUMNS]
        return _columns(shown, described) + _left_out(rows, shown)
    shown = rows
    if len(rows) > _MOST_ROWS:
        kept = {id(row) for row in sorted(rows, key=lambda row: -row[1])[:_MOST_ROWS]}
        shown = [row for row in rows if id(row) in kept]
    return _bars(shown, described) + _left_out(rows, shown)


def _left_out(
    rows: Sequence[tuple[str, int, Mapping[str, int]]],
    shown: Sequence[tuple[str, int, Mapping[str, int]]],
) -> str:
    drawn = {id(row) for row in shown}
    left = [row for row in rows if id(row) not in drawn]
    if not left:
        return ""
    spent = sum(wall for _, wall, _ in left)
    whole = sum(wall for _, wall, _ in rows)
    what = left[0][0] if len(left) == 1 else plural(len(left), "smaller row")
    return _caption(f"Not drawn: {what}, {milliseconds(spent)} ms ({percent(spent, whole)}).")
