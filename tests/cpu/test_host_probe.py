"""What the host does for a step: its fit, and the scheduler's part."""

import pytest

from tpinfer.costs.ops import StepAggregates
from tpinfer.costs.step_record import StepRecord
from tpinfer.engine.host_probe import around_ops_s, fit_host_time, planning_s
from tpinfer.scheduling.limits import SchedulerLimits

LIMITS = SchedulerLimits(16, 4000, 64, 512, 640)


def test_a_start_and_so_much_a_row_are_found_again() -> None:
    found = fit_host_time([(rows, 2e-4 + 5e-6 * rows) for rows in (1, 4, 16, 64)])
    assert found.step_s == pytest.approx(2e-4) and found.row_s == pytest.approx(5e-6)


def test_neither_is_below_zero() -> None:
    falling = fit_host_time([(1, 3e-4), (64, 1e-4)])
    assert falling.row_s == 0 and 1e-4 < falling.step_s < 3e-4
    steep = fit_host_time([(1, 1e-6), (64, 1e-3)])
    assert steep.step_s == 0 and steep.row_s > 0


def test_planning_takes_longer_for_more_rows() -> None:
    assert 0 < planning_s(LIMITS, 1) < planning_s(LIMITS, 64) < 0.1


def test_the_host_is_what_lies_around_the_ops() -> None:
    sums = StepAggregates(1, 1, 0, 1, 1, 1, 1, 1)
    records = [
        StepRecord(0, "decode", sums, 1000, 9000, 1000 + gap, [4000, 8000])
        for gap in (300, 500, 900)
    ]
    assert around_ops_s(records) == pytest.approx(1.5e-6)
