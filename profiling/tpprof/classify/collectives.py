"""What is known of each collective: from the recorder where it tells, else from names and op ids.

Message bytes are the larger of what goes in and what comes out, as NCCL counts them. What a rank
must send of a message is its bus bandwidth factor (nccl-tests, doc/PERFORMANCE.md; for all-reduce
Patarasuk and Yuan 2009).
"""

from dataclasses import dataclass

import numpy as np

from tpprof.classify.collective_kinds import busbw_factor
from tpprof.classify.entries import Entries, Texts
from tpprof.classify.manifest import COLLECTIVES, Manifest
from tpprof.classify.names import Names
from tpprof.classify.prices import Prices
from tpprof.classify.shapes import parse_shapes
from tpprof.classify.work import WorkKind
from tpprof.events import NONE, Trace
from tpprof.intervals import innermost

_OF_OURS = "tp"
"""Group of the collectives in this project's programs in which all ranks meet. Of others the ranks
follow, so that groups beside each other are told apart."""
_LAST_WORDS = {**COLLECTIVES, "gather_q": "allgather", "merge": "alltoall", "search": "allgather"}
"""Last word of an op's id -> what it is called elsewhere."""
_ON_CPU = "cpu"
"""Group of a CPU rank's collectives where the recorder tells none: all of them, in one order."""
_OTHER = "other"


@dataclass(frozen=True)
class Communication:
    """Columns of n entries, as in `Work`."""

    op: np.ndarray
    num_bytes: np.ndarray
    group: np.ndarray
    size: np.ndarray
    sequence: np.ndarray


def is_comm(kind: np.ndarray) -> np.ndarray:
    """bool [n]."""
    return (kind == WorkKind.COMM) | (kind == WorkKind.FUSED_COMM)


def mark_known(trace: Trace, entries: Entries, manifest: Manifest | None) -> None:
    """Set `kind` where something better than the name says that an entry communicates: the
    recorder, or an op of ours in which no kernel has the name of a collective."""
    row, _ = _told(trace, entries)
    told = np.flatnonzero(row >= 0)
    entries.kind[told[entries.kind[told] == WorkKind.COMPUTE]] = WorkKind.COMM
    if not entries.op_ids:
        return
    waits = np.array([_collective_of(op, manifest) != "" for op in entries.op_ids] + [False], bool)
    mine = np.flatnonzero(waits[entries.op_id])
    named = np.isin(entries.unit[mine], entries.unit[mine][is_comm(entries.kind[mine])])
    mine = mine[~named]
    entries.kind[mine[entries.kind[mine] == WorkKind.COMPUTE]] = WorkKind.COMM


def _collective_of(op: str, manifest: Manifest | None) -> str:
    """`allreduce`, `allgather` or `alltoall` for an op in which ranks wait for each other, else "".
    Without a manifest (Nsight records none) the last word of the id says it."""
    if manifest is None:
        return _LAST_WORDS.get(op.rpartition(".")[2], "")
    place = manifest.place.get(op)
    return "" if place is None else COLLECTIVES.get(manifest.kinds[place], "")


def communication(
    trace: Trace, entries: Entries, names: Names, manifest: Manifest | None, texts: Texts
) -> Communication:
    """The columns; op and group are numbers of `texts`."""
    count, comm = len(entries), is_comm(entries.kind)
    found = Communication(
        op=np.full(count, NONE, np.int32),
        num_bytes=np.full(count, NONE, np.int64),
        group=np.full(count, NONE, np.int32),
        size=np.full(count, NONE, np.int32),
        sequence=np.full(count, NONE, np.int64),
    )
    if not comm.any():
        return found
    by_name = np.full(len(trace.strings), NONE, np.int32)
    for index in np.unique(names.index[comm]).tolist():
        by_name[index] = texts.number(names.verdicts[index].op or _OTHER)
    found.op[comm] = by_name[names.index[comm]]
    if manifest is not None or entries.op_ids:
        _by_manifest(found, entries, comm, manifest, texts)
    if manifest is None and entries.is_cpu:
        found.group[comm], found.size[comm] = texts.number(_ON_CPU), trace.world_size
        _by_shapes(found, trace, entries, comm)
    _by_recorder(found, trace, entries, comm, texts)
    return found


