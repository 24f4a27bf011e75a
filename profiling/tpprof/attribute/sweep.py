"""The sweep: every moment of one rank's span gets exactly one leaf.

Work owns the moments it runs. Of one stream the kernel that started earlier keeps what its
successor shares with it: under programmatic dependent launch the successor only waits there. Of
several streams compute comes before communication before copies, and then the earlier start.
Communication is divided at the moment its last rank came. What is left is idle: `idle` says why.
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

_PRIORITY = np.array([0, 1, 1, 2])
"""By WorkKind: who owns what several streams share."""


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
    begin, stop = _alone_on_lane(work, broken)
    is_comm = np.isin(work.kind, (WorkKind.COMM, WorkKind.FUSED_COMM))
    points = [begin, stop, ready.at_ns[is_comm & ready.known], np.array([low, high])]
    cuts = intervals.distinct(np.clip(np.concatenate(points), low, high))
    starts, ends = cuts[:-1], cuts[1:]
    # Of one stream intervals are disjoint, so this has at most one entry per piece and stream.
    first, after = np.searchsorted(cuts, np.clip((begin, stop), low, high))
    member = np.repeat(np.arange(len(work)), after - first)
    piece = np.arange(len(member)) + np.repeat(first - (np.cumsum(after - first) - (after - first)),
                                               after - first)  # fmt: skip
    never = np.iinfo(np.int64).max
    best = np.full(len(starts), never)
    np.minimum.at(best, piece, _PRIORITY[work.kind[member]] * len(work) + member)
    busy = best < never
    owner = np.full(len(starts), -1, np.int64)
    owner[busy] = best[busy] % max(len(work), 1)
    leaf = np.full(len(starts), LEAF["host_tail"], np.int8)
    leaf[busy] = work.leaf[owner[busy]]
    comm_active = np.zeros(len(starts), bool)
    comm_active[piece[is_comm[member]]] = True
    comm = np.flatnonzero(busy)
    comm = comm[is_comm[owner[comm]] & ready.known[owner[comm]]]
    arrived = starts[comm] >= ready.at_ns[owner[comm]]
    fused = work.kind[owner[comm]] == WorkKind.FUSED_COMM
    after_wait = np.where(fused, LEAF["fused_comm"], LEAF["comm_transfer"])
    leaf[comm] = np.where(arrived, after_wait, LEAF["comm_wait"])
    following = np.concatenate((owner[1:], [-1])) if len(owner) else owner
    return Pieces(
        start_ns=starts,
        end_ns=ends,
        leaf=leaf,
        part=np.full(len(starts), -1, np.int16),
        owner=np.where(busy, owner, following),
        busy=busy,
        hidden=comm_active & (best < len(work)),
    )


def _alone_on_lane(work: Work, broken: np.ndarray) -> intervals.Columns:
    """What each row has of its lane; rows that are broken have nothing."""
    begin, stop = work.start_ns.copy(), work.start_ns.copy()
    for lane in intervals.distinct(work.lane):
        rows = np.flatnonzero((work.lane == lane) & ~broken)
        begin[rows], stop[rows] = intervals.first_come(work.start_ns[rows], work.end_ns[rows])
    return begin, stop


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
