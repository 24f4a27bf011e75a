"""How many tokens a step takes where the user names no number. Pure: the runtime and the planner
both ask it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tpinfer.config.ceilings import Ceilings
from tpinfer.config.engine import DEFAULT_BATCHED_TOKENS
from tpinfer.config.units import format_rate, format_size
from tpinfer.costs.bound import arithmetic_rate
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import OpKind, aggregate

LEAST_TOKENS, MOST_TOKENS = 256, 8192
BEYOND_RIDGE = 4
"""Tokens of a step over those at which linears read their weights as long as they multiply. At
four times as many, reading is a fifth of the step even where nothing of it overlaps; a longer
step gains little more, and decodes beside it wait for all of it."""
MOST_OF_MEMORY = 0.1
"""Share of what weights leave that the activations of a step may take from the cache."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Most tokens of a step, and the numbers behind it."""

    tokens: int
    reason: str


def choose_chunk(
    ledgers: Sequence[CostLedger],
    ceilings: Sequence[Ceilings | None],
    max_num_seqs: int,
    memory_share: float,
) -> Chunk:
    """The chunk that suits every rank of a group, so that all choose the same; each rank's ledger
    and ceilings in rank order. `memory_share` is the part of its memory that a rank may use."""
    known = [(one, two) for one, two in zip(ledgers, ceilings, strict=True) if two is not None]
    if not known or len(known) < len(ledgers):
        return Chunk(DEFAULT_BATCHED_TOKENS, "the default; no topology says what devices reach")
    found = (_of_rank(*pair, max_num_seqs, memory_share) for pair in known)
    return min(found, key=lambda chunk: chunk.tokens)


def ridge_tokens(ledger: CostLedger, ceilings: Ceilings) -> float:
    """Tokens at which a layer's linears take as long to multiply as to read their weights: the
    ridge point of the roofline (Williams, Waterman and Patterson 2009), in tokens."""
    one, two = (_linears(ledger, tokens) for tokens in (1, 2))
    flops_per_token = two[0] - one[0]
    weight_bytes = 2 * one[1] - two[1]
    read_s = weight_bytes / ceilings.memory_level(ledger.weight_bytes).bytes_per_s
    return read_s * arithmetic_rate(ledger.compute_dtype, ceilings) / flops_per_token


def _of_rank(
    ledger: CostLedger, ceilings: Ceilings, max_num_seqs: int, memory_share: float
) -> Chunk:
    ridge = ridge_tokens(ledger, ceilings)
    tokens = LEAST_TOKENS
    while tokens < MOST_TOKENS and tokens < BEYOND_RIDGE * ridge:
        tokens *= 2
    level = ceilings.memory_level(ledger.weight_bytes)
    rate = arithmetic_rate(ledger.compute_dtype, ceilings)
    reason = (
        f"linears are bound by arithmetic from {ridge:.0f} tokens on ({rate / 1e9:.3g} GFLOPS, "
        f"{level.name} {format_rate(level.bytes_per_s)}); {BEYOND_RIDGE} times as many, between "
        f"{LEAST_TOKENS} and {MOST_TOKENS}"
    )
    capacity = ceilings.memory[-1].capacity_bytes * memory_share
    room = MOST_OF_MEMORY * (capacity - ledger.weight_bytes)
    wanted = tokens
    while tokens > LEAST_TOKENS and ledger.activation_bytes(tokens, max_num_seqs) > room:
        tokens //= 2
    if tokens < wanted:
        held = format_size(ledger.activation_bytes(wanted, max_num_seqs))
        reason += f"; less, since activations of {wanted} would take {held}"
    return Chunk(tokens, reason)


def _linears(ledger: CostLedger, tokens: int) -> tuple[int, int]:
    """(FLOPs, bytes read) of all layers' linears in a step of so many tokens of one prompt."""
    sums = aggregate([tokens], [tokens], 0, 0, ledger.spec.window(0))
    costs = [
        ledger.cost(op_id, sums)
        for op_id in ledger.op_ids()
        if op_id.startswith("layers.") and ledger.kind(op_id) is OpKind.LINEAR
    ]
    return sum(cost.flops for cost in costs), sum(cost.bytes_read for cost in costs)
