"""What one device's kernels are timed by: attainable rates, so e and g of
`t0 + max(bytes / (e * BW), FLOPs / (g * peak))` are in them already; `planner.traits` scales them.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType


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
        known = self.by_thinness
        if not known:
            return 1.0
        right = bisect_left(known, (tokens, 0.0))
        if right == len(known):
            return known[-1][1]
        high_rows, high = known[right]
        if right == 0 or high_rows == tokens:
            return high
        low_rows, low = known[right - 1]
        return low + (high - low) * (tokens - low_rows) / (high_rows - low_rows)


def device_times(ceilings: Ceilings) -> DeviceTimes:
    """The device as a topology's ceilings describe it."""
    rates = {str(dtype): rate for dtype, rate in ceilings.flops_per_s.items()}
    return DeviceTimes(ceilings.memory, rates, ceilings.kernel_floor_s, ceilings.origin)
