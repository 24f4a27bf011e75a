"""The steady state that a workload leads to under an engine's limits: what a search ranks
placements by.

`planner.steady_state` says what so many running requests do; here is how many run, and by Little's
law (1961) what the others wait. It knows nothing of bursts and percentiles; `planner.simulate`
does.
"""

from dataclasses import dataclass, replace

from tpinfer.planner.split import Split
from tpinfer.planner.steady_state import Load, StepPrices, steady_state
from tpinfer.planner.workload import Workload
from tpinfer.scheduling.limits import SchedulerLimits

_CHORDS, _NEAR = 8, 0.02


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean times of a request."""

    ttft_split: Split
    tpot_split: Split
    output_tokens_per_s: float
    num_running: float
    short_of_kv: bool
    """Whether blocks, not rows, bound how many run."""
    keeps_up: bool = True
    """False where more requests come than are served: the wait then grows without end, and is left
    out."""

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.ttft_split.total

    @property
    def tpot_s(self) -> float:
        """Time per output token."""
        return self.tpot_split.total


class Estimator:
    """One engine's steady states."""

    def __init__(
        self,
        prices: StepPrices,
        limits: SchedulerLimits,
        workload: Workload,
        window: int | None,
        num_stages: int = 1,
    ) -> None:
        """`limits` and `workload` are those of one of the batches in a pipeline's stages."""
        self._prices = prices
        self._limits = limits
        self._workload = workload
        self._window = window
        self._num_stages = num_stages
        self._num_cached = workload.num_cached(limits.block_size)

    def estimate(self) -> Estimate:
        """The state that the workload leads to."""
        most = self._most_running()
        short = most < self._limits.max_num_seqs
        if self._workload.concurrency is not None:
            wanted = self._workload.concurrency
            found = self._at(min(wanted, most))
            if wanted <= found.num_running:
                return found
            return self._with_queue(found, wanted, short)
        return self._at_rate(most, short)

    def capacity_tokens_per_s(self) -> float:
        """Output tokens a second with as many running as can."""
        return self._at(self._most_running()).output_tokens_per_s

    def _most_running(self) -> float:
        """How many rows and blocks let run. A sequence grows from its prompt to its whole length;
        each keeps a block in reserve."""
        size, work = self._limits.block_size, self._workload
        own = work.input_len - self._num_cached
        mean = (own + work.output_len / 2) / size + 1
        num_blocks = self._limits.num_blocks - self._num_cached // size
        return max(1.0, min(self._limits.max_num_seqs, num_blocks / mean))

    def _at(self, running: float) -> Estimate:
        """With so many running, of whom some are still at their prompt."""
        work = self._workload
        is_loop = work.rate is None
        # Who comes by chance finds as many there as run on the average, and is one more.
        seen = running if is_loop else running + 1
        load = Load(
            work.input_len, work.output_len, seen, self._limits.max_num_batched_tokens,
            in_waves=is_loop, window=self._window, num_cached=self._num_cached,
            num_stages=self._num_stages,
        )  # fmt: skip
        found = steady_state(self._prices, load)
        first = found.ttft
        if not is_loop:  # one comes in the middle of a step, on average
            first += Split(queue=(found.tpot.total or found.ttft.total) / 2)
        rate = found.tokens_per_s * running / seen
        return Estimate(first, found.tpot, rate, running, False)

    def _with_queue(self, found: Estimate, wanted: float, short: bool) -> Estimate:
        """More are there than run: Little's law gives their wait."""
        work = self._workload
        life = wanted * work.output_len / found.output_tokens_per_s
        served = found.ttft_s + (work.output_len - 1) * found.tpot_s
        wait = Split(queue=max(0.0, life - served))
        return replace(found, ttft_split=found.ttft_split + wait, short_of_kv=short)

    def _at_rate(self, most: float, short: bool) -> Estimate:
        """As many running as serve what comes."""
        work = self._workload
        assert work.rate is not None, "a workload is one or the other"
        wanted = work.rate * work.output_len
        full = self._at(most)
        if full.output_tokens_per_s < wanted:
            return Estimate(
                full.ttft_split, full.tpot_split, full.output_tokens_per_s, most, short, False
            )
        found, running = full, most
        if full.output_tokens_per_s > wanted:
            running = self._running_at(wanted, most, full.output_tokens_per_s)
            found = self._at(running)
        return Estimate(found.ttft_split, found.tpot_split, wanted, running, False)

    def _running_at(self, wanted: float, most: float, full: float) -> float:
        """How many run where `wanted` tokens a second are drawn; `full` are with `most` running.
        Throughput grows with their number, ever more slowly: the chord's zero moves in from one
        side (regula falsi)."""
        low, below, high, above = 0.0, -wanted, most, full - wanted
        middle = high
        for _ in range(_CHORDS):
            middle = low - below * (high - low) / (above - below)
            excess = self._at(max(middle, 1e-3)).output_tokens_per_s - wanted
            if abs(excess) <= _NEAR * wanted:
                break
            if excess < 0:
                low, below, above = middle, excess, above / 2  # halved, or that end would stay
            else:
                high, above, below = middle, excess, below / 2
        return middle
