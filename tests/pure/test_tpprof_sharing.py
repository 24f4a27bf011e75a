"""Parts of a cost: they sum to it, none is negative, and who took longer gets no less."""

from itertools import pairwise
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tpprof.classify.sharing import share_out

_UNITS = st.lists(
    st.tuples(
        st.integers(0, 1 << 62),
        st.lists(st.integers(0, 10**17), min_size=1, max_size=6),
    ),
    max_size=6,
)


def shared(units: list[tuple[int, list[int]]], order: list[int] | None = None) -> list[list[int]]:
    """Parts by unit; entries are handed over in `order`."""
    rows = [(i, total, length) for i, (total, lengths) in enumerate(units) for length in lengths]
    order = list(range(len(rows))) if order is None else order
    columns = np.array([rows[i] for i in order], np.int64).reshape(-1, 3)
    parts = np.empty(len(rows), np.int64)
    parts[order] = share_out(columns[:, 1], -7 * columns[:, 0], columns[:, 2])
    edges = np.cumsum([len(lengths) for _, lengths in units])[:-1]
    return [one.tolist() for one in np.split(parts, edges)] if units else []


@given(_UNITS)
def test_parts_sum_exactly_and_follow_the_lengths(units: list[tuple[int, list[int]]]) -> None:
    for (total, lengths), parts in zip(units, shared(units), strict=True):
        assert sum(parts) == total
        assert min(parts) >= 0
        if total < 1 << 50 and sum(lengths):
            exact = [total * length / sum(lengths) for length in lengths]
            rounding = 1 + total / 2**45
            assert all(abs(a - b) <= rounding for a, b in zip(parts, exact, strict=True))


@given(st.integers(0, 1 << 40), st.lists(st.integers(0, 10**9), min_size=2, max_size=8))
def test_who_took_longer_gets_no_less(total: int, lengths: list[int]) -> None:
    """Up to the one that cumulative rounding may move."""
    [parts] = shared([(total, lengths)])
    ordered = sorted(zip(lengths, parts, strict=True))
    for (_, less), (_, more) in pairwise(ordered):
        assert more >= less - 1


@given(_UNITS, st.randoms())
def test_units_may_be_mixed(units: list[tuple[int, list[int]]], random: Random) -> None:
    """Only the order within a unit counts: it says who gets the rounding."""
    count = sum(len(lengths) for _, lengths in units)
    slots = [i for i, (_, lengths) in enumerate(units) for _ in lengths]
    random.shuffle(slots)
    starts = np.cumsum([0, *(len(lengths) for _, lengths in units)])
    taken = [0] * len(units)
    order = []
    for slot in slots:
        order.append(int(starts[slot]) + taken[slot])
        taken[slot] += 1
    assert sorted(order) == list(range(count))
    mixed = shared(units, order)
    assert [sum(parts) for parts in mixed] == [total for total, _ in units]
    if all(total < 1 << 40 for total, _ in units):
        pairs = zip(shared(units), mixed, strict=True)
        assert all(abs(a - b) <= 1 for one, two in pairs for a, b in zip(one, two, strict=True))


def test_by_hand() -> None:
    assert shared([(10, [1, 3]), (7, [5]), (9, [0, 0, 0]), (0, [4, 4])]) == [
        [2, 8], [7], [3, 3, 3], [0, 0],
    ]  # fmt: skip
    assert shared([]) == []
    assert shared([((1 << 62) - 1, [1, 1])])[0] in (
        [1 << 61, (1 << 61) - 1],
        [(1 << 61) - 1, 1 << 61],
    )
