"""How many prompt tokens a step may still take: by count, and by predicted time.

Running decodes are never held back. Prompts fill what they leave; but the first prompt of a step
gets a block of tokens whatever the time, so that a budget too small for anything still lets
prompts end.
"""

from typing import Protocol

from tpinfer.costs.ops import StepAggregates
from tpinfer.costs.step_time import StepSums
from tpinfer.scheduling.limits import SchedulerLimits
from tpinfer.scheduling.request import Sequence
from tpinfer.steps.sampling_record import sums_masses


class StepCosts(Protocol):
    """What the scheduler asks about time. `costs.step_time.StepTime` answers it."""

    @property
    def window(self) -> int | None:
        """Sliding window of the layers that slide."""
        ...

    def step_ns(self, sums: StepAggregates) -> int:
        """Predicted time of a step; does not fall when the step gets more tokens."""
        ...

    def recompute_ns(self, num_tokens: int) -> int:
        """Predicted time to compute the first tokens of a sequence again."""
        ...

    def swap_ns(self, num_blocks: int) -> int:
        """Predicted time to move blocks to host memory and back."""
        ...


class StepBudget:
    """What is left of one step."""

    def __init__(self, limits: SchedulerLimits, costs: StepCosts | None) -> None:
        self.num_tokens = limits.max_num_batched_tokens
        """Query tokens that are left."""
        self._block_size = limits.block_size
        self._most_ns = limits.step_budget_ns
        self._costs = costs if self._most_ns is not None else None
        self._sums = StepSums(costs.window) if self._costs is not None and costs else None
        self._has_prompt = False

    def reserve_decodes(self, running: list[Sequence]) -> None:
        """Count in the time of the sequences that decode in this step."""
        if self._sums is not None:
            decodes = [s for s in running if s.num_left == 1 and s.num_planned < s.max_context]
            num_full = sum(sums_masses(s.sampling) for s in decodes)
            self._sums.add_decodes([s.num_known for s in decodes], num_full)

    def chunk(self, sequence: Sequence, start: int, most: int) -> int:
        """How many of `most` tokens from `start` on a prompt may compute in this step."""
        most = min(most, self.num_tokens)
        if self._costs is None or self._fits(sequence, start, most):
            return most
        size = self._block_size
        low, high = 0, -(-most // size)  # blocks that fit, blocks that do not
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(sequence, start, middle * size):
                low = middle
            else:
                high = middle
        if not low and not self._has_prompt:
            low = 1
        return min(low * size, most)

    def take(self, sequence: Sequence, start: int, count: int) -> None:
        """Count in a prompt's chunk."""
        self.num_tokens -= count
        self._has_prompt = True
        if self._sums is not None:
            self._sums.add(count, start + count, *_rows(sequence, start + count))

    def _fits(self, sequence: Sequence, start: int, count: int) -> bool:
        assert self._costs is not None and self._sums is not None and self._most_ns is not None
        stop = start + count
        sums = self._sums.with_one(count, stop, *_rows(sequence, stop))
        return self._costs.step_ns(sums) <= self._most_ns


def _rows(sequence: Sequence, stop: int) -> tuple[int, int]:
    """Logit rows of a chunk that ends at `stop`, and how many of them need whole logits."""
    rows = int(stop == sequence.num_known)
    return rows, rows if sums_masses(sequence.sampling) else 0
