"""What one device's kernels are timed by: attainable rates, so e and g of
`t0 + max(bytes / (e * BW), FLOPs / (g * peak))` are in them already; `planner.traits` scales them.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.config.measured import OpTime


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """One rank's device."""

    memory: tuple[MemoryLevel, ...]
    """Smallest level first; the last holds everything."""
    flops_per_s: Mapping[str, float]
    """Attainable rate by format: `DType` values, and `fp4`."""
    kernel_floor_s: float
    origin: str
    by_thinness: tuple[tuple[int, float], ...] = ()
    """(tokens, part of the arithmetic rate that a linear of so many rows reaches), fewest tokens
    first; empty where products of few rows are slow for their bytes alone."""
    ops: Mapping[str, OpTime] = field(default_factory=dict)
    """Kinds of op (`costs.ops.OpKind`) as they ran in steps of this runtime, where that was
    measured: they go before rates, which are those of kernels alone."""

    @property
    def main_memory(self) -> MemoryLevel:
        """Where weights and cache lie."""
        return self.memory[-1]

    def rate(self, product: str) -> float:
        """FLOPs a second in a format; a device without units for it computes in bfloat16."""
        rates = self.flops_per_s
        for name in (product, DType.BFLOAT16, DType.FLOAT32):
            if name in rates:
                return rates[name]
        return min(rates.values())

    def thin_share(self, tokens: int) -> float:
        """The part of the rate at `tokens` rows, straight lines between the known ones."""
        return between(self.by_thinness, tokens) if self.by_thinness else 1.0


def between(known: Sequence[tuple[int, float]], count: int) -> float:
    """The value at `count` of points in rising order, straight lines between them and level beyond
    the first and the last."""
    right = bisect_left(known, (count, 0.0))
    if right == len(known):
        return known[-1][1]
    high_count, high = known[right]
    if right == 0 or high_count == count:
        return high
    low_count, low = known[right - 1]
    return low + (high - low) * (count - low_count) / (high_count - low_count)


def device_times(ceilings: Ceilings) -> DeviceTimes:
    """The device as a topology's ceilings describe it."""
    rates = {str(dtype): rate for dtype, rate in ceilings.flops_per_s.items()}
    return DeviceTimes(ceilings.memory, rates, ceilings.kernel_floor_s, ceilings.origin)