def _by_manifest(
    found: Communication,
    entries: Entries,
    comm: np.ndarray,
    manifest: Manifest | None,
    texts: Texts,
) -> None:
    ops = [_collective_of(op, manifest) for op in entries.op_ids]
    op = np.append(texts.numbers(ops), np.int32(NONE))[entries.op_id]
    ours = comm & (op >= 0)
    found.op[ours] = op[ours]
    if manifest is None:
        return
    places = [manifest.place.get(op) for op in entries.op_ids]
    met = [None if place is None else manifest.ranks[place] for place in places]
    names = [f"{_OF_OURS} {one[0]}-{one[1]}" if one else _OF_OURS for one in met]
    sizes = [one[1] - one[0] + 1 if one else manifest.tp for one in met]
    ours = comm & np.array([place is not None for place in places] + [False], bool)[entries.op_id]
    if ours.any():
        op_id = entries.op_id[ours]
        found.group[ours] = texts.numbers(names)[op_id]
        found.size[ours] = np.array(sizes, np.int32)[op_id]


def _by_shapes(found: Communication, trace: Trace, entries: Entries, comm: np.ndarray) -> None:
    """Message of a backend's range whose inputs were recorded with their dtype."""
    rows = np.flatnonzero(comm & (entries.op < 0) & (trace.shapes[entries.row] >= 0))
    shapes = trace.shapes[entries.row[rows]]
    for index in np.unique(shapes).tolist():
        tensors = parse_shapes(trace.strings[index])
        if tensors and not any(one.in_list for one in tensors):
            moved = sum(one.num_bytes for one in tensors)
            found.num_bytes[rows[shapes == index]] = min(moved, 1 << 62)


def _by_recorder(
    found: Communication, trace: Trace, entries: Entries, comm: np.ndarray, texts: Texts
) -> None:
    told = trace.collectives
    at, exact = _told(trace, entries)
    rows = np.flatnonzero((at >= 0) & comm)
    if not len(rows):
        return
    at = at[rows]
    found.op[rows] = _renumber(trace, told.op, texts)[at]
    found.num_bytes[rows] = np.where(exact[rows], told.num_bytes[at], found.num_bytes[rows])
    found.sequence[rows] = told.sequence[at]
    size, group = told.group_size[at], _renumber(trace, told.group, texts)[at]
    found.size[rows] = np.where(size >= 0, size, found.size[rows])
    found.group[rows] = np.where(group >= 0, group, found.group[rows])


def _renumber(trace: Trace, column: np.ndarray, texts: Texts) -> np.ndarray:
    """Numbers of `texts` for string indices; -1 stays."""
    table = np.full(len(trace.strings) + 1, NONE, np.int32)
    used = np.unique(column[column >= 0])
    table[used] = texts.numbers([trace.strings[index] for index in used.tolist()])
    return table[column]


def _told(trace: Trace, entries: Entries) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [n]: place in `Trace.collectives` of each entry, -1 where the recorder tells nothing;
    bool [n]: the entry is the row told of)."""
    at = np.full(len(entries), NONE, np.int64)
    told = trace.collectives.row
    if not len(told) or not len(entries):
        return at, at >= 0
    near = np.minimum(np.searchsorted(told, entries.row), len(told) - 1)
    exact = told[near] == entries.row
    at[exact] = near[exact]
    if not entries.is_cpu:
        return at, exact
    # The call around a told row stands for it.
    inner = np.flatnonzero(~np.isin(told, entries.row))
    holder = innermost(entries.start_ns, entries.end_ns, trace.start_ns[told[inner]])
    inside = (holder >= 0) & (entries.lane[holder] == trace.lane[told[inner]])
    inside &= entries.kind[holder] == WorkKind.COMM
    at[holder[inside]] = inner[inside]
    exact[holder[inside]] = True
    return at, exact


def bytes_on_wire(prices: Prices, found: Communication, texts: Texts) -> None:
    """What is sent from the message where that is told, else the message from what is sent.

    Of an unknown group two ranks are taken: nobody sends less.
    """
    rows = np.flatnonzero(found.op >= 0)
    size = np.maximum(found.size[rows], 2)
    share = np.ones(len(rows))
    pairs, which = np.unique(np.stack((found.op[rows], size), 1), axis=0, return_inverse=True)
    if len(pairs):
        factors = [busbw_factor(texts.texts[op], ranks) for op, ranks in pairs.tolist()]
        share = np.array(factors)[which.reshape(-1)]
    message, sent = found.num_bytes[rows], prices.num_sent[rows]
    prices.num_sent[rows] = np.where(message >= 0, np.rint(message * share), sent).astype(np.int64)
    from_sent = (message < 0) & (sent > 0)
    found.num_bytes[rows] = np.where(from_sent, np.rint(sent / share), message).astype(np.int64)
