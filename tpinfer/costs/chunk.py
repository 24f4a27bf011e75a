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
BEYOND_FIXED = 4
"""Tokens of a step over those that linears multiply for as long as the step takes however few
tokens it has: reading weights, starting ops and sums. At four times as many that is a fifth of the
step even where nothing of it overlaps; a longer step gains little more, and decodes beside it wait
for all of it."""
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


def fixed_tokens(ledger: CostLedger, ceilings: Ceilings) -> float:
    """Tokens that the linears multiply for as long as a step takes however few it has. Where ops
    and sums start in no time it is the ridge point of the roofline (Williams, Waterman and
    Patterson 2009), in tokens."""
    one, two = (_linears(ledger, tokens) for tokens in (1, 2))
    flops_per_token = two[0] - one[0]
    weight_bytes = 2 * one[1] - two[1]
    fixed_s = weight_bytes / ceilings.memory_level(ledger.weight_bytes).bytes_per_s
    kinds = [ledger.kind(op_id) for op_id in ledger.op_ids()]
    num_sums = sum(kind.is_collective for kind in kinds)
    fixed_s += ceilings.kernel_floor_s * (len(kinds) - num_sums)
    if ledger.partition.size > 1:
        fixed_s += ceilings.collective_latency_s * num_sums
    return fixed_s * arithmetic_rate(ledger.compute_dtype, ceilings) / flops_per_token


def _of_rank(
    ledger: CostLedger, ceilings: Ceilings, max_num_seqs: int, memory_share: float
) -> Chunk:
    fixed = fixed_tokens(ledger, ceilings)
    tokens = LEAST_TOKENS
    while tokens < MOST_TOKENS and tokens < BEYOND_FIXED * fixed:
        tokens *= 2
    level = ceilings.memory_level(ledger.weight_bytes)
    rate = arithmetic_rate(ledger.compute_dtype, ceilings)
    reason = (
        f"what a step costs however short it is (weights at {format_rate(level.bytes_per_s)} of "
        f"{level.name}, ops and sums at {ceilings.kernel_floor_s * 1e6:.1f} and "
        f"{ceilings.collective_latency_s * 1e6:.1f} us each) is as long as multiplying "
        f"{fixed:.0f} tokens at {rate / 1e9:.3g} GFLOPS; {BEYOND_FIXED} times as many, between "
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
