"""Which collective on one rank is which on the others.

By (group, sequence) where the recorder gives a sequence; else by the order of one group's
collectives within a step, within a graph launch, or within the whole trace; where not even the
group is known, by the order within a stream. Orders count only where all ranks have equally many
and every pair agrees in name and bytes: otherwise the stretch stays unmatched, with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpprof.classify.collective_kinds import synchronises
from tpprof.classify.work import Work, WorkKind
from tpprof.events import NONE, Trace

_BY_SEQUENCE, _BY_STEP, _BY_GRAPH, _BY_TRACE = range(4)
_STRETCH = {_BY_STEP: "step", _BY_GRAPH: "graph launch", _BY_TRACE: "trace"}


@dataclass(frozen=True)
class Matched:
    """m collectives on R ranks; column r belongs to the r-th trace."""

    work: np.ndarray
    """int64 [m, R]: row of that rank's Work; -1 where the rank takes no part."""
    name: np.ndarray
    """int32 [m]: index into names."""
    num_bytes: np.ndarray
    """int64 [m]: message bytes of one rank, the largest; -1 where unknown."""
    size: np.ndarray
    """int32 [m]: ranks in the group, recorded here or not."""
    names: list[str]
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.work)

    @property
    def synchronising(self) -> np.ndarray:
        """bool [m]: no rank leaves before the last one came."""
        return np.array([synchronises(name) for name in self.names], bool)[self.name]

    @property
    def is_partial(self) -> np.ndarray:
        """bool [m]: ranks of the group are not among the traces; one of them may come last."""
        return self.takes_part.sum(1) < self.size

    @property
    def takes_part(self) -> np.ndarray:
        """bool [m, R]."""
        return self.work >= 0


@dataclass(frozen=True)
class _Rows:
    """Communication of all ranks, one row each; sorted by (by, group, stretch, place, rank)."""

    rank: np.ndarray
    """Column of the rank, not its number."""
    work: np.ndarray
    group: np.ndarray
    """Index over all ranks' groups."""
    by: np.ndarray
    stretch: np.ndarray
    """Sequence, step, ordinal of the graph launch, or 0."""
    place: np.ndarray
    """Ordinal within the stretch."""
    name: np.ndarray
    num_bytes: np.ndarray
    key: np.ndarray
    """Index over all ranks' op ids; -1 for none."""
    size: np.ndarray


class _Interner:
    """Numbers for texts, the same on all ranks."""

    def __init__(self) -> None:
        self.number: dict[Any, int] = {}

    def all(self, texts: Sequence[Any]) -> np.ndarray:
        numbers = [self.number.setdefault(text, len(self.number)) for text in texts]
        return np.array(numbers, np.int64)


def match(traces: Sequence[Trace], works: Sequence[Work]) -> Matched:
    """Match the communication of several ranks. Argument order is column order."""
    names, groups, keys = _Interner(), _Interner(), _Interner()
    tables = [
        _rows_of(column, trace, work, names, groups, keys, _listed(trace.rank, traces))
        for column, (trace, work) in enumerate(zip(traces, works, strict=True))
    ]
    rows = _sorted(tables)
    members = _members(rows, len(groups.number), list(groups.number), traces)
    key_columns = (rows.by, rows.group, rows.stretch, rows.place)
    first = _first_of(key_columns)
    entry = np.cumsum(first) - 1
    m = int(entry[-1]) + 1 if len(entry) else 0
    table = np.full((m, len(traces)), -1, np.int64)
    table[entry, rows.rank] = rows.work
    group = rows.group[first]
    unit = np.cumsum(_first_of((*key_columns[:3],))) - 1
    # A sequence stands for itself; an order stands or falls with the whole stretch.
    unit = np.where(rows.by == _BY_SEQUENCE, entry, m + unit)
    _, unit = np.unique(unit[first], return_inverse=True)
    whole = ((table >= 0) == members[group]).all(1)
    same = _agree(rows.name, first) & _agree_bytes(rows, first)
    same &= _agree(rows.key, first)
    bad = np.zeros(int(unit.max()) + 1 if m else 0, bool)
    bad[unit[~(whole & same)]] = True
    keep = ~bad[unit] & (members[group].sum(1) > 1)
    largest = np.maximum.reduceat(rows.num_bytes, np.flatnonzero(first)) if m else first
    sizes = np.maximum.reduceat(rows.size, np.flatnonzero(first)) if m else first
    listed = np.array([len(ranks) if text else 0 for text, ranks in groups.number] or [0])
    sizes = np.maximum(sizes, listed[group])
    return Matched(
        work=table[keep],
        name=rows.name[first][keep].astype(np.int32),
        num_bytes=largest[keep].astype(np.int64),
        size=np.maximum(sizes, members[group].sum(1))[keep].astype(np.int32),
        names=[str(name) for name in names.number],
        warnings=_told(rows.by[first], bad[unit], whole, np.flatnonzero(~keep), table),
    )


