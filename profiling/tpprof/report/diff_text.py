"""A difference for a terminal: at most 100 columns."""

from collections.abc import Sequence

from tpprof.report.diffing import Change, Difference, growth_text
from tpprof.report.wording import TITLES, milliseconds, plural, shorten, wrapped

_MOST_OPS = 10


def render_difference(found: Difference, names: tuple[str, str]) -> str:
    """Wall, words, leaves, ops, and what failed."""
    lines = [*wrapped(f"A: {names[0]}", 0), *wrapped(f"B: {names[1]}", 0), ""]
    if found.num_windows != (1, 1):
        a, b = found.num_windows
        lines.append(f"per window, mean of {plural(a, 'window')} in A and {b} in B")
    lines.append(f"{'ms':<40}{'A':>12}{'B':>12}{'B - A':>12}{'change':>10}")
    lines.append(_row("wall", found.wall))
    lines += [_row(TITLES[word.key], word) for word in found.words if _is_there(word)]
    lines += _block("leaves", found.leaves)
    lines += _block("ops that changed most", [op for op in found.ops if op.grown_ns][:_MOST_OPS])
    lines += [line for doubt in found.warnings for line in wrapped(f"warning: {doubt}", 0)]
    lines += [line for text in found.failures for line in wrapped(f"FAILED: {text}", 0)]
    return "\n".join(lines)


def _is_there(change: Change) -> bool:
    return bool(change.before_ns or change.after_ns)


def _block(title: str, changes: Sequence[Change]) -> list[str]:
    return ["", title, *(_row(f"  {change.key}", change) for change in changes)] if changes else []


def _row(name: str, change: Change) -> str:
    grown = change.grown_ns
    sign = "+" if grown > 0 else ""
    noise = "  within noise" if change.is_noise and grown else ""
    label = "  " + shorten(name.strip(), 36) if name.startswith("  ") else shorten(name, 38)
    return (
        f"{label:<40}{milliseconds(change.before_ns):>12}{milliseconds(change.after_ns):>12}"
        f"{sign + milliseconds(grown):>12}{growth_text(change):>10}{noise}"
    )
