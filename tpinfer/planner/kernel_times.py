"""How long a kernel takes on one device: `t0 + max(bytes / (e * BW), FLOPs / (g * peak))`.

The rates are attainable ones, so e and g are in them already; `planner.traits` scales them.
"""

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


def device_times(ceilings: Ceilings) -> DeviceTimes:
    """The device as a topology's ceilings describe it."""
    rates = {str(dtype): rate for dtype, rate in ceilings.flops_per_s.items()}
    return DeviceTimes(ceilings.memory, rates, ceilings.kernel_floor_s, ceilings.origin)
