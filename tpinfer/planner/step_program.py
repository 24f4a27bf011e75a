"""What one rank does in a step, counted: equal ops of its ledger together, before any rate is
known."""

from collections import Counter
from dataclasses import dataclass

from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import TERMS, OpKind
from tpinfer.planner.precision import Precision

Terms = tuple[tuple[int, float], ...]
"""(index into TERMS, factor) of a linear form."""
_ONE, _TOKENS = TERMS.index("one"), TERMS.index("tokens")


@dataclass(frozen=True, slots=True)
class Work:
    """Equal kernels."""

    count: int
    kind: OpKind
    is_head: bool
    """The product with the vocabulary: a linear that stays in the compute dtype and works on the
    step's drawn rows alone."""
    flops: Terms
    moved: Terms
    """Bytes read and written."""

    @property
    def role(self) -> str:
        """`linear` in the product's format, `attention`, or `plain`: what decides its rates."""
        if self.kind is OpKind.LINEAR and not self.is_head:
            return "linear"
        return "attention" if self.kind is OpKind.ATTENTION else "plain"


@dataclass(frozen=True, slots=True)
class StepProgram:
    """All that a rank does."""

    kernels: tuple[Work, ...]
    reduces: tuple[tuple[int, float], ...]
    """(all-reduces, message bytes a token)."""
    gathers: tuple[tuple[int, Terms], ...]
    """(other collectives, bytes sent)."""
    weight_bytes: float
    """Parameters of the rank as `precision` stores them."""


def count_program(ledger: CostLedger, precision: Precision) -> StepProgram:
    """The ledger's ops with weights of linears stored in `precision`; embedding, head and norms
    stay in the compute dtype, as quantized checkpoints have them."""
    counted = Counter(
        (ledger.kind(op), op == "head", ledger.op_formula(op)) for op in ledger.op_ids()
    )
    share = precision.weight_bytes / ledger.compute_dtype.num_bytes
    kernels: list[Work] = []
    reduces: list[tuple[int, float]] = []
    gathers: list[tuple[int, Terms]] = []
    weight_bytes = float(ledger.weight_bytes)
    n = ledger.partition.size
    for (kind, is_head, one), count in counted.items():
        moved = (one.bytes_read + one.bytes_written).coefficients
        if kind is OpKind.REDUCE:
            sent = dict(one.bytes_sent.coefficients)[_TOKENS]
            reduces.append((count, sent * n / (2 * (n - 1))))
        elif kind.is_collective:
            if one.bytes_sent.coefficients:
                gathers.append((count, one.bytes_sent.coefficients))
        elif kind is OpKind.LINEAR and not is_head:
            weight_bytes -= count * dict(moved)[_ONE] * (1 - share)
            stored = tuple((i, f * share if i == _ONE else f) for i, f in moved)
            kernels.append(Work(count, kind, False, one.flops.coefficients, stored))
        else:
            kernels.append(Work(count, kind, is_head, one.flops.coefficients, moved))
    return StepProgram(tuple(kernels), tuple(reduces), tuple(gathers), weight_bytes)


def scaled(terms: Terms, factor: float) -> Terms:
    """The form times a factor."""
    return tuple((index, factor * value) for index, value in terms)
