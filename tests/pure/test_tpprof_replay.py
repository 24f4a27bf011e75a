"""Replaying ranks along their meetings: nothing cut gives the recording back, cutting never hurts,
and a known delay comes out as what it cost."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tpprof.report.replay import (
    Meetings,
    gaps_of,
    holds_of,
    lateness_of,
    left_before,
    replay,
    spread_of,
)


@st.composite
def recordings(draw: st.DrawFn) -> Meetings:
    """Any recording at all: ranks out of some meetings, senders, clocks a little off."""
    num_ranks, count = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    seed = draw(st.integers(0, 2**32 - 1))
    numbers = np.random.default_rng(seed)
    shape = count, num_ranks
    part = numbers.random(shape) < 0.8
    source = part & (numbers.random(shape) < 0.9)
    arrive = np.cumsum(numbers.integers(0, 1000, shape), axis=0)
    leave = arrive + numbers.integers(-5, 400, shape)
    end = 6000 + numbers.integers(0, 1000, num_ranks)
    beside = np.minimum(numbers.integers(0, 300, shape), np.maximum(leave - arrive, 0))
    start = numbers.integers(0, 50, num_ranks)
    return Meetings(start, end, arrive, leave, part, source, np.where(leave > arrive, beside, 0))


def run(gaps: np.ndarray, holds: np.ndarray) -> Meetings:
    """What ranks with these gaps [C + 1, R] and holds [C, R] would record at barriers."""
    now = np.zeros(gaps.shape[1], np.int64)
    arrivals, leaves = [], []
    for gap, hold in zip(gaps, holds, strict=False):
        arrivals.append(now + gap)
        now = np.full_like(now, arrivals[-1].max()) + hold
        leaves.append(now)
    everybody = np.ones(holds.shape, bool)
    return Meetings(
        np.zeros_like(now),
        now + gaps[-1],
        np.array(arrivals),
        np.array(leaves),
        everybody,
        everybody,
    )


@given(recordings())
def test_nothing_cut_gives_the_recording_back(recorded: Meetings) -> None:
    assert (replay(recorded) == recorded.end_ns).all()
    none = np.zeros((len(recorded) + 1, len(recorded.start_ns)), np.int64)
    assert (replay(recorded, none, none[:-1]) == recorded.end_ns).all()


@given(recordings(), st.integers(0, 2**32 - 1))
def test_cutting_more_never_takes_longer(recorded: Meetings, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    shape = len(recorded) + 1, len(recorded.start_ns)
    little, hold = numbers.integers(0, 300, shape), numbers.integers(0, 100, shape)[:-1]
    more = little + numbers.integers(0, 300, shape)
    some, much = replay(recorded, little, hold), replay(recorded, more, 2 * hold)
    together = replay(recorded, np.stack([little, more]), np.stack([hold, 2 * hold]))
    assert (together == np.stack([some, much])).all()
    assert (some <= recorded.end_ns).all()
    assert (much <= some).all()


def test_a_delayed_rank_costs_what_the_replay_says() -> None:
    """50 us before each of 20 barriers on rank 1: removing its lateness gives the run without."""
    numbers = np.random.default_rng(7)
    gaps = np.repeat(numbers.integers(90_000, 110_000, (21, 1)), 3, axis=1)
    holds = np.full((20, 3), 7_000)
    delayed = gaps.copy()
    delayed[:-1, 1] += 50_000
    recorded = run(delayed, holds)
    late = np.vstack([lateness_of(recorded), np.zeros((1, 3), np.int64)])
    assert (late[:-1, 1] == 50_000).all()
    assert (late[:, [0, 2]] == 0).all()
    assert (replay(recorded, late) == run(gaps, holds).end_ns).all()


def test_the_spread_reaches_the_first_arrival_and_holds_are_transfer() -> None:
    gaps = np.array([[100, 300, 200], [10, 10, 10]])
    recorded = run(gaps, np.array([[5, 5, 9]]))
    assert spread_of(recorded).tolist() == [[0, 200, 100]]
    assert lateness_of(recorded).tolist() == [[0, 100, 0]]
    assert holds_of(recorded).tolist() == [[5, 5, 9]]
    assert gaps_of(recorded).tolist() == gaps.tolist()
    everything = np.vstack([spread_of(recorded), np.zeros((1, 3), np.int64)])
    assert replay(recorded, everything, holds_of(recorded)).tolist() == [110, 110, 110]


def test_a_sender_is_not_held_up_by_those_who_listen() -> None:
    """Rank 0 sends at 50; rank 1 listens from 20 to 60. Without rank 0's work it hears at 30."""
    part, source = np.array([[True, True]]), np.array([[True, False]])
    recorded = Meetings(
        np.zeros(2, np.int64), np.array([55, 100]), np.array([[50, 20]]), np.array([[50, 60]]),
        part, source,
    )  # fmt: skip
    assert replay(recorded).tolist() == [55, 100]
    cut = np.array([[30, 0], [0, 0]])
    assert replay(recorded, cut).tolist() == [25, 70]
    assert left_before(recorded).tolist() == [[0, 0], [50, 60]]
    assert lateness_of(recorded).tolist() == [[0, 0]]


def test_work_beside_a_meeting_is_done_whatever_the_others_do() -> None:
    """Both arrive at 10 and 60 and leave at 70; rank 0 computes 40 meanwhile, so without waiting it
    leaves at 50."""
    everybody = np.array([[True, True]])
    recorded = Meetings(
        np.zeros(2, np.int64), np.array([70, 70]), np.array([[10, 60]]), np.array([[70, 70]]),
        everybody, everybody, np.array([[40, 0]]),
    )  # fmt: skip
    assert replay(recorded).tolist() == [70, 70]
    assert replay(recorded, np.array([[0, 50], [0, 0]])).tolist() == [50, 20]


def test_a_rank_outside_a_meeting_waits_for_nobody() -> None:
    part = np.array([[True, True, False]])
    recorded = Meetings(
        np.zeros(3, np.int64), np.array([90, 90, 40]), np.array([[10, 70, 0]]),
        np.array([[80, 80, 0]]), part, part,
    )  # fmt: skip
    assert gaps_of(recorded).tolist() == [[10, 70, 0], [10, 10, 40]]
    cut = np.array([[0, 60, 0], [0, 0, 0]])
    assert replay(recorded, cut).tolist() == [30, 30, 40]
