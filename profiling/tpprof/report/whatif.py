"""What removing one cause would win: ranks replayed along their collectives without it.

Meetings are the matched collectives, and each step plan that rank 0 sends and the others wait for
(`tpinfer.host plan_wait`). What a cause took is read from the timelines, so the answer is about the
same leaves as the report.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tpinfer.config.errors import ConfigError
from tpinfer.costs.leaves import LEAVES, ROLLUP
from tpprof import intervals
from tpprof.attribute.findings import RankFindings
from tpprof.attribute.timeline import LEAF
from tpprof.events import Kind, Trace
from tpprof.ranks.wait import arrivals, columns_of
from tpprof.report.replay import (
    Meetings,
    holds_of,
    lateness_of,
    left_before,
    replay,
    spread_of,
)

PLAN_WAIT = "tpinfer.host plan_wait"
_STEP = re.compile(r"tpinfer\.step id=(\d+)")
_MOST_PARTS = 3
_WORDS = {
    "compute": "no kernels bound by arithmetic",
    "memory": "no kernels bound by memory, no copies",
    "small_kernels": "no small kernels",
}
"""Word -> what its removal means, where `no ... time` would not say it."""


@dataclass(frozen=True, slots=True)
class Removal:
    """One cause removed."""

    cause: str
    """`wait`, `wait:1`, `transfer`, `host`, `host:schedule`, `latency`, ..."""
    meaning: str
    wall_ns: int
    """Of the rank shown, without it."""
    gain_ns: int


@dataclass(frozen=True, slots=True)
class Answer:
    """All removals that were asked about, the largest gain first."""

    rank: int
    wall_ns: int
    """As recorded; the replay with nothing removed gives the same."""
    num_steps: int
    num_meetings: int
    removals: list[Removal]
    warnings: list[str] = field(default_factory=list)


class WhatIf:
    """One run, ready to be asked."""

    def __init__(self, run: RankFindings) -> None:
        self._run = run
        self._meetings, self._floors, dropped = _meetings(run)
        self._shown = 0
        self._warnings = _doubts(run, dropped, len(self._meetings))
        recorded = replay(self._meetings)
        assert (recorded == self._meetings.end_ns).all(), "the replay must give the recording back"

    def answer(self, causes: Sequence[str] = ()) -> Answer:
        """Remove each cause in turn; without any, all that took time. Raises ConfigError for a
        cause that means nothing here."""
        asked = list(causes) or self._causes()
        removals = self._remove(asked)
        if not causes:
            removals = [one for one in removals if one.gain_ns > 0]
        meetings = self._meetings
        return Answer(
            rank=self._run.traces[self._shown].rank,
            wall_ns=int(meetings.end_ns[self._shown] - meetings.start_ns[self._shown]),
            num_steps=self._run.num_steps,
            num_meetings=len(meetings),
            removals=sorted(removals, key=lambda one: (-one.gain_ns, one.cause)),
            warnings=self._warnings,
        )

    def _causes(self) -> list[str]:
        late = lateness_of(self._meetings).sum(0)
        causes = ["wait", "transfer"]
        causes += [
            f"wait:{trace.rank}"
            for trace, spent in zip(self._run.traces, late.tolist(), strict=True)
            if spent
        ]
        causes += [word for word in ROLLUP if word not in ("communication", "queue")]
        timeline = self._run.timelines[self._shown]
        spent = {
            part: int(timeline.pieces.length_ns[timeline.pieces.part == number].sum())
            for number, part in enumerate(timeline.parts)
        }
        parts = sorted((p for p in spent if spent[p]), key=lambda part: -spent[part])
        return causes + [f"host:{part}" for part in parts[:_MOST_PARTS]]

    def _remove(self, causes: Sequence[str]) -> list[Removal]:
        if not causes:
            return []
        meetings, shown = self._meetings, self._shown
        meanings, gaps, holds = zip(*map(self._cut, causes), strict=True)
        ends = replay(meetings, np.stack(gaps), np.stack(holds))[:, shown]
        walls = (ends - meetings.start_ns[shown]).tolist()
        wall_ns = int(meetings.end_ns[shown] - meetings.start_ns[shown])
        return [
            Removal(cause, meaning, wall, wall_ns - wall)
            for cause, meaning, wall in zip(causes, meanings, walls, strict=True)
        ]

    def _cut(self, cause: str) -> tuple[str, np.ndarray, np.ndarray]:
        """(meaning, gap cut [C + 1, R], hold cut [C, R]) of one cause."""
        meetings = self._meetings
        nothing = np.zeros((len(meetings) + 1, len(self._run.traces)), np.int64)
        word, _, which = cause.partition(":")
        if word == "wait" and which:
            column = self._column(cause, which)
            late = nothing.copy()
            late[:-1, column] = lateness_of(meetings)[:, column]
            return f"rank {which} never later than the next-latest", late, nothing[:-1]
        if word in ("wait", "transfer", "communication") and not which:
            return self._cut_communication(word, nothing)
        if word == "host" and which:
            self._check_part(cause, which)
            return f"no host time in {which}", self._in_gaps(part=which), nothing[:-1]
        leaves = ROLLUP.get(word) or ((word,) if word in LEAVES else ())
        if not leaves or which:
            raise ConfigError(
                f"--no {cause} is no cause; use wait, wait:RANK, transfer, a word "
                f"({', '.join(ROLLUP)}), a leaf ({', '.join(LEAVES)}) or host:PART"
            )
        return _WORDS.get(word, f"no {word} time"), self._in_gaps(leaves), nothing[:-1]

    def _cut_communication(
        self, word: str, nothing: np.ndarray
    ) -> tuple[str, np.ndarray, np.ndarray]:
        gaps, holds = nothing.copy(), nothing[:-1].copy()
        if word != "transfer":
            gaps[:-1] = spread_of(self._meetings)
            gaps += self._in_gaps(("comm_wait",))
        if word != "wait":
            holds = np.maximum(holds_of(self._meetings) - self._floors[:, None], 0)
        at = "at its ceiling" if (self._floors > 0).any() else "free"
        meaning = {"wait": "every rank comes with the first", "transfer": f"transfer {at}"}
        return meaning.get(word, f"no waiting, transfer {at}"), gaps, holds

    def _check_part(self, cause: str, part: str) -> None:
        parts = dict.fromkeys(part for timeline in self._run.timelines for part in timeline.parts)
        if part not in parts:
            raise ConfigError(
                f"--no {cause}: the host did no {part} here; its parts are {', '.join(parts)}"
            )

    def _column(self, cause: str, rank: str) -> int:
        ranks = [str(trace.rank) for trace in self._run.traces]
        if rank not in ranks:
            raise ConfigError(
                f"--no {cause}: rank {rank} is not here; there are {', '.join(ranks)}"
            )
        return ranks.index(rank)

    def _in_gaps(self, leaves: Sequence[str] = (), part: str = "") -> np.ndarray:
        """int64 [C + 1, R]: time of these leaves, or this part of host, inside each gap."""
        cut = np.zeros((len(self._meetings) + 1, len(self._run.traces)), np.int64)
        left = left_before(self._meetings)
        for column, (timeline, clock) in enumerate(
            zip(self._run.timelines, self._run.clocks, strict=True)
        ):
            pieces = timeline.pieces
            if part:
                number = timeline.parts.index(part) if part in timeline.parts else -2
                rows = np.flatnonzero(pieces.part == number)
            else:
                rows = np.flatnonzero(np.isin(pieces.leaf, [LEAF[leaf] for leaf in leaves]))
            until = np.append(self._meetings.arrive_ns[:, column], self._meetings.end_ns[column])
            begin, stop = (clock.from_reference(points) for points in (left[:, column], until))
            columns = pieces.start_ns[rows], pieces.end_ns[rows]
            spent = intervals.covered_before(*columns, stop)
            spent = spent - intervals.covered_before(*columns, begin)
            part_of = np.append(self._meetings.takes_part[:, column], True)
            cut[:, column] = np.where(part_of, np.maximum(spent, 0), 0)
        return cut


def _meetings(run: RankFindings) -> tuple[Meetings, np.ndarray, int]:
    """The meetings inside the spans on the reference clock; int64 [C] the least transfer of each;
    and how many matched collectives could not be used."""
    start, end = (
        np.array(
            [
                int(clock.to_reference(np.array([span[side]]))[0])
                for clock, span in zip(run.clocks, run.spans_ns, strict=True)
            ],
            np.int64,
        )
        for side in (0, 1)
    )
    tables = [_collectives(run), _plans(run)]
    arrive, leave, part, source, floor = (
        np.concatenate([table[i] for table in tables]) for i in range(5)
    )
    inside = ~part | ((arrive >= start) & (leave <= end))
    trusted = np.array([clock.accepted for clock in run.clocks], bool)
    usable = np.logical_and.reduce(inside & (~part | trusted), axis=1)
    never = np.iinfo(np.int64).min
    order = np.argsort(np.where(source, arrive, never).max(1, initial=never), kind="stable")
    order = order[usable[order]]
    arrive, leave, part = arrive[order], leave[order], part[order]
    beside = _beside(run, arrive, leave, part)
    found = Meetings(start, end, arrive, leave, part, source[order], beside)
    return found, floor[order], int((~usable[: len(tables[0][0])]).sum())


def _beside(
    run: RankFindings, arrive: np.ndarray, leave: np.ndarray, part: np.ndarray
) -> np.ndarray:
    """int64 [C, R]: compute that hid communication between a rank's arrival and its leaving."""
    beside = np.zeros(arrive.shape, np.int64)
    for column, (timeline, clock) in enumerate(zip(run.timelines, run.clocks, strict=True)):
        pieces = timeline.pieces
        rows = np.flatnonzero(pieces.hidden)
        columns = pieces.start_ns[rows], pieces.end_ns[rows]
        begin, stop = (clock.from_reference(table[:, column]) for table in (arrive, leave))
        spent = intervals.covered_before(*columns, stop)
        spent = spent - intervals.covered_before(*columns, begin)
        longest = np.maximum(leave[:, column] - arrive[:, column], 0)
        beside[:, column] = np.where(part[:, column], np.clip(spent, 0, longest), 0)
    return beside


