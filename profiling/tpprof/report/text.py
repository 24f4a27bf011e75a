"""The report for a terminal: at most 100 columns, the wall first, how sure it is last."""

from collections.abc import Iterable, Mapping, Sequence

from tpinfer.costs.leaves import LEAVES, roll_up
from tpprof.report.group_order import in_order
from tpprof.report.text_evidence import render_collectives, render_evidence, render_ops
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
    wrapped,
)
from tpprof.results import Group, Report, Split, Window

_HEADINGS = {"communication": ("communi-", "cation"), "small_kernels": ("small", "kernels")}
_LABEL, _WALL, _CELL = 11, 10, 13
_MOST_WINDOWS, _MOST_GROUPS = 12, 40


def render_report(report: Report) -> str:
    """The whole text, without a newline at its end."""
    blocks = [
        _header(report),
        "\n".join([*_heading(), *(_row(split) for split in report.ranks)]),
        _leaves(report),
        _windows(report.windows, report.rank_shown),
        _groups(report),
        render_collectives(report),
        render_ops(report),
        _advice(report.advice),
        render_evidence(report),
    ]
    return "\n\n".join(block for block in blocks if block)


def _header(report: Report) -> str:
    names = [printable(source) for source in report.sources]
    sources = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    windows = f" in {plural(len(report.windows), 'window')}" if len(report.windows) > 1 else ""
    facts = f"{duration(report.wall_ns)} of wall{windows}, {plural(len(report.ranks), 'rank')}"
    return "\n".join(wrapped(f"Where the time went: {facts}{': ' if sources else ''}{sources}", 0))


def _heading() -> list[str]:
    names = [_HEADINGS.get(word, (word, "")) for word in TITLES]
    lines = [f"{'ms':>{_LABEL}}{'wall':>{_WALL}}", " " * (_LABEL + _WALL)]
    return [
        (line + "".join(f"{name[i]:>{_CELL}}" for name in names)).rstrip()
        for i, line in enumerate(lines)
    ]


def _row(split: Split) -> str:
    label = f"rank {split.rank}"
    cells = "".join(
        f"{_cell(split.rollup.get(word, 0), split.wall_ns):>{_CELL}}" for word in TITLES
    )
    return f"{label:>{_LABEL}}{milliseconds(split.wall_ns):>{_WALL}}{cells}"


def _cell(spent_ns: int, wall_ns: int) -> str:
    return f"{milliseconds(spent_ns)} {100 * spent_ns / wall_ns:3.0f}%" if spent_ns else "-"


def _leaves(report: Report) -> str:
    shown = split_of(report.ranks, report.rank_shown)
    lines = [f"{f'rank {report.rank_shown} in detail':<32}{'ms':>10}{'':5}  what it is"]
    word_before = ""
    for leaf in LEAVES:
        spent = report.leaves.get(leaf, 0)
        if not spent:
            continue
        word = TITLES[WORD_OF[leaf]]
        name = "" if word == word_before else word
        word_before = word
        lines.append(_leaf_line(name, leaf, spent, report.wall_ns, MEANINGS[leaf]))
        if leaf == "host" and shown is not None:
            parts = sorted(shown.host_parts.items(), key=lambda part: (-part[1], part[0]))
            lines += [_leaf_line("", f" {part}", ns, report.wall_ns, "") for part, ns in parts]
    hidden = {split.rank: split.comm_hidden_ns for split in report.ranks if split.comm_hidden_ns}
    if hidden:
        each = ", ".join(f"rank {rank} {duration(spent)}" for rank, spent in hidden.items())
        lines += wrapped(f"Communication hidden under compute, beside the sum: {each}.", 0)
    return "\n".join(lines)


def _leaf_line(word: str, leaf: str, spent_ns: int, wall_ns: int, meaning: str) -> str:
    name = shorten(leaf, 18)
    share = percent(spent_ns, wall_ns)
    return f"{word:<14}{name:<18}{milliseconds(spent_ns):>10}{share:>5}  {meaning}".rstrip()


def _windows(windows: Sequence[Window], rank: int) -> str:
    rows = [(w, split) for w in windows if (split := split_of(w.ranks, rank)) is not None]
    if len(rows) < 2:
        return ""
    title = f"rank {rank} by window"
    if len(rows) > _MOST_WINDOWS:
        slowest = sorted(rows, key=lambda row: -row[1].wall_ns)[:_MOST_WINDOWS]
        title = f"rank {rank}, slowest {_MOST_WINDOWS} of {len(rows)} windows"
        rows = sorted(slowest, key=lambda row: row[0].start_ns)
    lines = _word_heading(title)
    lines += [_word_row(window.label, split.wall_ns, split.rollup) for window, split in rows]
    return "\n".join(lines)


def _groups(report: Report) -> str:
    if not report.groups:
        return ""
    groups = [g for g in report.groups if g.rank == report.rank_shown or report.by == "rank"]
    rest: list[Group] = []
    if len(groups) > _MOST_GROUPS:
        ordered = sorted(groups, key=lambda group: -group.wall_ns)
        kept = {id(group) for group in ordered[:_MOST_GROUPS]}
        rest = [group for group in groups if id(group) not in kept]
        groups = [group for group in groups if id(group) in kept]
    groups = in_order(groups, report.by)
    whose = "every rank" if report.by == "rank" else f"rank {report.rank_shown}"
    lines = _word_heading(f"{whose} by {report.by}")
    lines += [_word_row(group.key, group.wall_ns, roll_up(group.leaves)) for group in groups]
    if rest:
        added: dict[str, int] = {}
        for group in rest:
            for leaf, spent in group.leaves.items():
                added[leaf] = added.get(leaf, 0) + spent
        label = f"({len(rest)} smaller ones)"
        lines.append(_word_row(label, sum(group.wall_ns for group in rest), roll_up(added)))
    return "\n".join(lines)


def _word_heading(title: str) -> list[str]:
    columns = ("wall ms", "compute", "memory", "comm.", "small", "host", "queue")
    label = f"{shorten(title, 37):<37}"
    return [label + "".join(f"{name:>9}" for name in columns)]


def _word_row(label: str, wall_ns: int, rollup: Mapping[str, int]) -> str:
    cells = [milliseconds(wall_ns)]
    cells += [milliseconds(rollup[word]) if rollup.get(word) else "-" for word in TITLES]
    return f"{shorten(label, 37):<37}" + "".join(f"{cell:>9}" for cell in cells)


def _advice(advice: Sequence[str]) -> str:
    if not advice:
        return ""
    lines = ["What to do first"]
    for number, sentence in enumerate(advice, 1):
        first, *others = wrapped(printable(sentence), 3)
        lines += [f"{number}. {first[3:]}", *others]
    return "\n".join(lines)


def split_of(splits: Iterable[Split], rank: int) -> Split | None:
    """The split of one rank, if it has one."""
    return next((split for split in splits if split.rank == rank), None)
