"""Fit what an op takes in a step: a start, and so much a row, a byte and an operation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from tpinfer.config.dtypes import DType
from tpinfer.config.measured import OpTime

LINEAR, ATTENTION = "linear", "attention"


@dataclass(frozen=True, slots=True)
class OpPoint:
    """One op in one kind of step."""

    kind: str
    """`costs.ops.OpKind`."""
    tokens: int
    """Rows of the op's input."""
    rows: int
    """Tokens that the step draws."""
    num_bytes: float
    """Read and written, or sent where it is a collective."""
    flops: float
    seconds: float


def fit_op_times(points: Iterable[OpPoint], dtype: DType) -> tuple[OpTime, ...]:
    """One fit a kind. Linears have an arithmetic rate for each number of rows, since few rows cost
    what reading the weights costs; attention pays for rows, bytes and operations; all others for
    bytes. Ops that did nothing are left out."""
    by_kind: dict[str, list[OpPoint]] = {}
    for point in points:
        if point.num_bytes or point.flops:
            by_kind.setdefault(point.kind, []).append(point)
    fits = {LINEAR: _linear, ATTENTION: _attention}
    return tuple(fits.get(kind, _plain)(kind, dtype, found) for kind, found in by_kind.items())


def _linear(kind: str, dtype: DType, points: Sequence[OpPoint]) -> OpTime:
    counts = sorted({point.tokens for point in points})
    columns = [[1.0 for _ in points]]
    columns += [[p.flops * (p.tokens == count) for p in points] for count in counts]
    times = [point.seconds for point in points]
    found, error = _positive(columns, times, must=len(counts))
    rates = {count: 1 / slope for count, slope in zip(counts, found[1:], strict=True)}
    return OpTime(kind, dtype, floor_s=found[0], rates=rates, error=error)


def _attention(kind: str, dtype: DType, points: Sequence[OpPoint]) -> OpTime:
    columns = [
        [1.0 for _ in points],
        [float(point.rows) for point in points],
        [point.num_bytes for point in points],
        [point.flops for point in points],
    ]
    found, error = _positive(columns, [point.seconds for point in points])
    floor_s, row_s, byte_s, flop_s = found
    return OpTime(kind, dtype, floor_s, row_s, _rate(byte_s), _rate(flop_s), error=error)


def _plain(kind: str, dtype: DType, points: Sequence[OpPoint]) -> OpTime:
    columns = [[1.0 for _ in points], [point.num_bytes for point in points]]
    (floor_s, byte_s), error = _positive(columns, [point.seconds for point in points])
    return OpTime(kind, dtype, floor_s, bytes_per_s=_rate(byte_s), error=error)


def _rate(unit_s: float) -> float | None:
    return 1 / unit_s if unit_s else None


def _positive(
    columns: Sequence[Sequence[float]], times: Sequence[float], must: int = 0
) -> tuple[list[float], float]:
    """(coefficients, none below 0, of least squares of the relative error; their mean absolute
    relative error). The last `must` columns are always used; of the others, whichever of their
    subsets fits best without a negative one: they are few."""
    weights = 1 / np.asarray(times, float)
    rows = np.asarray(columns, float).T * weights[:, None]
    scale = np.maximum(np.abs(rows).max(0), 1e-300)
    free = rows.shape[1] - must
    best: tuple[float, np.ndarray] | None = None
    for size in range(free, -1, -1):
        for some in combinations(range(free), size):
            used = [*some, *range(free, rows.shape[1])]
            if not used:
                continue
            found = np.zeros(rows.shape[1])
            answer, *_ = np.linalg.lstsq(
                rows[:, used] / scale[used], np.ones(len(rows)), rcond=None
            )
            found[used] = answer / scale[used]
            if (found < 0).any():
                continue
            lost = float(np.square(rows @ found - 1).sum())
            if best is None or lost < best[0]:
                best = lost, found
    assert best is not None, "a single column of times above 0 has a positive coefficient"
    return best[1].tolist(), float(np.abs(rows @ best[1] - 1).mean())
