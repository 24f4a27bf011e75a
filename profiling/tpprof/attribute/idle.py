"""Why no device work ran: gaps between ops, explained by the op that ends each.

Before its launch call began the host had not asked for it (`host`, by part). Inside the call, and
up to the launch floor behind the later of the call and the gap's start, the device was getting
ready (`launch_latency`). Beyond that a recorded wait explains it (`dependency_wait`), or nothing
does (`idle_unexplained`). Between nodes of one graph launch it is `graph_gap`.
"""

from dataclasses import dataclass

import numpy as np

from tpprof import intervals
from tpprof.attribute.host_parts import HostParts, main_thread
from tpprof.attribute.timeline import LEAF, Pieces
from tpprof.classify.work import Work
from tpprof.events import Kind, Trace


@dataclass(frozen=True, slots=True)
class LaunchFloors:
    """How long a device may take to start an op that it could start."""

    kernel_ns: int = 5_000
    graph_ns: int = 10_000
    """First node of a graph."""


@dataclass(frozen=True)
class _Launches:
    """Columns over the rows of a Work."""

    row: np.ndarray
    """int64: the call; -1 where it is missing."""
    start_ns: np.ndarray
    """int64; of the work itself where the call is missing."""
    end_ns: np.ndarray
    is_graph: np.ndarray
    """bool: the call launches a graph."""
    is_first: np.ndarray
    """bool: the first op of its launch."""


def count_negative_launches(trace: Trace, work: Work) -> int:
    """Ops that started before the call that launched them; the sweep clamps them."""
    return int((_launches(trace, work).start_ns > work.start_ns).sum())


def explain_gaps(
    trace: Trace, work: Work, gaps: Pieces, parts: HostParts, floors: LaunchFloors
) -> Pieces:
    """The gaps cut into pieces with leaves, in order of time. `gaps.owner` is the next op, -1 where
    none came."""
    start, end = gaps.start_ns, gaps.end_ns
    if work.is_cpu:
        ends = (end, end, end)
        lanes = np.full(len(gaps), main_thread(trace), np.int32)
    else:
        launches = _launches(trace, work)
        ends = _stages(work, launches, gaps, floors)
        row = launches.row[gaps.owner] if len(work) else np.full(len(gaps), -1)
        lanes = np.where((gaps.owner >= 0) & (row >= 0), trace.lane[row] if len(trace) else -1, -1)
    host_begin, host_end, host_row, part = parts.cut(start, ends[0], lanes)
    gap_leaf = _leaf_of_rest(trace, work, gaps, ends[1])
    columns = [
        (host_begin, host_end, host_row, np.full(len(host_row), LEAF["host"]), part),
        _stretch(ends[0], ends[1], np.full(len(gaps), LEAF["launch_latency"])),
        _stretch(ends[1], end, gap_leaf),
    ]
    unsorted = [np.concatenate(column) for column in zip(*columns, strict=True)]
    order = np.argsort(unsorted[0], kind="stable")
    begin, stop, gap, leaf, part = (column[order] for column in unsorted)
    return Pieces(
        start_ns=begin,
        end_ns=stop,
        leaf=leaf.astype(np.int8),
        part=part.astype(np.int16),
        owner=gaps.owner[gap],
        busy=np.zeros(len(begin), bool),
        hidden=np.zeros(len(begin), bool),
    )


def _stretch(begin: np.ndarray, stop: np.ndarray, leaf: np.ndarray) -> tuple[np.ndarray, ...]:
    rows = np.flatnonzero(stop > begin)
    return begin[rows], stop[rows], rows, leaf[rows], np.full(len(rows), -1, np.int16)


def _launches(trace: Trace, work: Work) -> _Launches:
    row = trace.launch[work.row].astype(np.int64)
    linked = row >= 0
    is_graph_text = np.array(["graphlaunch" in text.lower() for text in trace.strings], bool)
    is_graph = np.zeros(len(work), bool)
    is_graph[linked] = is_graph_text[trace.name[row[linked]]]
    is_first = ~linked
    found = np.flatnonzero(linked)
    is_first[found[np.unique(row[found], return_index=True)[1]]] = True
    return _Launches(
        row=row,
        start_ns=np.where(linked, trace.start_ns[row], work.start_ns),
        end_ns=np.where(linked, trace.end_ns[row], work.start_ns),
        is_graph=is_graph,
        is_first=is_first,
    )


def _stages(
    work: Work, launches: _Launches, gaps: Pieces, floors: LaunchFloors
) -> tuple[np.ndarray, np.ndarray]:
    """Per gap: where the host's part ends, and where launch latency ends."""
    start, end = gaps.start_ns, gaps.end_ns
    if not len(work):
        return start, start
    op = gaps.owner
    explained = (op >= 0) & (launches.row[op] >= 0) & launches.is_first[op]
    called = np.where(explained, np.clip(launches.start_ns[op], start, end), start)
    returned = np.clip(launches.end_ns[op], called, end)
    floor = np.where(launches.is_graph[op], floors.graph_ns, floors.kernel_ns)
    return called, np.where(explained, np.minimum(returned + floor, end), start)


