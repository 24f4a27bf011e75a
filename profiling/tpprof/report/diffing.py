"""Two reports side by side, and limits that a change must not pass.

Runs are compared per window where both have several (steps against steps), else as a whole. Limits
are written `communication:+5%` or `comm_wait:+200us`: a word, a leaf or `wall`, and how much more
time B may take than A.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tpinfer.config.errors import ConfigError
from tpinfer.costs.leaves import LEAVES, ROLLUP
from tpprof.report.op_sums import sum_ops
from tpprof.report.wording import TITLES, WORD_OF, duration
from tpprof.results import Report

_LIMIT = re.compile(r"([a-z_]+):([+-]?)(\d+(?:\.\d+)?)(%|ns|us|ms|s)")
_UNITS = {"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9}
KEYS = tuple(dict.fromkeys(("wall", *TITLES, *LEAVES)))
"""What a limit may be set on. A name that is both a word and a leaf means the word."""
_LEAST_WINDOWS = 5
"""On each side, for a claim about noise."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How much a key may grow from A to B."""

    key: str
    text: str
    """As the user wrote it."""
    share: float | None
    """Of A; None for an absolute limit."""
    spent_ns: float = 0.0

    def allowed_ns(self, before_ns: float) -> float:
        """Growth that does not fail."""
        return self.spent_ns if self.share is None else self.share * before_ns


@dataclass(frozen=True, slots=True)
class Change:
    """One row: ns per window on both sides."""

    key: str
    before_ns: float
    after_ns: float
    noise_ns: float | None = None
    """Standard error of the difference over windows; None where there are too few."""

    @property
    def grown_ns(self) -> float:
        """B - A."""
        return self.after_ns - self.before_ns

    @property
    def is_noise(self) -> bool:
        """Whether the windows of one run differ as much among themselves."""
        return self.noise_ns is not None and abs(self.grown_ns) < 2 * self.noise_ns


@dataclass(frozen=True, slots=True)
class Difference:
    """Everything that `diff` shows."""

    wall: Change
    words: list[Change]
    leaves: list[Change]
    """Those that either side has, of words with several."""
    ops: list[Change]
    """Largest change first."""
    num_windows: tuple[int, int]
    """(A, B); (1, 1) where whole runs are compared."""
    failures: list[str]
    warnings: list[str]


def parse_limit(text: str) -> Limit:
    """`communication:+5%`, `wall:+0.2ms`, `host:-10%`. Raises ConfigError."""
    match = _LIMIT.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"{text!r} is no limit; write KEY:+N% or KEY:+N with ns, us, ms or s, such as "
            "communication:+5% or wall:+0.2ms"
        )
    key, sign, number, unit = match.groups()
    if key not in KEYS:
        raise ConfigError(f"{key!r} in {text!r} is not known; use one of {', '.join(KEYS)}")
    value = -float(number) if sign == "-" else float(number)
    if unit == "%":
        return Limit(key, text, value / 100)
    return Limit(key, text, None, value * _UNITS[unit])


def compare(before: Report, after: Report, limits: Sequence[Limit] = ()) -> Difference:
    """B against A on the rank that each shows."""
    counts = len(before.windows), len(after.windows)
    per = counts if min(counts) > 1 else (1, 1)
    wall = _change("wall", (before.wall_ns, after.wall_ns), per, _walls(before), _walls(after))
    words = [_word(word, before, after, per) for word in TITLES]
    leaves = [
        _change(leaf, (before.leaves.get(leaf, 0), after.leaves.get(leaf, 0)), per)
        for leaf in LEAVES
        if before.leaves.get(leaf) or after.leaves.get(leaf)
    ]
    found = {change.key: change for change in leaves} | {c.key: c for c in words} | {"wall": wall}
    failures = []
    for limit in limits:
        change = found.get(limit.key, Change(limit.key, 0.0, 0.0))
        if change.grown_ns > limit.allowed_ns(change.before_ns):
            failures.append(_failure(limit, change))
    return Difference(
        wall=wall,
        words=words,
        leaves=[leaf for leaf in leaves if len(ROLLUP[WORD_OF[leaf.key]]) > 1],
        ops=_ops(before, after, per),
        num_windows=per,
        failures=failures,
        warnings=_doubts(before, after),
    )


def growth_text(change: Change) -> str:
    """`+7.1%`, `new`, `-`."""
    if not change.before_ns:
        return "new" if change.after_ns else "-"
    return f"{100 * change.grown_ns / change.before_ns:+.1f}%"


def _failure(limit: Limit, change: Change) -> str:
    noise = "; windows of one run differ as much among themselves" if change.is_noise else ""
    return (
        f"{limit.key} went from {duration(change.before_ns)} to {duration(change.after_ns)} "
        f"({growth_text(change)}), the limit is {limit.text.partition(':')[2]}{noise}"
    )


def _change(
    key: str,
    spent: tuple[int, int],
    per: tuple[int, int],
    before: Sequence[int] = (),
    after: Sequence[int] = (),
) -> Change:
    noise = None
    if min(per) >= _LEAST_WINDOWS and min(len(before), len(after)) >= _LEAST_WINDOWS:
        noise = math.sqrt(_squared_error(before) + _squared_error(after))
    return Change(key, spent[0] / per[0], spent[1] / per[1], noise)


def _squared_error(values: Sequence[int]) -> float:
    """Of the mean of the values."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


def _walls(report: Report) -> list[int]:
    return [
        split.wall_ns
        for window in report.windows
        for split in window.ranks
        if split.rank == report.rank_shown
    ]


def _word(word: str, before: Report, after: Report, per: tuple[int, int]) -> Change:
    each = [
        [
            split.rollup.get(word, 0)
            for window in report.windows
            for split in window.ranks
            if split.rank == report.rank_shown
        ]
        for report in (before, after)
    ]
    spent = before.rollup.get(word, 0), after.rollup.get(word, 0)
    return _change(word, spent, per, each[0], each[1])


def _ops(before: Report, after: Report, per: tuple[int, int]) -> list[Change]:
    tables: list[Mapping[str, int]] = [
        {op.key: op.time_ns for op in sum_ops(report.ops, report.rank_shown)}
        for report in (before, after)
    ]
    keys = dict.fromkeys([*tables[0], *tables[1]])
    changes = [_change(key, (tables[0].get(key, 0), tables[1].get(key, 0)), per) for key in keys]
    return sorted(changes, key=lambda change: (-abs(change.grown_ns), change.key))


def _doubts(before: Report, after: Report) -> list[str]:
    doubts = [
        f"{name}: {one.emulation}" for name, one in (("A", before), ("B", after)) if one.emulation
    ]
    if len(before.ranks) != len(after.ranks):
        doubts.append(
            f"A has {len(before.ranks)} ranks, B has {len(after.ranks)}: use scale to compare sizes"
        )
    if before.method != after.method:
        doubts.append(f"A was found by {before.method}, B by {after.method}")
    counts = len(before.windows), len(after.windows)
    if min(counts) <= 1 and max(counts) > 1:
        doubts.append(f"A has {counts[0]} windows, B has {counts[1]}: whole walls are compared")
    return doubts
