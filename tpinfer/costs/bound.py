"""What an op is bound by: the nearest ceiling, or its own smallness.

Rules: t_c = operations / arithmetic rate, t_m = bytes / bandwidth of the memory level the step's
working set fits; the roof is the larger. Below the least time of any op the op is bound by
latency, whatever its roof. Source: the roofline model, Williams, Waterman and Patterson 2009.
"""

from dataclasses import dataclass

from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.costs.collective import collective_floor_s
from tpinfer.costs.ops import OpCost, OpKind


@dataclass(frozen=True, slots=True)
class Bound:
    """The verdict on one op."""

    leaf: str
    """`compute`, `memory`, `latency` or `comm_transfer`."""
    floor_ns: int
    """Least time the ceilings allow."""


def classify(
    kind: OpKind, cost: OpCost, dtype: DType, level: MemoryLevel, ceilings: Ceilings
) -> Bound:
    """Which ceiling is nearest."""
    if kind.is_collective:
        return Bound("comm_transfer", round(collective_floor_s(cost.bytes_sent, ceilings) * 1e9))
    compute_s = cost.flops / arithmetic_rate(dtype, ceilings)
    memory_s = cost.bytes_moved / level.bytes_per_s
    roof_s = max(compute_s, memory_s)
    if roof_s < ceilings.kernel_floor_s:
        return Bound("latency", round(ceilings.kernel_floor_s * 1e9))
    return Bound("compute" if compute_s >= memory_s else "memory", round(roof_s * 1e9))


def arithmetic_rate(dtype: DType, ceilings: Ceilings) -> float:
    """FLOPs a second that `dtype` is judged by: its own rate, else float32's, else the lowest."""
    rates = ceilings.flops_per_s
    return rates.get(dtype) or rates.get(DType.FLOAT32) or min(rates.values())
