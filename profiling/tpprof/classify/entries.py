"""The work of a trace while it is being judged: where each piece comes from and what it belongs to.

Nothing here looks at a piece of its own in Python: texts are looked at once, columns do the rest.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tpprof.classify.executions import OP_PREFIX, Executions
from tpprof.classify.steps import Step, step_at
from tpprof.events import NONE, Kind, Trace
from tpprof.intervals import innermost

_LAYER = re.compile(r"(?:^|[._ ])(?:layers?|h|blocks?)[._](\d+)(?:\b|_)|DecoderLayer_(\d+)")
_MOST_LAYERS = 100_000


class Texts:
    """Numbers for texts."""

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self.texts = list(texts)
        self._numbers = {text: number for number, text in enumerate(texts)}

    def number(self, text: str) -> int:
        """Its index in `texts`."""
        found = self._numbers.setdefault(text, len(self.texts))
        if found == len(self.texts):
            self.texts.append(text)
        return found

    def numbers(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [texts]; NONE for empty ones."""
        return np.array([self.number(text) if text else NONE for text in texts], np.int32)


@dataclass
class Entries:
    """Columns of n entries in the order of a `Work`."""

    row: np.ndarray
    start_ns: np.ndarray
    end_ns: np.ndarray
    lane: np.ndarray
    kind: np.ndarray
    """int8, of `WorkKind`; names say it first, then what is known besides."""
    step: np.ndarray
    """int64: place in the list of steps; -1 for none."""
    launch: np.ndarray
    """int64: row of the call that issued it; -1 for none."""
    in_graph: np.ndarray
    """bool: that call replays a graph."""
    op: np.ndarray
    """int64: row of the framework operator it belongs to; -1 for none."""
    op_id: np.ndarray
    """int32: index into `op_ids`, the tpinfer op it belongs to; -1 for none."""
    unit: np.ndarray
    """int64: entries of one execution of a tpinfer op share a number."""
    op_ids: list[str]
    host_lane: np.ndarray
    moment: np.ndarray
    """int64 ns: when and on which thread the host asked for it."""
    is_cpu: bool

    def __len__(self) -> int:
        return len(self.row)

    @property
    def length_ns(self) -> np.ndarray:
        """int64 [n]."""
        return self.end_ns - self.start_ns


def make_entries(trace: Trace, work: Executions, steps: Sequence[Step]) -> Entries:
    """Columns of the work, `kind` still zero."""
    order = _order(work.start_ns, work.end_ns, trace.lane[work.row])
    row, start, end = work.row[order], work.start_ns[order], work.end_ns[order]
    launch = trace.launch[row].astype(np.int64)
    lane, moment = trace.lane[row].astype(np.int64), start.copy()
    in_graph = np.zeros(len(row), bool)
    if work.is_cpu:
        launch[:] = NONE
        op = np.where(trace.kind[row] == Kind.OP, row, NONE)
    else:
        has = launch >= 0
        called = launch[has]
        lane[has], moment[has] = trace.lane[called], trace.start_ns[called]
        in_graph[has] = _launches_graph(trace)[called]
        op = trace.op[row].astype(np.int64)
        op[has] = np.where(op[has] < 0, trace.op[called], op[has])
        op[in_graph] = NONE  # whoever replays a graph is not what its kernels were made for
    found = Entries(
        row=row, start_ns=start, end_ns=end, lane=trace.lane[row].astype(np.int32),
        kind=np.zeros(len(row), np.int8), step=step_at(list(steps), moment), launch=launch,
        in_graph=in_graph, op=op, op_id=np.full(len(row), NONE, np.int32),
        unit=-1 - np.arange(len(row), dtype=np.int64), op_ids=[], host_lane=lane, moment=moment,
        is_cpu=work.is_cpu,
    )  # fmt: skip
    _find_op_ids(trace, found)
    return found


def _order(start: np.ndarray, end: np.ndarray, lane: np.ndarray) -> np.ndarray:
    """By (start, lane, -end); rows mostly come by start, so only ties are looked at."""
    order = np.argsort(start, kind="stable")
    same = start[order][1:] == start[order][:-1]
    if not same.any():
        return order
    tied = np.zeros(len(order), bool)
    tied[1:] = same
    tied[:-1] |= same
    place = np.flatnonzero(tied)
    row = order[place]
    order[place] = row[np.lexsort((-end[row], lane[row], start[row]))]
    return order


