"""Unsorted columns of one rank to its `Trace`: broken rows out, rows sorted, references renumbered.

Both readers end here, so what `Trace` guarantees is kept in one place. The result depends on what
was recorded, not on the order in which a file tells it: strings and lanes are sorted, and rows of
equal times are ordered by what they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from ..events import NONE, Collectives, Device, Kind, Lane, Trace

MISSING = np.iinfo(np.int64).min
"""A time that was not recorded, or cannot be one."""
LATEST_NS = 4 * 10**18
"""Times beyond it, either side of zero, are damage."""
_FROM_CUPTI = [Kind.KERNEL, Kind.COPY, Kind.MEMSET, Kind.LAUNCH, Kind.SYNC]
_OUTER_FIRST = np.empty(len(Kind), np.int8)
"""Of rows with equal times, what encloses what."""
_OUTER_FIRST[[Kind.PYTHON, Kind.RANGE, Kind.OP, Kind.LAUNCH, Kind.SYNC]] = range(5)
_OUTER_FIRST[[Kind.OVERHEAD, Kind.DEVICE_RANGE, Kind.KERNEL, Kind.COPY, Kind.MEMSET]] = range(5, 10)


class StringTable(dict[Any, int]):
    """Number of each text, given at the first look."""

    def __missing__(self, text: Any) -> int:
        number = self[text] = len(self)
        return number

    def texts(self) -> list[str]:
        """By number."""
        return ["(no name)" if text is None else str(text) for text in self]

    def holding(self, *parts: str) -> np.ndarray:
        """bool [strings + 1]: texts that hold one of the parts, in any case; the last, for rows
        without a text, is False.
        """
        lower = [text.lower() for text in self.texts()]
        return np.array([*(any(part in text for part in parts) for text in lower), False], bool)


@dataclass
class Rows:
    """Columns of one length in any order, as in `Trace`; `launch` and `op` number these rows."""

    start_ns: np.ndarray
    end_ns: np.ndarray
    kind: np.ndarray
    name: np.ndarray
    lane: np.ndarray
    launch: np.ndarray
    op: np.ndarray
    node: np.ndarray
    num_blocks: np.ndarray
    num_bytes: np.ndarray
    shapes: np.ndarray
    ordinal: np.ndarray
    """int64: a recorder's own number of the event; orders rows of equal times."""

    def __len__(self) -> int:
        return len(self.start_ns)

    def take(self, index: np.ndarray) -> "Rows":
        """These rows of all columns."""
        return Rows(*(getattr(self, column.name)[index] for column in fields(self)))


_SHORT = {"name", "lane", "launch", "op", "shapes"}


def make_rows(count: int, **columns: np.ndarray | int) -> Rows:
    """Rows with the columns given (a number fills a column), and NONE in the others."""
    filled = {}
    for column in fields(Rows):
        dtype = np.int8 if column.name == "kind" else np.int64
        dtype = np.int32 if column.name in _SHORT else dtype
        value = columns.pop(column.name, NONE)
        is_column = isinstance(value, np.ndarray)
        filled[column.name] = (
            value.astype(dtype, copy=False) if is_column else np.full(count, int(value), dtype)
        )
    assert not columns, f"no columns of rows: {', '.join(columns)}"
    return Rows(**filled)


def join_rows(pieces: Sequence[Rows]) -> Rows:
    """The pieces one behind the other; none makes a table without rows."""
    pieces = [*pieces] or [make_rows(0)]
    return Rows(
        *(np.concatenate([getattr(p, column.name) for p in pieces]) for column in fields(Rows))
    )


@dataclass
class Facts:
    """What a trace says beside its rows; see `Trace`."""

    rank: int
    source: str
    recorder: str
    devices: Mapping[int, Device] = field(default_factory=dict)
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    world_size: int = NONE
    num_lost: int = 0
    warnings: list[str] = field(default_factory=list)

    def lose(self, count: int, what: str) -> None:
        """Count rows that were lost or damaged, and say so."""
        if count:
            self.num_lost += count
            self.warnings.append(f"{self.source}: {what.format(n=count)}")


def broken_times(rows: Rows, facts: Facts) -> np.ndarray:
    """bool [rows]: rows to leave out; negative durations become zero, in place. All are told.

    A row at time 0, far before all others or without length, is one that the recorder never filled
    (CUPTI writes such rows when it runs out of buffers). Ranges may begin at 0 by choice.
    """
    start, end = rows.start_ns, rows.end_ns
    drop = (start == MISSING) | (np.abs(start) > LATEST_NS)
    facts.lose(int(drop.sum()), "{n} rows without a usable time were left out")
    # Subtracting first would overflow for damaged rows.
    unfilled = (start == 0) & ~drop
    if unfilled.any():
        others = start[~drop & (start > 0)]
        # A recording that begins at 0 by choice goes on from there.
        stray = len(others) > 0 and int(others.min()) > 10**12
        unfilled &= stray | ((end <= 0) & np.isin(rows.kind, _FROM_CUPTI))
        facts.lose(int(unfilled.sum()), "{n} rows with time 0, never filled, were left out")
    drop |= unfilled
    wrong = ~drop & ((end < start) | (np.abs(end) > LATEST_NS))
    facts.lose(int(wrong.sum()), "{n} rows ended before they began; they count as empty")
    end[wrong] = start[wrong]
    return drop