def _leaf_of_rest(trace: Trace, work: Work, gaps: Pieces, begin: np.ndarray) -> np.ndarray:
    """Leaf of [begin, end of gap)."""
    leaf = np.full(len(gaps), LEAF["idle_unexplained"])
    leaf[gaps.owner < 0] = LEAF["host_tail"]
    if work.is_cpu or not len(work):
        return leaf
    launches = _launches(trace, work)
    has_op, op = gaps.owner >= 0, gaps.owner
    waited = _waits_recorded(trace, work, launches, gaps, begin)
    leaf[has_op & waited] = LEAF["dependency_wait"]
    later_node = has_op & ~launches.is_first[op]
    later_node |= has_op & (launches.row[op] < 0) & _follows_node(trace, work)[op]
    leaf[later_node] = LEAF["graph_gap"]
    return leaf


def _follows_node(trace: Trace, work: Work) -> np.ndarray:
    """bool [n]: a graph node whose predecessor in time is one too; tells graph gaps in files that
    were cut so short that launches are missing."""
    node = trace.node[work.row] >= 0
    node[1:] &= node[:-1]
    node[:1] = False
    return node


def _waits_recorded(
    trace: Trace, work: Work, launches: _Launches, gaps: Pieces, begin: np.ndarray
) -> np.ndarray:
    """bool [gaps]: a wait between streams was recorded for the op that ends the gap.

    Either a wait on the op's stream, issued before its own launch, lasts beyond `begin`, or one
    lasts until the op begins, or one was issued, on that stream or by the op's thread, between the
    launch of the op before it on its stream and its own. What is issued later is for ops behind it.
    A host thread that waits for the device (`cudaStreamSynchronize`) explains nothing.
    """
    waits = _wait_rows(trace)
    found = np.zeros(len(gaps), bool)
    if not len(waits):
        return found
    before = _launched_before(work, launches)
    for lane in intervals.distinct(trace.lane[waits]):
        mine = waits[trace.lane[waits] == lane]
        on_stream = trace.lanes[lane].is_device
        row = launches.row[gaps.owner]
        op_lane = work.lane[gaps.owner] if on_stream else np.where(row >= 0, trace.lane[row], -1)
        chosen = np.flatnonzero((gaps.owner >= 0) & (op_lane == lane))
        op = gaps.owner[chosen]
        issued = np.sort(trace.start_ns[mine])
        low = np.searchsorted(issued, before[op], side="left")
        found[chosen] |= np.searchsorted(issued, launches.start_ns[op], side="right") > low
        if on_stream:
            # Issued before the op, and not over when the rest of the gap began.
            order = np.argsort(trace.start_ns[mine], kind="stable")
            until = np.maximum.accumulate(trace.end_ns[mine][order])
            last = np.searchsorted(issued, launches.start_ns[op], side="right") - 1
            found[chosen] |= (last >= 0) & (until[np.maximum(last, 0)] > begin[chosen])
            # Or, where waits are recorded as the stream lives them, over as the op begins.
            last = np.searchsorted(issued, gaps.end_ns[chosen], side="left") - 1
            found[chosen] |= (last >= 0) & (until[np.maximum(last, 0)] >= gaps.end_ns[chosen])
    return found


def _wait_rows(trace: Trace) -> np.ndarray:
    """Rows that make a stream wait: recorded waits, and calls of the `...StreamWaitEvent` kind."""
    lower = [text.lower() for text in trace.strings]
    waits = np.array(["wait" in text for text in lower], bool)
    syncs = np.array(["sync" in text for text in lower], bool)
    calls = np.array(["streamwait" in text for text in lower], bool)
    if not len(trace):
        return np.empty(0, np.int64)
    on_device = np.array([lane.is_device for lane in trace.lanes], bool)[trace.lane]
    recorded = waits[trace.name] | (on_device & ~syncs[trace.name])
    return np.flatnonzero(
        ((trace.kind == Kind.SYNC) & recorded) | ((trace.kind == Kind.LAUNCH) & calls[trace.name])
    )


def _launched_before(work: Work, launches: _Launches) -> np.ndarray:
    """int64 [n]: when the op before this one on its stream was launched; long ago for the first."""
    order = np.lexsort((work.start_ns, work.lane))
    before = np.full(len(work), np.iinfo(np.int64).min)
    same = work.lane[order][1:] == work.lane[order][:-1]
    before[order[1:][same]] = launches.start_ns[order[:-1][same]]
    return before
