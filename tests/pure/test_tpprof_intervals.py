"""The columns of intervals against sets of moments."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tpprof import intervals

spans = st.lists(
    st.tuples(st.integers(-20, 60), st.integers(0, 30)).map(lambda p: (p[0], p[0] + p[1])),
    max_size=20,
)


def columns(rows: list[tuple[int, int]]) -> intervals.Columns:
    """Sorted by (start, -end)."""
    rows = sorted(rows, key=lambda row: (row[0], -row[1]))
    table = np.array(rows, np.int64).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy()


def moments(starts: np.ndarray, ends: np.ndarray) -> set[int]:
    """Integer moments that are held."""
    pairs = zip(starts.tolist(), ends.tolist(), strict=True)
    return {moment for start, end in pairs for moment in range(start, end)}


EVERY = np.arange(-30, 100)


@given(spans)
def test_merge_holds_the_same_moments_and_leaves_gaps(rows):
    starts, ends = intervals.merge(*columns(rows))
    assert moments(starts, ends) == moments(*columns(rows))
    assert (starts[1:] > ends[:-1]).all()
    assert (ends > starts).all()


@given(spans, st.integers(-30, 90), st.integers(0, 40))
def test_clip_keeps_what_lies_inside(rows, low, width):
    starts, ends = columns(rows)
    inside_starts, inside_ends = intervals.clip(starts, ends, low, low + width)
    assert len(inside_starts) == len(rows)
    assert moments(inside_starts, inside_ends) == moments(starts, ends) & set(
        range(low, low + width)
    )
    assert (inside_ends >= inside_starts).all()


@given(spans, spans)
def test_intersect_and_subtract_are_those_of_sets(rows, others):
    one, other = intervals.merge(*columns(rows)), intervals.merge(*columns(others))
    assert moments(*intervals.intersect(one, other)) == moments(*one) & moments(*other)
    assert moments(*intervals.subtract(one, other)) == moments(*one) - moments(*other)


@given(spans)
def test_first_come_gives_each_moment_to_the_earliest_row(rows):
    starts, ends = columns(rows)
    owned = intervals.first_come(starts, ends)
    for moment in EVERY.tolist():
        holders = np.flatnonzero((starts <= moment) & (moment < ends))
        owners = np.flatnonzero((owned[0] <= moment) & (moment < owned[1]))
        assert owners.tolist() == holders[:1].tolist()
    assert (owned[0] >= starts).all()
    assert (owned[0] <= owned[1]).all()


@given(spans)
def test_locate_and_covered_before_agree_with_moments(rows):
    starts, ends = intervals.merge(*columns(rows))
    held = moments(starts, ends)
    where = intervals.locate(starts, ends, EVERY)
    assert [int(moment) in held for moment in EVERY] == (where >= 0).tolist()
    before = intervals.covered_before(starts, ends, EVERY)
    assert before.tolist() == [sum(m < moment for m in held) for moment in EVERY.tolist()]


@given(spans)
def test_count_active_counts_holders(rows):
    starts, ends = columns(rows)
    counted = intervals.count_active(starts, ends, EVERY)
    expected = [int(((starts <= m) & (m < ends)).sum()) for m in EVERY.tolist()]
    assert counted.tolist() == expected


@given(spans, st.lists(st.integers(-25, 95), max_size=15))
def test_cut_keeps_the_moments_and_cuts_at_every_inner_point(rows, points):
    starts, ends = intervals.merge(*columns(rows))
    begin, stop, row = intervals.cut(starts, ends, np.array(points, np.int64))
    assert moments(begin, stop) == moments(starts, ends)
    assert (begin[1:] >= stop[:-1]).all()
    assert ((begin >= starts[row]) & (stop <= ends[row])).all()
    for point in points:
        assert not ((begin < point) & (point < stop)).any()


@given(spans)
def test_innermost_is_the_holder_that_started_last(rows):
    starts, ends = columns(rows)
    found = intervals.innermost(starts, ends, EVERY)
    for moment, row in zip(EVERY.tolist(), found.tolist(), strict=True):
        holders = np.flatnonzero((starts <= moment) & (moment < ends)).tolist()
        assert row == (holders[-1] if holders else -1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(0, 20), st.integers(0, 20))
def test_longest_between_finds_a_largest_row(lengths, first, stop):
    first, stop = min(first, len(lengths)), min(stop, len(lengths))
    values = np.array(lengths, np.int64)
    found = intervals.longest_between(values, np.array([first]), np.array([stop]))
    if first >= stop:
        assert found[0] == -1
    else:
        assert first <= found[0] < stop
        assert values[found[0]] == values[first:stop].max()
