"""The steady state of an engine in closed form: what a search ranks placements by.

n requests run, spread evenly over their lives. A step takes the n decodes and, to keep their
number, the prompt tokens of those that end: n * I / O of them, in whole chunks. Little's law gives
what waits. It knows nothing of bursts and percentiles; `planner.simulate` does.
"""

from dataclasses import dataclass

from tpinfer.costs.ops import StepAggregates
from tpinfer.costs.step_time import StepSums
from tpinfer.planner.simulate import StepPrices
from tpinfer.planner.step_model import Split
from tpinfer.planner.workload import Workload
from tpinfer.scheduling.limits import SchedulerLimits

_CHORDS, _NEAR = 8, 0.02
_ROUNDS = 2


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
        self, prices: StepPrices, limits: SchedulerLimits, workload: Workload, window: int | None
    ) -> None:
        self._prices = prices
        self._limits = limits
        self._workload = workload
        self._window = window

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
        mean = (work.input_len + work.output_len / 2) / size + 1
        return max(1.0, min(self._limits.max_num_seqs, self._limits.num_blocks / mean))

    def _at(self, running: float) -> Estimate:
        """With so many running, of whom some are still at their prompt."""
        work = self._workload
        decodes, found = running, self._with_decodes(running, running)
        for _ in range(_ROUNDS):
            later = (work.output_len - 1) * found.tpot_s
            decodes = running * later / (later + found.ttft_s) if later else 0.0
            found = self._with_decodes(running, decodes)
        return found

    def _with_decodes(self, running: float, decodes: float) -> Estimate:
        work, most = self._workload, self._limits.max_num_batched_tokens
        # Decodes and the prompts that replace them share the tokens of a step.
        most_decodes = most * work.output_len / work.num_tokens
        is_crowded = decodes > most_decodes
        decodes = min(decodes, most_decodes)
        room = max(1.0, most - decodes)
        # In a closed loop those whose prompts shared a step end together, and come together again.
        together = running if work.concurrency is not None else 1
        chunk = min(work.input_len * together, room)
        prompt = max(decodes, 1.0) * work.input_len / work.output_len
        share = min(1.0, prompt / chunk)
        mixed = self._step(decodes, max(chunk, min(prompt, room)))
        plain = self._step(decodes, 0) if share < 1.0 else mixed
        per_step = plain * (1 - share) + mixed * share
        first = mixed * -(-work.input_len // int(room))
        if work.rate is not None:  # one comes in the middle of a step, on average
            first += Split(queue=per_step.total / 2)
        served = first.total + (work.output_len - 1) * per_step.total
        rate = running * work.output_len / served
        if is_crowded:  # prompts wait for tokens of a step
            rate = min(rate, decodes / per_step.total)
            first += Split(queue=max(0.0, running * work.output_len / rate - served))
        return Estimate(first, per_step, rate, running, False)

    def _step(self, decodes: float, chunk: float) -> Split:
        work = self._workload
        sums = StepSums(self._window)
        count, context = round(decodes), work.input_len + (work.output_len + 1) // 2
        if not chunk:
            count = max(1, count)
        sums.add_decodes([context] * count, 0)
        if chunk:
            whole, rest = divmod(round(chunk), work.input_len)
            for tokens in [work.input_len] * whole + [rest] * bool(rest):
                seen = tokens if tokens == work.input_len else (work.input_len + tokens) // 2
                sums.add(tokens, seen, 1, 0)
        return self._prices.step(_aggregates(sums))

    def _with_queue(self, found: Estimate, wanted: float, short: bool) -> Estimate:
        """More are there than run: Little's law gives their wait."""
        work = self._workload
        life = wanted * work.output_len / found.output_tokens_per_s
        served = found.ttft_s + (work.output_len - 1) * found.tpot_s
        wait = Split(queue=max(0.0, life - served))
        return Estimate(
            found.ttft_split + wait, found.tpot_split, found.output_tokens_per_s,
            found.num_running, short,
        )  # fmt: skip

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
            found = self._at(max(1.0, running))
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


def _aggregates(sums: StepSums) -> StepAggregates:
    return StepAggregates(
        sums.tokens, sums.rows, sums.full_rows, sums.sk, sums.sqsk, sums.sqsq, sums.sk_window,
        sums.pairs_window,
    )  # fmt: skip
