"""A probe keeps to its time: what a figure of `topo probe` costs, by a clock that calls move."""

from collections.abc import Callable

import pytest
import torch

from tpinfer.collectives.group import SingleGroup
from tpinfer.machine import measure
from tpinfer.machine.measure import Trials

MS = 1_000_000


class Calls:
    """Each takes `ns` of a time of their own."""

    def __init__(self, ns: int) -> None:
        self.ns, self.count, self.now_ns = ns, 0, 0

    def __call__(self) -> None:
        self.count += 1
        self.now_ns += self.ns

    def clock(self, call: Callable[[], object]) -> int:
        """As `Clock`."""
        began = self.now_ns
        call()
        return self.now_ns - began


@pytest.mark.parametrize(
    ("call_ms", "budget_ms", "counted"),
    [(1, 10, 10), (20, 10, 3), (90, 10, 2), (150, 10, 1), (5000, 400, 1), (150, 400, 3)],
)
def test_long_calls_are_timed_once(
    call_ms: int, budget_ms: int, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(call_ms * MS)
    monkeypatch.setattr(measure, "perf_counter_ns", lambda: calls.now_ns)
    trials = Trials(SingleGroup(), torch.device("cpu"), calls.clock, budget_ms * MS)
    assert trials.seconds(calls) == pytest.approx(call_ms * 1e-3)
    assert calls.count == 1 + counted, "the first counts for nothing"


@pytest.mark.parametrize(("budget_ms", "longest_s"), [(1, 1.0), (200, 3.2), (2000, 6.0)])
def test_what_is_too_long_for_a_figure(budget_ms: int, longest_s: float) -> None:
    trials = Trials(SingleGroup(), torch.device("cpu"), Calls(1).clock, budget_ms * MS)
    assert trials.longest_s == pytest.approx(longest_s)
