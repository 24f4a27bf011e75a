"""Two lines through times of collectives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpinfer.machine.curve_fit import fit_two_lines

SIZES = [512 * 4**i for i in range(9)]


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-6, 1e-4), st.floats(1e8, 1e10), st.floats(1.0, 50.0), st.floats(1.0, 20.0))
def test_true_lines_are_found(start: float, rate: float, later: float, faster: float) -> None:
    def truth(sent: float) -> float:
        return min(start + sent / rate, start * later + sent / (rate * faster))

    found = fit_two_lines(SIZES, [truth(size) for size in SIZES])
    assert found.error < 0.03
    # Between the sizes that were timed, too.
    for size in (700, 3000, 100_000, 5_000_000):
        assert found.seconds(size) == pytest.approx(truth(size), rel=0.35)
    assert found.seconds(0) > 0
    assert found.a_s <= found.c_s


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-7, 1.0), min_size=9, max_size=9))
def test_any_times_give_lines_that_rise(times: list[float]) -> None:
    found = fit_two_lines(SIZES, times)
    values = [found.seconds(size) for size in (0, *SIZES, 1 << 40)]
    assert all(value > 0 for value in values)
    assert values == sorted(values)


def test_two_points_are_enough_and_one_is_not() -> None:
    found = fit_two_lines([1000, 2000], [2e-6, 3e-6])
    assert found.seconds(1500) == pytest.approx(2.5e-6, rel=1e-3)
    with pytest.raises(ValueError, match="1 sizes with 1 times"):
        fit_two_lines([1000], [1e-6])
    with pytest.raises(ValueError, match="above 0"):
        fit_two_lines([1000, 2000], [0.0, 1e-6])
