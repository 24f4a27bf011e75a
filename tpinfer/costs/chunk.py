"""How many tokens a step takes where the user names no number. Pure: the runtime and the planner
both ask it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tpinfer.config.ceilings import Ceilings
from tpinfer.config.dtypes import DType
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


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """How weights of the layers' linears are stored and multiplied."""

    weight_bytes: float
    """Of one weight, its part of a scale included."""
    product: DType


def choose_chunk(
    ledgers: Sequence[CostLedger],
    ceilings: Sequence[Ceilings | None],
    max_num_seqs: int,
    memory_share: float,
    linears: LinearFormat | None = None,
) -> Chunk:
    """The chunk that suits every rank of a group, so that all choose the same; each rank's ledger
    and ceilings in rank order. `memory_share` is the part of its memory that a rank may use;
    `linears` are by default in the compute dtype."""
    known = [(one, two) for one, two in zip(ledgers, ceilings, strict=True) if two is not None]
    if not known or len(known) < len(ledgers):
        return Chunk(DEFAULT_BATCHED_TOKENS, "the default; no topology says what devices reach")
    found = (_of_rank(*pair, max_num_seqs, memory_share, linears) for pair in known)
    return min(found, key=lambda chunk: chunk.tokens)


def fixed_tokens(
    ledger: CostLedger, ceilings: Ceilings, linears: LinearFormat | None = None
) -> float:
    """Tokens that the linears multiply for as long as a step takes however few it has. Where ops
    and sums start in no time it is the ridge point of the roofline (Williams, Waterman and
    Patterson 2009), in tokens."""
    flops_per_token, weight_bytes = _linears(ledger)
    held = _held_bytes(ledger, linears)
    read = weight_bytes - (ledger.weight_bytes - held)
    fixed_s = read / ceilings.memory_level(held).bytes_per_s
    kinds = [ledger.kind(op_id) for op_id in ledger.op_ids()]
    num_sums = sum(kind.is_collective for kind in kinds)
    fixed_s += ceilings.kernel_floor_s * (len(kinds) - num_sums)
    if ledger.partition.size > 1:
        fixed_s += ceilings.collective_latency_s * num_sums
    return fixed_s * _product_rate(ledger, ceilings, linears) / flops_per_token


def _of_rank(
    ledger: CostLedger,
    ceilings: Ceilings,
    max_num_seqs: int,
    memory_share: float,
    linears: LinearFormat | None,
) -> Chunk:
    fixed, held = fixed_tokens(ledger, ceilings, linears), _held_bytes(ledger, linears)
    tokens = LEAST_TOKENS
    while tokens < MOST_TOKENS and tokens < BEYOND_FIXED * fixed:
        tokens *= 2
    level = ceilings.memory_level(held)
    rate = _product_rate(ledger, ceilings, linears)
    reason = (
        f"what a step costs however short it is (weights at {format_rate(level.bytes_per_s)} of "
        f"{level.name}, ops and sums at {ceilings.kernel_floor_s * 1e6:.1f} and "
        f"{ceilings.collective_latency_s * 1e6:.1f} us each) is as long as multiplying "
        f"{fixed:.0f} tokens at {rate / 1e9:.3g} GFLOPS; {BEYOND_FIXED} times as many, between "
        f"{LEAST_TOKENS} and {MOST_TOKENS}"
    )
    capacity = ceilings.memory[-1].capacity_bytes * memory_share
    room = MOST_OF_MEMORY * (capacity - held)
    wanted = tokens
    while tokens > LEAST_TOKENS and ledger.activation_bytes(tokens, max_num_seqs) > room:
        tokens //= 2
    if tokens < wanted:
        taken = format_size(ledger.activation_bytes(wanted, max_num_seqs))
        reason += f"; less, since activations of {wanted} would take {taken}"
    return Chunk(tokens, reason)


def _product_rate(ledger: CostLedger, ceilings: Ceilings, linears: LinearFormat | None) -> float:
    own = ceilings.flops_per_s.get(linears.product) if linears else None
    return own or arithmetic_rate(ledger.compute_dtype, ceilings)


def _held_bytes(ledger: CostLedger, linears: LinearFormat | None) -> int:
    """Weights of the rank, the linears' as they are stored."""
    if linears is None:
        return ledger.weight_bytes
    saved = 1 - linears.weight_bytes / ledger.compute_dtype.num_bytes
    return ledger.weight_bytes - round(saved * _linears(ledger)[1])


def _linears(ledger: CostLedger) -> tuple[int, int]:
    """(FLOPs of a token, bytes of weights) of all layers' linears, in the compute dtype."""
    ops = [op_id for op_id in ledger.op_ids() if op_id.startswith("layers.")]
    found = []
    for tokens in (1, 2):
        sums = aggregate([tokens], [tokens], 0, 0, ledger.spec.window(0))
        costs = [ledger.cost(op, sums) for op in ops if ledger.kind(op) is OpKind.LINEAR]
        found.append((sum(c.flops for c in costs), sum(c.bytes_read for c in costs)))
    one, two = found
    return two[0] - one[0], 2 * one[1] - two[1]