def _rows_of(
    column: int,
    trace: Trace,
    work: Work,
    names: _Interner,
    groups: _Interner,
    keys: _Interner,
    listed: Mapping[str, tuple[int, ...]],
) -> _Rows:
    mine = np.flatnonzero(np.isin(work.kind, (WorkKind.COMM, WorkKind.FUSED_COMM)))
    op = names.all([work.keys[i] if i >= 0 else "" for i in range(-1, len(work.keys))])
    key = keys.all([work.keys[i] if i >= 0 else "" for i in range(-1, len(work.keys))])
    lanes = _lane_order(trace, work.lane[mine])
    own_groups = groups.all([(text, listed.get(text, ())) for text in work.keys])
    by_lane = groups.all([("", (place,)) for place in range(len(trace.lanes))])
    group = work.comm_group[mine]
    has_group = group >= 0
    number = by_lane[lanes] if len(mine) else np.empty(0, np.int64)
    number[has_group] = own_groups[group[has_group]]
    by, stretch = _stretches(trace, work, mine, has_group)
    count = len(mine)
    order = np.lexsort((mine, stretch, number, by))
    by, stretch, number, mine = by[order], stretch[order], number[order], mine[order]
    start = np.flatnonzero(_first_of((by, number, stretch)))
    place = np.arange(count) - np.repeat(start, np.diff(np.append(start, count)))
    return _Rows(
        rank=np.full(count, column, np.int64),
        work=mine,
        group=number,
        by=by,
        stretch=stretch,
        place=place,
        name=op[work.comm_op[mine] + 1],
        num_bytes=work.comm_bytes[mine],
        key=np.where(work.key[mine] >= 0, key[work.key[mine] + 1], -1),
        size=work.comm_size[mine].astype(np.int64),
    )


def _listed(rank: int, traces: Sequence[Trace]) -> dict[str, tuple[int, ...]]:
    """Ranks of the groups that any trace lists and `rank` belongs to; one name may stand for
    several groups, such as those of two replicas."""
    listed: dict[str, tuple[int, ...]] = {}
    for trace in traces:
        for name, ranks in trace.groups.items():
            if rank in ranks:
                listed.setdefault(name, tuple(ranks))
    return listed


def _lane_order(trace: Trace, lanes: np.ndarray) -> np.ndarray:
    """Place of each row's lane among the lanes that carry communication, by device and stream."""
    used = sorted(set(lanes.tolist()), key=lambda i: (trace.lanes[i].device, trace.lanes[i].tid))
    place = np.zeros(len(trace.lanes) + 1, np.int64)
    place[used] = np.arange(len(used))
    return place[lanes]


def _stretches(
    trace: Trace, work: Work, mine: np.ndarray, has_group: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Per row what its order counts in, and which of those it is in."""
    sequence, step = work.comm_sequence[mine], work.step[mine]
    launch = trace.launch[work.row[mine]]
    graph = np.array(["graphlaunch" in text.lower() for text in trace.strings], bool)
    in_graph = launch >= 0
    in_graph[in_graph] = graph[trace.name[launch[in_graph]]]
    ordinal = np.searchsorted(np.unique(launch[in_graph]), launch)
    conditions = [has_group & (sequence >= 0), step >= 0, in_graph]
    by = np.select(conditions, [_BY_SEQUENCE, _BY_STEP, _BY_GRAPH], _BY_TRACE)
    return by, np.select(conditions, [sequence, step, ordinal], 0)


def _sorted(tables: list[_Rows]) -> _Rows:
    columns = {
        name: np.concatenate([getattr(table, name) for table in tables])
        for name in _Rows.__dataclass_fields__
    }
    order = np.lexsort(tuple(columns[name] for name in ("rank", "place", "stretch", "group", "by")))
    return _Rows(**{name: column[order] for name, column in columns.items()})


def _members(rows: _Rows, count: int, groups: list[Any], traces: Sequence[Trace]) -> np.ndarray:
    """bool [groups, R]: ranks given here that belong to each group: those the recorder lists, else
    those that communicate in it."""
    found = np.zeros((count, len(traces)), bool)
    found[rows.group, rows.rank] = True
    for number, group in enumerate(groups):
        text, listed = group
        if text and listed and found[number].any():
            found[number] = [trace.rank in listed for trace in traces]
    return found


def _first_of(columns: Sequence[np.ndarray]) -> np.ndarray:
    """bool [rows]: rows in which any of the sorted columns changes."""
    first = np.ones(len(columns[0]), bool)
    if len(first) > 1:
        first[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return first


def _agree(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """bool [entries]: all rows of an entry hold one value."""
    if not len(values):
        return np.empty(0, bool)
    start = np.flatnonzero(first)
    return np.maximum.reduceat(values, start) == np.minimum.reduceat(values, start)


def _agree_bytes(rows: _Rows, first: np.ndarray) -> np.ndarray:
    """bool [entries]: no two ranks of an all-reduce name different numbers of bytes."""
    if not len(rows.num_bytes):
        return np.empty(0, bool)
    start = np.flatnonzero(first)
    largest = np.maximum.reduceat(rows.num_bytes, start)
    known = np.where(rows.num_bytes >= 0, rows.num_bytes, np.iinfo(np.int64).max)
    least = np.minimum.reduceat(known, start)
    return (largest == NONE) | (largest == least) | (rows.by[start] == _BY_SEQUENCE)


def _told(
    by: np.ndarray, bad: np.ndarray, whole: np.ndarray, lost: np.ndarray, table: np.ndarray
) -> tuple[str, ...]:
    """Why entries were not matched, counted."""
    told = []
    if table.shape[1] < 2:
        return ()
    missing = int((bad & (by == _BY_SEQUENCE) & ~whole).sum())
    if missing:
        told.append(
            f"{missing} collectives are not on the trace of every rank of their group: they stay "
            "comm_unsplit; record all ranks over the same steps"
        )
    differ = int((bad & (by == _BY_SEQUENCE) & whole).sum())
    if differ:
        told.append(f"{differ} collectives have one sequence but different names on the ranks")
    for way, stretch in _STRETCH.items():
        count = int((bad & (by == way)).sum())
        if count:
            told.append(
                f"{count} collectives without a sequence number stay comm_unsplit: ranks differ in "
                f"their number, names or bytes within a {stretch}"
            )
    return tuple(told)
