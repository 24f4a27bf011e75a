"""Which ceiling each piece of work is nearest to, for all of a trace at once.

The rules are those of `tpinfer.costs.bound`: the roof is the larger of FLOPs over the arithmetic
rate and bytes over the bandwidth of the memory level that the step's working set fits. A roof below
the least time of a kernel is `latency`; so is a grid smaller than the device with a roof below 30 %
of the time taken. Both ceilings within a factor of 1.25 of each other are called balanced.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tpinfer.config.ceilings import Ceilings
from tpinfer.config.dtypes import DType
from tpinfer.costs.bound import arithmetic_rate
from tpinfer.costs.leaves import LEAVES
from tpprof.classify.calls import DTYPES
from tpprof.classify.prices import Prices

BALANCE = 1.25
SMALL_GRID_ROOF = 0.3
_MOST_NS = 1 << 62
_STANDS_IN = {
    DType.BFLOAT16: (DType.FLOAT16,),
    DType.FLOAT16: (DType.BFLOAT16,),
    DType.FLOAT8_E4M3: (DType.BFLOAT16, DType.FLOAT16),
    DType.INT8: (DType.BFLOAT16, DType.FLOAT16),
}
"""Whose rate a matrix unit has at least, where the ceilings do not tell a dtype's own: float32's
would be off by an order of magnitude."""


@dataclass(frozen=True)
class Verdicts:
    """Columns of n entries."""

    leaf: np.ndarray
    """int8: index into LEAVES; `unmodelled` without a price or a ceiling."""
    balanced: np.ndarray
    floor_ns: np.ndarray
    ceilings_ns: Mapping[str, np.ndarray]
    """`compute`, one per memory level, and `wire`."""


def judge_all(
    prices: Prices,
    length_ns: np.ndarray,
    is_comm: np.ndarray,
    has_small_grid: np.ndarray,
    working_set: np.ndarray,
    ceilings: Ceilings | None,
) -> Verdicts:
    """working_set: int64 [n], bytes that the entry's step touches again and again; -1 where
    unknown, which counts as more than any cache holds."""
    count = len(length_ns)
    leaf = np.full(count, LEAVES.index("unmodelled"), np.int8)
    floor = np.zeros(count, np.int64)
    balanced = np.zeros(count, bool)
    if ceilings is None or not count:
        return Verdicts(leaf, balanced, floor, {})
    rates = np.array([rate_of(dtype, ceilings) for dtype in DTYPES])
    known = (prices.flops >= 0) & ~is_comm
    flops_s = np.maximum(prices.flops, 0) / rates[prices.dtype]
    moved = np.maximum(prices.num_bytes, 0)
    by_level = {level.name: moved / level.bytes_per_s for level in ceilings.memory}
    chosen = _level_of(working_set, [level.capacity_bytes for level in ceilings.memory])
    memory_s = np.choose(chosen, list(by_level.values()))
    roof_s = np.maximum(flops_s, memory_s)
    is_small = roof_s < ceilings.kernel_floor_s
    is_small |= has_small_grid & (roof_s * 1e9 < SMALL_GRID_ROOF * length_ns)
    by_arithmetic = known & (flops_s >= memory_s)
    leaf[known] = LEAVES.index("memory")
    leaf[by_arithmetic] = LEAVES.index("compute")
    leaf[known & is_small] = LEAVES.index("latency")
    balanced = known & (roof_s <= BALANCE * np.minimum(flops_s, memory_s)) & ~is_small
    floor_s = np.where(is_small, np.maximum(roof_s, ceilings.kernel_floor_s), roof_s)
    floor[known] = _ns(floor_s)[known]
    on_wire = is_comm & (prices.num_sent >= 0)
    sent = prices.num_sent[on_wire]
    wire_s = ceilings.collective_latency_s + sent / ceilings.collective_bytes_per_s
    floor[on_wire] = np.where(sent > 0, _ns(wire_s), 0)  # as `costs.collective`
    vector = {"compute": np.where(known, _ns(flops_s), 0)}
    vector |= {name: np.where(known, _ns(spent), 0) for name, spent in by_level.items()}
    vector["wire"] = np.zeros(count, np.int64)
    vector["wire"][on_wire] = floor[on_wire]
    return Verdicts(leaf, balanced, floor, vector)


def rate_of(dtype: DType, ceilings: Ceilings) -> float:
    """FLOPs a second that `dtype` is judged by."""
    for one in (dtype, *_STANDS_IN.get(dtype, ())):
        if one in ceilings.flops_per_s:
            return ceilings.flops_per_s[one]
    return arithmetic_rate(dtype, ceilings)


def _ns(seconds: np.ndarray) -> np.ndarray:
    return np.rint(np.minimum(seconds * 1e9, _MOST_NS)).astype(np.int64)


def _level_of(working_set: np.ndarray, capacities: Sequence[int]) -> np.ndarray:
    """Index of the smallest level each working set fits, else the last."""
    found = np.full(len(working_set), len(capacities) - 1)
    for index in range(len(capacities) - 1, -1, -1):
        found[(working_set >= 0) & (working_set <= capacities[index])] = index
    return found
