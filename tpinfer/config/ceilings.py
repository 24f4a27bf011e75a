"""Attainable rates of one rank's slice of a machine, and how they follow from those of the whole.

Numbers come from a topology file, the catalogue or a measurement; `origin` says which.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tpinfer.config.dtypes import DType
from tpinfer.config.errors import TopologyError
from tpinfer.config.origin import Origin

Origins = Mapping[str, Origin]
"""Per value: `memory.HBM.rate`, `memory.HBM.capacity`, `flops.bfloat16`, `kernel_floor`,
`all_reduce.latency`, `all_reduce.rate`."""


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
    """Least time of one small all-reduce; 0 for a rank alone."""
    collective_bytes_per_s: float
    """Bus bandwidth of a large all-reduce; infinite for a rank alone."""
    origin: str
    """Where the numbers come from: `measured at start-up`, `topology cpu-laptop.yaml`."""
    origins: Origins = field(default_factory=dict, compare=False)
    """The same of each value, where it is known."""
    compute_mhz: float | None = None
    """Clock that the arithmetic rates were measured at; None: they are of the highest clock, or
    nobody knows."""

    def memory_level(self, working_set_bytes: int) -> MemoryLevel:
        """The smallest level that `working_set_bytes` fits, else the last."""
        fits = (level for level in self.memory if working_set_bytes <= level.capacity_bytes)
        return next(fits, self.memory[-1])


@dataclass(frozen=True, slots=True)
class Rates:
    """Attainable rates of something whole - a card, a host's processors - before ranks share it."""

    memory: tuple[MemoryLevel, ...]
    """Smallest level first."""
    flops_per_s: Mapping[DType, float]
    kernel_floor_s: float
    origin: str
    origins: Origins = field(default_factory=dict, compare=False)
    peak_memory_bytes_per_s: float = 0.0
    """Of the last level as its maker states it, of which its rate is the attainable share."""


@dataclass(frozen=True, slots=True)
class CeilingOverrides:
    """A `ceilings:` block, or a measurement: numbers of one rank's slice that beat the derived ones
    where given."""

    memory: Mapping[str, tuple[int | None, float | None]] = field(default_factory=dict)
    """Per level name, its capacity in bytes and its bytes per second."""
    flops_per_s: Mapping[DType, float] = field(default_factory=dict)
    kernel_floor_s: float | None = None
    collective_latency_s: float | None = None
    collective_bytes_per_s: float | None = None
    origins: Origins = field(default_factory=dict, compare=False)
    """Those not named are `spec`."""
    compute_mhz: float | None = None
    """Clock that the arithmetic rates were measured at."""

    def keys(self) -> tuple[str, ...]:
        """Names of the values given, as in `origins`."""
        named = (
            ("kernel_floor", self.kernel_floor_s),
            ("all_reduce.latency", self.collective_latency_s),
            ("all_reduce.rate", self.collective_bytes_per_s),
        )
        levels = [
            (f"memory.{level}.{what}", value)
            for level, pair in self.memory.items()
            for what, value in zip(("capacity", "rate"), pair, strict=True)
        ]
        flops = [(f"flops.{dtype}", rate) for dtype, rate in self.flops_per_s.items()]
        return tuple(name for name, value in (*levels, *flops, *named) if value is not None)

    def marked(self, origin: Origin) -> "CeilingOverrides":
        """The same, every value with this origin."""
        return replace(self, origins=dict.fromkeys(self.keys(), origin))

    def on_top_of(self, other: "CeilingOverrides") -> "CeilingOverrides":
        """These numbers, and `other`'s where these are silent."""
        levels = dict(other.memory)
        for name, (capacity, rate) in self.memory.items():
            below = levels.get(name, (None, None))
            levels[name] = (capacity or below[0], rate or below[1])
        return CeilingOverrides(
            levels,
            {**other.flops_per_s, **self.flops_per_s},
            self.kernel_floor_s or other.kernel_floor_s,
            self.collective_latency_s or other.collective_latency_s,
            self.collective_bytes_per_s or other.collective_bytes_per_s,
            {**other.origins, **dict.fromkeys(self.keys(), Origin.SPEC), **self.origins},
            self.compute_mhz or other.compute_mhz,
        )


def slice_ceilings(
    rates: Rates,
    overrides: CeilingOverrides,
    num_sharing: int,
    collective: tuple[float, float],
    file: str,
    collective_origin: Origin = Origin.SPEC,
) -> Ceilings:
    """Ceilings of one of `num_sharing` equal slices; `collective` is (latency in s, bytes/s).

    Raises TopologyError for an overridden memory level that has only one of its two numbers.
    """
    levels: dict[str, tuple[int | None, float | None]] = {
        level.name: (level.capacity_bytes // num_sharing, level.bytes_per_s / num_sharing)
        for level in rates.memory
    }
    levels = dict(overrides.on_top_of(CeilingOverrides(levels)).memory)
    memory = []
    for name, (capacity, rate) in levels.items():
        if capacity is None or rate is None:
            raise TopologyError(
                f"{file}: memory level {name} under ceilings is new and needs capacity and rate"
            )
        memory.append(MemoryLevel(name, capacity, rate))
    shared_flops = {dtype: rate / num_sharing for dtype, rate in rates.flops_per_s.items()}
    return Ceilings(
        memory=tuple(sorted(memory, key=lambda level: level.capacity_bytes)),
        flops_per_s={**shared_flops, **overrides.flops_per_s},
        kernel_floor_s=overrides.kernel_floor_s or rates.kernel_floor_s,
        collective_latency_s=overrides.collective_latency_s or collective[0],
        collective_bytes_per_s=overrides.collective_bytes_per_s or collective[1],
        origin=f"topology {file} ({rates.origin})",
        origins={
            "all_reduce.latency": collective_origin,
            "all_reduce.rate": collective_origin,
            **rates.origins,
            **dict.fromkeys(overrides.keys(), Origin.SPEC),
            **overrides.origins,
        },
        compute_mhz=overrides.compute_mhz,
    )