_Table = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""arrive, leave, takes_part, is_source, floor."""


def _collectives(run: RankFindings) -> _Table:
    matched = run.matched
    rows = np.flatnonzero(matched.synchronising) if len(matched) else np.empty(0, np.int64)
    arrive, leave = (
        np.stack([clock.to_reference(table[:, i]) for i, clock in enumerate(run.clocks)], 1)
        for table in (
            columns_of(matched, [arrivals(work) for work in run.works]),
            columns_of(matched, [work.end_ns for work in run.works]),
        )
    )
    part = matched.takes_part[rows]
    floor = columns_of(matched, [work.floor_ns for work in run.works]).max(1, initial=0)
    return arrive[rows], leave[rows], part, part, floor[rows]


def _plans(run: RankFindings) -> _Table:
    """Step plans: rank 0 sends, at the earliest moment anybody had it; the others waited for it."""
    num_ranks = len(run.traces)
    waits: dict[int, dict[int, tuple[int, int]]] = {}
    for column, (trace, clock) in enumerate(zip(run.traces, run.clocks, strict=True)):
        for step, began, ended in _plan_waits(trace) if column else []:
            times = clock.to_reference(np.array([began, ended]))
            waits.setdefault(step, {})[column] = int(times[0]), int(times[1])
    shape = len(waits), num_ranks
    arrive, leave = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    part, source = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, by_column in enumerate(waits.values()):
        sent = min(ended for _, ended in by_column.values())
        arrive[row, 0] = leave[row, 0] = sent
        part[row, 0] = source[row, 0] = True
        for column, (began, ended) in by_column.items():
            arrive[row, column], leave[row, column], part[row, column] = began, ended, True
    return arrive, leave, part, source, np.zeros(len(waits), np.int64)


def _plan_waits(trace: Trace) -> list[tuple[int, int, int]]:
    """(id of the step that followed, start, end) of each wait for a plan."""
    texts: Mapping[int, int] = {
        i: int(found[1]) for i, text in enumerate(trace.strings) if (found := _STEP.match(text))
    }
    ranges = trace.rows_of(Kind.RANGE)
    is_wait = np.array([text == PLAN_WAIT for text in trace.strings] or [False], bool)
    waits = ranges[is_wait[trace.name[ranges]]]
    steps = ranges[np.isin(trace.name[ranges], list(texts))]
    following = np.searchsorted(trace.start_ns[steps], trace.end_ns[waits])
    return [
        (texts[int(trace.name[steps[place]])], int(trace.start_ns[row]), int(trace.end_ns[row]))
        for row, place in zip(waits.tolist(), following.tolist(), strict=True)
        if place < len(steps)
    ]


def _doubts(run: RankFindings, dropped: int, used: int) -> list[str]:
    doubts = [run.capture.emulation] if run.capture.emulation else []
    if dropped:
        doubts.append(
            f"{dropped} of {dropped + used} collectives lie outside the recording of a rank, or on "
            "a clock that could not be aligned: they stay as they were"
        )
    if len(run.traces) == 1:
        doubts.append("one rank was given: what others would win or cost is not replayed")
    return doubts
