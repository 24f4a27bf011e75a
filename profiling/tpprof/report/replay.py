"""Replay of several ranks along the moments at which they wait for each other.

Letters: C meetings in order of time, R ranks. Between two meetings a rank works on its own (a gap);
at a meeting it goes on when the last source has come, and then holds for as long as it was seen to
(the transfer). With g the gaps, x the holds, and S the sources of meeting c:

    arrive[c, r] = leave[before, r] + g[c, r]
    leave[c, r]  = max(arrive[c, r] + w[c, r],
                       max(arrive[c, r], max over S of arrive[c, s]) + x[c, r])

w is work that a rank did beside the meeting: communication hidden under compute. A collective's
sources are all its ranks; a message's source is its sender. The system is max-plus
linear: with nothing cut it gives back what was recorded to the ns, and cutting more never takes
longer. What it cannot know: work that would move into the time won, and contention that would go.
"""

from dataclasses import dataclass

import numpy as np

_NEVER = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Meetings:
    """What was recorded, on one clock; int64 ns. Rows in an order that no rank contradicts."""

    start_ns: np.ndarray
    """[R]: where each rank's replay begins."""
    end_ns: np.ndarray
    """[R]: where it ended."""
    arrive_ns: np.ndarray
    """[C, R]; any value where the rank takes no part."""
    leave_ns: np.ndarray
    """[C, R]; any value where the rank takes no part."""
    takes_part: np.ndarray
    """bool [C, R]."""
    is_source: np.ndarray
    """bool [C, R], within takes_part: ranks that others cannot go on without."""
    beside_ns: np.ndarray | None = None
    """[C, R]: own work between arrival and leaving, at most what lies between them; None for none
    anywhere."""

    def __len__(self) -> int:
        return len(self.arrive_ns)

    @property
    def complete_ns(self) -> np.ndarray:
        """int64 [C]: when the last source came."""
        return np.where(self.is_source, self.arrive_ns, _NEVER).max(1, initial=_NEVER)


def left_before(meetings: Meetings) -> np.ndarray:
    """int64 [C + 1, R]: when each rank left its meeting before this one, or started; the last row
    is the one before its end."""
    left = np.empty((len(meetings) + 1, len(meetings.start_ns)), np.int64)
    now = meetings.start_ns.copy()
    for c in range(len(meetings)):
        left[c] = now
        now = np.where(meetings.takes_part[c], meetings.leave_ns[c], now)
    left[-1] = now
    return left


def gaps_of(meetings: Meetings) -> np.ndarray:
    """int64 [C + 1, R]: own work before each meeting, and before the end; 0 where a rank takes no
    part. Negative where a rank ran communication beside its own work."""
    gaps = np.zeros((len(meetings) + 1, len(meetings.start_ns)), np.int64)
    left = left_before(meetings)
    gaps[:-1] = np.where(meetings.takes_part, meetings.arrive_ns - left[:-1], 0)
    gaps[-1] = meetings.end_ns - left[-1]
    return gaps


def holds_of(meetings: Meetings) -> np.ndarray:
    """int64 [C, R]: time from the moment a rank could go on until it did; slightly negative where
    clocks are a little off."""
    begun = np.maximum(meetings.arrive_ns, meetings.complete_ns[:, None])
    return np.where(meetings.takes_part, meetings.leave_ns - begun, 0)


def lateness_of(meetings: Meetings) -> np.ndarray:
    """int64 [C, R]: how long after every other source a rank came; 0 for all but the last."""
    arrive = np.where(meetings.is_source, meetings.arrive_ns, _NEVER)
    several = meetings.is_source.sum(1) > 1
    late = np.zeros(arrive.shape, np.int64)
    if not several.any():
        return late
    ordered = np.sort(arrive[several], axis=1)
    last, second = ordered[:, -1:], ordered[:, -2:-1]
    late[several] = np.where(arrive[several] == last, last - second, 0)
    return late


def spread_of(meetings: Meetings) -> np.ndarray:
    """int64 [C, R]: how long after the first source each source came."""
    never = np.iinfo(np.int64).max
    first = np.where(meetings.is_source, meetings.arrive_ns, never).min(1, initial=never)
    return np.where(meetings.is_source, meetings.arrive_ns - first[:, None], 0)


def replay(
    meetings: Meetings, gap_cut_ns: np.ndarray | None = None, hold_cut_ns: np.ndarray | None = None
) -> np.ndarray:
    """int64 [..., R]: when each rank would have ended with parts of its time cut out.

    Args:
        gap_cut_ns: int64 [..., C + 1, R], at least 0; at most the gap is cut.
        hold_cut_ns: int64 [..., C, R], at least 0; at most the hold is cut.

    Leading axes are several replays at once, which costs little more than one.
    """
    gaps = _cut(gaps_of(meetings), gap_cut_ns)
    holds = _cut(holds_of(meetings), hold_cut_ns)
    beside = meetings.beside_ns
    if beside is None:
        beside = np.zeros(meetings.arrive_ns.shape, np.int64)
    shape = np.broadcast_shapes(gaps.shape[:-2], holds.shape[:-2])
    now = np.broadcast_to(meetings.start_ns, (*shape, len(meetings.start_ns)))
    for c in range(len(meetings)):
        arrive = now + gaps[..., c, :]
        sources = np.where(meetings.is_source[c], arrive, _NEVER)
        complete = sources.max(-1, keepdims=True)
        left = np.maximum(arrive, complete) + holds[..., c, :]
        left = np.maximum(left, arrive + beside[c])
        now = np.where(meetings.takes_part[c], left, now)
    return now + gaps[..., -1, :]


def _cut(spent_ns: np.ndarray, cut_ns: np.ndarray | None) -> np.ndarray:
    if cut_ns is None:
        return spent_ns
    return spent_ns - np.clip(cut_ns, 0, np.maximum(spent_ns, 0))
