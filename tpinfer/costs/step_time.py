"""How long a step should take on one rank: every op at its floor, added up in closed form.

The floors are those of `costs.bound`, op by op; equal ops are priced once and counted. It is the
least time that the ceilings allow, not what the host adds.
"""

from collections import Counter
from dataclasses import dataclass

from tpinfer.config.ceilings import Ceilings
from tpinfer.costs.bound import arithmetic_rate
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import Formula, StepAggregates, aggregate

_PER_S = 1e9


@dataclass(slots=True)
class StepSums:
    """The sums of a step that is being put together, one sequence at a time. What single rows ask
    of sampling beyond their masses (candidates, log-probabilities) is left out: nothing is planned
    by it."""

    window: int | None = None
    tokens: int = 0
    rows: int = 0
    full_rows: int = 0
    sk: int = 0
    sqsk: int = 0
    sqsq: int = 0
    sk_window: int = 0
    pairs_window: int = 0

    def add(self, num_tokens: int, context: int, rows: int, full_rows: int) -> None:
        """Add a sequence with `num_tokens` query tokens, the last of `context`."""
        one = aggregate([num_tokens], [context], rows, full_rows, self.window)
        self.tokens += num_tokens
        self.rows += rows
        self.full_rows += full_rows
        self.sk += context
        self.sqsk += one.sqsk
        self.sqsq += one.sqsq
        self.sk_window += one.sk_window
        self.pairs_window += one.pairs_window

    def add_decodes(self, contexts: list[int], full_rows: int) -> None:
        """Add a sequence of one query token for each of `contexts`."""
        window, count, total = self.window, len(contexts), sum(contexts)
        seen = total if window is None else sum([min(c, window) for c in contexts])
        self.tokens += count
        self.rows += count
        self.full_rows += full_rows
        self.sk += total
        self.sqsk += total
        self.sqsq += count
        self.sk_window += seen
        self.pairs_window += seen

    def with_one(self, num_tokens: int, context: int, rows: int, full_rows: int) -> StepAggregates:
        """The sums with one sequence more, as `add` would leave them."""
        one = aggregate([num_tokens], [context], rows, full_rows, self.window)
        return StepAggregates(
            self.tokens + num_tokens,
            self.rows + rows,
            self.full_rows + full_rows,
            self.sk + context,
            self.sqsk + one.sqsk,
            self.sqsq + one.sqsq,
            self.sk_window + one.sk_window,
            self.pairs_window + one.pairs_window,
        )


class StepTime:
    """Predicted times of one rank; satisfies `scheduling.budget.StepCosts`."""

    def __init__(
        self, ledger: CostLedger, ceilings: Ceilings, block_size: int, host_bytes_per_s: float
    ) -> None:
        """`host_bytes_per_s` is the rate of copies between KV blocks and host memory."""
        self.window = ledger.spec.sliding_window
        self._ledger = ledger
        self._memory_level = ceilings.memory_level
        self._least_ns = ceilings.kernel_floor_s * _PER_S
        rate = arithmetic_rate(ledger.compute_dtype, ceilings)
        counted = Counter(
            (ledger.kind(op).is_collective, ledger.op_formula(op)) for op in ledger.op_ids()
        )
        # (ops, compute time, bytes moved), the time in ns.
        self._local = [
            (count, _scaled(one.flops, _PER_S / rate), one.bytes_read + one.bytes_written)
            for (is_collective, one), count in counted.items()
            if not is_collective
        ]
        # (collectives, bytes that each sends)
        self._collectives = [
            (count, one.bytes_sent)
            for (is_collective, one), count in counted.items()
            if is_collective and one.bytes_sent.coefficients
        ]
        self._latency_ns = ceilings.collective_latency_s * _PER_S
        self._sent_byte_ns = _PER_S / ceilings.collective_bytes_per_s
        # Ranks that share a KV head move their parts of the blocks at the same time.
        block_bytes = block_size * ledger.kv_bytes_per_token / ledger.partition.kv_group_size
        self._block_ns = block_bytes / host_bytes_per_s * _PER_S

    def step_ns(self, sums: StepAggregates) -> int:
        """Least time of a step: the sum of its ops' floors."""
        terms = sums.values()
        level = self._memory_level(self._ledger.step_working_set_bytes(sums))
        per_byte = _PER_S / level.bytes_per_s
        least = self._least_ns
        total = 0.0
        for count, form in self._collectives:
            sent = _value(form, terms)
            if sent:  # else it does not take place: `costs.collective`
                total += count * (self._latency_ns + sent * self._sent_byte_ns)
        for count, compute, moved in self._local:
            compute_ns = _value(compute, terms)
            memory_ns = _value(moved, terms) * per_byte
            total += count * max(compute_ns, memory_ns, least)
        return round(total)

    def recompute_ns(self, num_tokens: int) -> int:
        """Least time to compute the first `num_tokens` of a sequence in a step of their own."""
        return self.step_ns(aggregate([num_tokens], [num_tokens], 0, 0, self.window))

    def swap_ns(self, num_blocks: int) -> int:
        """Least time to move blocks to host memory and back."""
        return round(2 * num_blocks * self._block_ns)


def _scaled(form: Formula, factor: float) -> Formula:
    return Formula(tuple((index, factor * value) for index, value in form.coefficients))


def _value(form: Formula, terms: tuple[int, ...]) -> float:
    found = 0.0
    for index, factor in form.coefficients:
        found += factor * terms[index]
    return found
