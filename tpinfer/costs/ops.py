"""What an op of the program is and what it costs, as formulas over the sums that describe a step.

A formula is linear in a few aggregates, so the same formula prices one op, a whole layer kind or
a whole step, and a manifest can carry it to a profiler that knows only the aggregates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum


class OpKind(StrEnum):
    """Kinds of op, by how they are priced."""

    EMBED = "embed"
    REDUCE = "reduce"
    NORM = "norm"
    LINEAR = "linear"
    ROPE = "rope"
    ATTENTION = "attention"
    ACTIVATION = "activation"
    GATHER = "gather"
    EXCHANGE = "exchange"
    SAMPLE = "sample"

    @property
    def is_collective(self) -> bool:
        """Whether ranks wait for each other in it."""
        return self in (OpKind.REDUCE, OpKind.GATHER, OpKind.EXCHANGE)


@dataclass(frozen=True, slots=True)
class StepAggregates:
    """The sums over a step's sequences that its costs depend on."""

    tokens: int
    """Query tokens (sum of sq)."""
    rows: int
    """Tokens whose logits are needed."""
    full_rows: int
    """Of those, rows that draw from the mass of the whole vocabulary (0 when all are greedy)."""
    sk: int
    """Context tokens, this step's included, summed over sequences."""
    sqsk: int
    """Query tokens times context tokens, summed."""
    sqsq: int
    """Query tokens squared, summed: the causal half is taken off by it."""
    sk_window: int
    """Context tokens that a sliding layer reads, summed."""
    pairs_window: int
    """(query, key) pairs that a sliding layer attends to, summed exactly."""
    candidates: int = 0
    """Sorted keys that a rank sends for its logit rows beyond the first of each: candidates of
    top-k and top-p, likeliest tokens of rows that report log-probabilities."""
    logprob_rows: int = 0
    """Rows that report log-probabilities."""
    prompt_rows: int = 0
    """Prompt tokens whose log-probabilities are wanted."""
    prompt_passes: int = 0
    """Times that the head runs for them."""
    prompt_candidates: int = 0
    """Sorted keys that a rank sends for them."""

    def values(self) -> tuple[int, ...]:
        """1 and then the aggregates in the order of TERMS."""
        return (
            1, self.tokens, self.rows, self.full_rows, self.sk, self.sqsk, self.sqsq,
            self.sk_window, self.pairs_window, self.candidates, self.logprob_rows,
            self.prompt_rows, self.prompt_passes, self.prompt_candidates,
        )  # fmt: skip

    def named(self) -> dict[str, int]:
        """By name, in the order of TERMS."""
        return dict(zip(TERMS[1:], self.values()[1:], strict=True))


TERMS = ("one", *(field.name for field in fields(StepAggregates)))
"""What a formula's coefficients multiply."""


def aggregate(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    num_logit_rows: int,
    num_full_rows: int = 0,
    window: int | None = None,
    num_candidates: int = 0,
    num_logprob_rows: int = 0,
    prompt_targets: Sequence[tuple[int, int]] = (),
) -> StepAggregates:
    """Aggregates of a step; context_lens[i] counts sequence i's query tokens too.

    Without a window the sliding sums equal the full ones. prompt_targets: per sequence that wants
    log-probabilities of its prompt, (tokens, likeliest tokens reported at each).
    """
    sk_window = pairs_window = 0
    for sq, sk in zip(query_lens, context_lens, strict=True):
        reach = sk if window is None else min(sk, sq + window - 1)
        sk_window += reach
        pairs_window += _causal_pairs(sq, sk, window)
    prompt_keys = prompt_keys_by_pass(prompt_targets)
    pairs = list(zip(query_lens, context_lens, strict=True))
    return StepAggregates(
        tokens=sum(query_lens),
        rows=num_logit_rows,
        full_rows=num_full_rows,
        sk=sum(context_lens),
        sqsk=sum(sq * sk for sq, sk in pairs),
        sqsq=sum(sq * sq for sq in query_lens),
        sk_window=sk_window,
        pairs_window=pairs_window,
        candidates=num_candidates,
        logprob_rows=num_logprob_rows,
        prompt_rows=sum(count for count, _ in prompt_targets),
        prompt_passes=len(prompt_keys),
        prompt_candidates=sum(prompt_keys),
    )