def sorted_order(rows: Rows) -> np.ndarray:
    """Rows by (start, -end); equal ones by what encloses what, then by number, lane and name."""
    order = np.argsort(rows.start_ns, kind="stable")
    start = rows.start_ns[order]
    same = np.zeros(len(order) + 1, bool)
    same[1:-1] = start[1:] == start[:-1]
    tied = np.flatnonzero(same[1:] | same[:-1])
    if len(tied):
        row = order[tied]
        keys = (
            rows.num_bytes[row],
            rows.num_blocks[row],
            rows.node[row],
            rows.name[row],
            rows.lane[row],
            rows.ordinal[row],
            _OUTER_FIRST[rows.kind[row]],
            -rows.end_ns[row],
            rows.start_ns[row],
        )
        order[tied] = row[np.lexsort(keys)]
    return order


def assemble(
    rows: Rows, strings: Sequence[str], lanes: Sequence[Lane], found: Collectives, facts: Facts
) -> Trace:
    """The `Trace` of rows whose times are sound.

    Args: rows in any order; `name`, `shapes` and the columns of `found` index `strings`, which may
    repeat; `lane` indexes `lanes`, of which unused ones are dropped; `found.row` numbers `rows`.
    """
    texts, text_of = _sort_strings(strings, rows, found)
    lanes, lane_of = _sort_lanes(lanes, rows)
    rows = replace(
        rows,
        name=_look_up(text_of, rows.name),
        shapes=_look_up(text_of, rows.shapes),
        lane=_look_up(lane_of, rows.lane),
    )
    order = sorted_order(rows)
    place = np.empty(len(rows), np.int32)
    place[order] = np.arange(len(rows), dtype=np.int32)
    rows = rows.take(order)
    at = np.argsort(place[found.row], kind="stable")
    return Trace(
        rank=facts.rank,
        source=facts.source,
        recorder=facts.recorder,
        strings=texts,
        lanes=lanes,
        start_ns=rows.start_ns,
        end_ns=rows.end_ns,
        kind=rows.kind,
        name=rows.name,
        lane=rows.lane,
        launch=_look_up(place, rows.launch),
        op=_look_up(place, rows.op),
        node=rows.node,
        num_blocks=rows.num_blocks,
        num_bytes=rows.num_bytes,
        shapes=rows.shapes,
        collectives=Collectives(
            row=place[found.row][at].astype(np.int64),
            op=_look_up(text_of, found.op)[at],
            num_bytes=found.num_bytes[at],
            group=_look_up(text_of, found.group)[at],
            group_size=found.group_size[at],
            sequence=found.sequence[at],
        ),
        devices=facts.devices,
        groups=facts.groups,
        world_size=facts.world_size,
        num_lost=facts.num_lost,
        warnings=tuple(facts.warnings),
    )


def _look_up(table: np.ndarray, index: np.ndarray) -> np.ndarray:
    """int32: entries of a table, NONE where the index is NONE."""
    if not len(table):
        return np.full(len(index), NONE, np.int32)
    return np.where(index >= 0, table[index], NONE).astype(np.int32, copy=False)


def _sort_strings(
    strings: Sequence[str], rows: Rows, found: Collectives
) -> tuple[list[str], np.ndarray]:
    """The strings in use, sorted, each once; and the new index of each old one."""
    used = np.zeros(len(strings) + 1, bool)
    for column in (rows.name, rows.shapes, found.op, found.group):
        used[column] = True  # NONE marks the last, which is no string
    kept = np.flatnonzero(used[:-1]).tolist()
    texts = sorted({strings[index] for index in kept})
    number = {text: index for index, text in enumerate(texts)}
    table = np.zeros(len(strings), np.int32)
    table[kept] = [number[strings[index]] for index in kept]
    return texts, table


def _sort_lanes(lanes: Sequence[Lane], rows: Rows) -> tuple[list[Lane], np.ndarray]:
    """The lanes in use: threads, then streams, by number; and the new index of each old one."""
    used = np.zeros(len(lanes) + 1, bool)
    used[rows.lane] = True
    kept = np.flatnonzero(used[:-1]).tolist()
    kept = sorted(
        kept, key=lambda i: (lanes[i].is_device, lanes[i].device, lanes[i].pid, lanes[i].tid)
    )
    table = np.zeros(len(lanes), np.int32)
    table[kept] = np.arange(len(kept), dtype=np.int32)
    return [lanes[index] for index in kept], table