def _launches_graph(trace: Trace) -> np.ndarray:
    """bool [rows]."""
    named = np.array(["graphlaunch" in text.lower() for text in trace.strings], bool)
    return named[trace.name] & (trace.kind == Kind.LAUNCH)


def _find_op_ids(trace: Trace, entries: Entries) -> None:
    """Each entry's tpinfer op: itself, or the innermost range that its launch lies in."""
    named = np.array([text.startswith(OP_PREFIX) for text in trace.strings], bool)
    if not named.any() or not len(entries):
        return
    ranges = np.flatnonzero((trace.kind == Kind.RANGE) & named[trace.name])
    around = around_of(trace, ranges, entries)
    inside = around >= 0
    entries.unit[inside] = around[inside]
    texts, number = Texts(), np.full(len(trace.strings), NONE, np.int32)
    for index in np.flatnonzero(named).tolist():
        number[index] = texts.number(trace.strings[index][len(OP_PREFIX) :].strip())
    entries.op_id[inside] = number[trace.name[around[inside]]]
    entries.op_ids = texts.texts


def around_of(trace: Trace, ranges: np.ndarray, entries: Entries) -> np.ndarray:
    """int64 [n]: innermost of `ranges` (rows) on an entry's host lane at its moment, or itself;
    -1 for none."""
    found = np.full(len(entries), NONE, np.int64)
    if not len(ranges):
        return found
    if entries.is_cpu:
        own = np.isin(entries.row, ranges)
        found[own] = entries.row[own]
        if own.all():
            return found
    for lane in np.unique(trace.lane[ranges]).tolist():
        here = ranges[trace.lane[ranges] == lane]
        mine = np.flatnonzero((entries.host_lane == lane) & (found < 0))
        at = innermost(trace.start_ns[here], trace.end_ns[here], entries.moment[mine])
        found[mine] = np.where(at >= 0, here[at], NONE)
    return found


def split_rows(rows: np.ndarray, group: np.ndarray) -> list[np.ndarray]:
    """Rows of each group, in order."""
    if not len(rows):
        return []
    order = np.argsort(group, kind="stable")
    edges = np.flatnonzero(np.diff(group[order])) + 1
    return np.split(rows[order], edges)


def framework_keys(trace: Trace, entries: Entries, texts: Texts) -> np.ndarray:
    """int32 [n]: tpinfer op, else the framework operator it was launched for; numbers of `texts`,
    -1 for neither."""
    names = trace.name[entries.op]
    used = np.unique(names[entries.op >= 0]) if len(entries) else np.empty(0, np.int64)
    number = np.full(len(trace.strings) + 1, NONE, np.int32)
    number[used] = texts.numbers([trace.strings[index] for index in used.tolist()])
    own = np.append(texts.numbers(entries.op_ids), np.int32(NONE))[entries.op_id]
    named = np.where(entries.op >= 0, number[names], NONE) if len(entries) else own
    return np.where(own >= 0, own, named).astype(np.int32)


def layers_of(trace: Trace, entries: Entries, keys: np.ndarray, texts: Texts) -> np.ndarray:
    """int32 [n]: layer by key, else by the innermost module or range whose name has one; -1."""
    by_key = np.array([*(_layer_in(text) for text in texts.texts), NONE], np.int32)
    layer = by_key[keys]
    if (layer >= 0).all():
        return layer
    spans = np.flatnonzero((trace.kind == Kind.RANGE) | (trace.kind == Kind.PYTHON))
    numbers = np.full(len(trace.strings), NONE, np.int32)
    used = np.unique(trace.name[spans])
    numbers[used] = [_layer_in(trace.strings[index]) for index in used.tolist()]
    ranges = spans[numbers[trace.name[spans]] >= 0]
    if not len(ranges):
        return layer
    around = around_of(trace, ranges, entries)
    found = np.where(around >= 0, numbers[trace.name[around]], NONE)
    return np.where(layer >= 0, layer, found).astype(np.int32)


def _layer_in(text: str) -> int:
    found = _LAYER.search(text)
    number = (found.group(1) or found.group(2)) if found else ""
    return int(number) if number and len(number) <= 6 and int(number) < _MOST_LAYERS else NONE