PROMPT_ROWS_A_PASS = 64
"""Prompt tokens whose logits are made together, so that memory does not grow with the prompt."""


def prompt_keys_by_pass(prompt_targets: Sequence[tuple[int, int]]) -> list[int]:
    """Sorted keys sent in each pass of the head over prompt tokens: as many for each as the one
    that reports most, at least its largest logit, and the token's own."""
    wanted = [num_top for count, num_top in prompt_targets for _ in range(count)]
    passes = [wanted[i : i + PROMPT_ROWS_A_PASS] for i in range(0, len(wanted), PROMPT_ROWS_A_PASS)]
    return [len(rows) * (max(1, *rows) + 1) for rows in passes]


def _causal_pairs(sq: int, sk: int, window: int | None) -> int:
    """Pairs attended by the last sq of sk tokens: query at position p sees min(p + 1, window)
    keys."""
    first = sk - sq
    if window is None or sk <= window:
        return sq * first + sq * (sq + 1) // 2
    short = max(0, min(sq, window - first))  # queries that still see everything before them
    return short * first + short * (short + 1) // 2 + (sq - short) * window


@dataclass(frozen=True, slots=True)
class Formula:
    """A linear form over TERMS."""

    coefficients: tuple[tuple[int, float], ...] = ()
    """(index into TERMS, factor), each index once."""

    def value(self, terms: Sequence[int]) -> int:
        """The form at `StepAggregates.values()`, rounded to a whole number."""
        found: float = 0
        for index, factor in self.coefficients:  # a plain loop: half the time of sum()
            found += factor * terms[index]
        return round(found)

    def __add__(self, other: "Formula") -> "Formula":
        merged = dict(self.coefficients)
        for index, factor in other.coefficients:
            merged[index] = merged.get(index, 0) + factor
        return Formula(tuple(sorted(merged.items())))

    def times(self, count: int) -> "Formula":
        """`count` ops of this cost."""
        return Formula(tuple((index, factor * count) for index, factor in self.coefficients))

    def to_json(self) -> dict[str, float]:
        """Factor by term name."""
        return {TERMS[index]: factor for index, factor in self.coefficients}


def formula(**factors: float) -> Formula:
    """A formula by term names: `formula(one=8, tokens=2)` is 8 + 2 * tokens."""
    found = ((TERMS.index(name), factor) for name, factor in factors.items() if factor)
    return Formula(tuple(sorted(found)))


@dataclass(frozen=True, slots=True)
class OpCost:
    """What one op does in one step."""

    flops: int
    bytes_read: int
    bytes_written: int
    bytes_sent: int
    """Bytes this rank must send to others, at least."""

    @property
    def bytes_moved(self) -> int:
        """Memory traffic."""
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True, slots=True)
class OpFormula:
    """The four formulas of an op."""

    flops: Formula = Formula()
    bytes_read: Formula = Formula()
    bytes_written: Formula = Formula()
    bytes_sent: Formula = Formula()

    def cost(self, aggregates: StepAggregates) -> OpCost:
        """The op's cost in a step."""
        return self.cost_at(aggregates.values())

    def cost_at(self, terms: Sequence[int]) -> OpCost:
        """The op's cost at `StepAggregates.values()`, for those who price many ops of a step."""
        return OpCost(
            self.flops.value(terms),
            self.bytes_read.value(terms),
            self.bytes_written.value(terms),
            self.bytes_sent.value(terms),
        )

    def __add__(self, other: "OpFormula") -> "OpFormula":
        return OpFormula(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.bytes_sent + other.bytes_sent,
        )

    def times(self, count: int) -> "OpFormula":
        """`count` ops of this cost."""
        return OpFormula(
            self.flops.times(count),
            self.bytes_read.times(count),
            self.bytes_written.times(count),
            self.bytes_sent.times(count),
        )
