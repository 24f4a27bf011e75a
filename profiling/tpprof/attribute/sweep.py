"""The sweep: every moment of one rank's span gets exactly one leaf.

Work owns the moments it runs: compute before communication before copies, and within one class
the one that started earlier (so under programmatic dependent launch a kernel keeps what its
successor shares with it). Communication is divided at the moment its last rank came. What is left
is idle, and `idle` says why.
"""

from dataclasses import dataclass, field

import numpy as np

from tpprof import intervals
from tpprof.attribute.host_parts import HostParts
from tpprof.attribute.idle import LaunchFloors, count_negative_launches, explain_gaps
from tpprof.attribute.timeline import LEAF, Pieces, Timeline
from tpprof.classify.work import Work, WorkKind
from tpprof.events import Trace
from tpprof.ranks.wait import Ready


@dataclass(frozen=True)
class Recorded:
    """What of a rank's recording can be trusted."""

    start_ns: int
    """First moment any row speaks of."""
    end_ns: int
    broken: np.ndarray
    """bool [n] over the rows of a Work: entries that cannot be true; they own nothing."""
    lost: intervals.Columns
    """Disjoint stretches in which the recorder lost events: no idle time is claimed there."""
    warnings: tuple[str, ...] = field(default=())


def sweep(
    trace: Trace,
    work: Work,
    ready: Ready,
    recorded: Recorded,
    span: tuple[int, int],
    floors: LaunchFloors,
) -> Timeline:
    """The timeline of one rank over [span[0], span[1])."""
    pieces = _own(work, ready, recorded.broken, *span)
    parts = HostParts(trace)
    gaps = np.flatnonzero(~pieces.busy)
    idle = explain_gaps(trace, work, pieces.take(gaps), parts, floors)
    both = [pieces.take(np.flatnonzero(pieces.busy)), _mark_lost(idle, recorded)]
    return Timeline(
        rank=trace.rank,
        pieces=_joined(both),
        parts=parts.names,
        has_tail=not work.is_cpu,
        num_negative_launches=count_negative_launches(trace, work),
    )


def _own(work: Work, ready: Ready, broken: np.ndarray, low: int, high: int) -> Pieces:
    """Busy pieces, and between them one piece per gap with the next op as its owner."""
    is_comm = np.isin(work.kind, (WorkKind.COMM, WorkKind.FUSED_COMM))
    classes = []
    for members in (work.kind == WorkKind.COMPUTE, is_comm, work.kind == WorkKind.COPY):
        rows = np.flatnonzero(members & ~broken)
        begin, stop = intervals.first_come(work.start_ns[rows], work.end_ns[rows])
        filled = stop > begin
        classes.append((rows[filled], begin[filled], stop[filled]))
    divided = np.flatnonzero(is_comm & ready.known)
    points = [column for _, begin, stop in classes for column in (begin, stop)]
    points.append(ready.at_ns[divided])
    points.append(np.array([low, high]))
    cuts = intervals.distinct(np.clip(np.concatenate(points), low, high))
    starts, ends = cuts[:-1], cuts[1:]
    owner = np.full(len(starts), -1, np.int64)
    active = []
    for rows, begin, stop in reversed(classes):
        where = intervals.locate(begin, stop, starts)
        active.append(where >= 0)
        owner[where >= 0] = rows[where[where >= 0]]
    _, comm_active, compute_active = active
    busy = owner >= 0
    leaf = np.full(len(starts), LEAF["host_tail"], np.int8)
    leaf[busy] = work.leaf[owner[busy]]
    comm = np.flatnonzero(busy)
    comm = comm[is_comm[owner[comm]] & ready.known[owner[comm]]]
    arrived = starts[comm] >= ready.at_ns[owner[comm]]
    fused = work.kind[owner[comm]] == WorkKind.FUSED_COMM
    after = np.where(fused, LEAF["fused_comm"], LEAF["comm_transfer"])
    leaf[comm] = np.where(arrived, after, LEAF["comm_wait"])
    following = np.concatenate((owner[1:], [-1])) if len(owner) else owner
    return Pieces(
        start_ns=starts,
        end_ns=ends,
        leaf=leaf,
        part=np.full(len(starts), -1, np.int16),
        owner=np.where(busy, owner, following),
        busy=busy,
        hidden=compute_active & comm_active,
    )


def _mark_lost(idle: Pieces, recorded: Recorded) -> Pieces:
    """Idle time becomes `unrecorded` where events were lost and outside the recording."""
    outside = (
        np.array([np.iinfo(np.int64).min, recorded.end_ns]),
        np.array([recorded.start_ns, np.iinfo(np.int64).max]),
    )
    lost = intervals.merge(
        np.concatenate((recorded.lost[0], outside[0])),
        np.concatenate((recorded.lost[1], outside[1])),
    )
    begin, stop, row = intervals.cut(idle.start_ns, idle.end_ns, np.concatenate(lost))
    cut = idle.take(row)
    inside = intervals.locate(*lost, begin) >= 0
    return Pieces(
        start_ns=begin,
        end_ns=stop,
        leaf=np.where(inside, LEAF["unrecorded"], cut.leaf).astype(np.int8),
        part=np.where(inside, -1, cut.part).astype(np.int16),
        owner=cut.owner,
        busy=cut.busy,
        hidden=cut.hidden,
    )


def _joined(several: list[Pieces]) -> Pieces:
    """All pieces in order of time."""
    order = np.argsort(np.concatenate([p.start_ns for p in several]), kind="stable")
    return Pieces(
        *(
            np.concatenate([getattr(p, name) for p in several])[order]
            for name in ("start_ns", "end_ns", "leaf", "part", "owner", "busy", "hidden")
        )
    )
