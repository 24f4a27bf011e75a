"""Ops whose times a probe took in steps of this runtime, priced by what it found rather than by
rates of kernels alone: on CPUs an op in a step starts cold, and few of them reach a roof."""

from collections.abc import Sequence
from dataclasses import dataclass

from tpinfer.config.measured import OpTime
from tpinfer.costs.ops import TERMS
from tpinfer.planner.kernel_times import between
from tpinfer.planner.step_program import Terms, Work, scaled

_ONE, _TOKENS, _ROWS = (TERMS.index(name) for name in ("one", "tokens", "rows"))


@dataclass(frozen=True, slots=True)
class TimedOp:
    """Equal ops of one kind."""

    count: int
    fixed: Terms
    """Seconds, without what its operations take where that depends on the rows."""
    flops: Terms
    """Operations whose rate depends on the rows; empty where none does."""
    rates: tuple[tuple[int, float], ...]
    """(rows, operations a second), fewest rows first."""
    rows_term: int
    """Which term says how many rows it has."""
    roofs: tuple[Terms, Terms]
    """Seconds of its arithmetic and of its bytes at the device's best: they name what binds it."""

    def seconds(self, terms: Sequence[int]) -> float:
        """Of one of them; 0 where it has nothing to do."""
        total = dot(self.fixed, terms)
        if self.flops:
            flops = dot(self.flops, terms)
            total += flops / between(self.rates, terms[self.rows_term]) if flops else 0.0
        return total


def timed_op(work: Work, op: OpTime, roof_s: tuple[float, float]) -> TimedOp:
    """`work` as `op` was measured. `roof_s` is seconds an operation and a byte at best."""
    fixed = [(_ONE, op.floor_s), (_ROWS, op.row_s)]
    if op.bytes_per_s is not None:
        fixed += scaled(work.moved, 1 / op.bytes_per_s)
    if op.flops_per_s is not None:
        fixed += scaled(work.flops, 1 / op.flops_per_s)
    return TimedOp(
        work.count,
        _together(fixed),
        work.flops if op.rates else (),
        tuple(sorted(op.rates.items())),
        _ROWS if work.is_head else _TOKENS,
        (scaled(work.flops, roof_s[0]), scaled(work.moved, roof_s[1])),
    )


def dot(form: Terms, terms: Sequence[int]) -> float:
    """The form's value."""
    total = 0.0
    for index, factor in form:
        total += factor * terms[index]
    return total


def _together(form: Sequence[tuple[int, float]]) -> Terms:
    sums: dict[int, float] = {}
    for index, factor in form:
        if factor:
            sums[index] = sums.get(index, 0.0) + factor
    return tuple(sums.items())
