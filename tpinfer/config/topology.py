"""What a machine can do: hosts, devices, links, ceilings, placement. `topology_reader` reads files.

Rates are in one direction, per device. Ceilings belong to one rank's slice, not to the card.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tpinfer.config.dtypes import DType


@dataclass(frozen=True, slots=True)
class MemoryLevel:
    """One level of a rank's memory, as attainable with all ranks reading at once."""

    name: str
    """`L2`, `L3`, `DRAM`, `HBM`."""
    capacity_bytes: int
    """Bytes of it that this rank can count on."""
    bytes_per_s: float
    """Read rate of this rank."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Attainable rates and least times of ONE rank's slice of the machine."""

    memory: tuple[MemoryLevel, ...]
    """Smallest level first; the last one is DRAM or HBM."""
    flops_per_s: Mapping[DType, float]
    """Arithmetic rate per dtype."""
    kernel_floor_s: float
    """Least time of one op or kernel."""
    collective_latency_s: float
    """Least time of one small all-reduce."""
    collective_bytes_per_s: float
    """Bus bandwidth of a large all-reduce."""
    origin: str
    """Where the numbers come from: `measured at start-up`, `topology cpu-laptop.yaml`."""

    def memory_level(self, working_set_bytes: int) -> MemoryLevel:
        """The smallest level that `working_set_bytes` fits, else the last."""
        fits = (level for level in self.memory if working_set_bytes <= level.capacity_bytes)
        return next(fits, self.memory[-1])
