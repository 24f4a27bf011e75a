"""Clocks of a device and what holds them back, sampled beside the work on a thread. No torch.

Reads only; no setting is ever changed. Every field is optional: what a driver or kernel does not
say, or fails to say once, is None in that sample.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from tpinfer.config.clock_samples import REASON_WORDS, ClockSamples
from tpinfer.config.measured import Clocks
from tpinfer.machine.nvml_driver import Driver

PERIOD_S = 0.02
MOST_SAMPLES = 1 << 16
"""Beyond, every second one is dropped and samples are taken half as often."""
_MOST_CORES = 4
"""Cores of a rank that are looked at; more cost more than they tell."""
_GPU_REASONS = tuple(REASON_WORDS)[:9]
"""By bit of nvmlClocksEventReasons."""
_CPUS = Path("sys/devices/system/cpu")


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a device."""

    compute_mhz: float | None = None
    memory_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    reasons: tuple[str, ...] | None = None
    """None where nobody tells."""


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What does not change."""

    kind: str
    """`gpu` or `cpu`."""
    device: str
    most_compute_mhz: float | None
    most_memory_mhz: float | None = None
    power_limit_w: float | None = None


class ClockSource(Protocol):
    """A device that says something of its clocks."""

    limits: DeviceLimits

    def read(self) -> Reading:
        """How it stands now."""
        ...


class GpuClocks:
    """A GPU, by its number at the driver."""

    def __init__(self, driver: Driver, index: int) -> None:
        self._driver = driver
        self._index = index
        self.limits = DeviceLimits(
            kind="gpu",
            device=str(driver.read("name", index) or f"GPU {index}"),
            most_compute_mhz=self._number("compute_clock_mhz"),
            most_memory_mhz=self._number("memory_clock_mhz"),
            power_limit_w=self._number("power_limit_mw", 1e-3),
        )

    def read(self) -> Reading:
        """See `ClockSource`."""
        bits = self._driver.read("clock_reasons", self._index)
        names = None
        if isinstance(bits, int):
            names = tuple(name for i, name in enumerate(_GPU_REASONS) if bits >> i & 1)
        return Reading(
            compute_mhz=self._number("compute_clock_now_mhz"),
            memory_mhz=self._number("memory_clock_now_mhz"),
            power_w=self._number("power_mw", 1e-3),
            temperature_c=self._number("temperature_c"),
            reasons=names,
        )

    def _number(self, field: str, unit: float = 1.0) -> float | None:
        value = self._driver.read(field, self._index)
        # Zero is what broken fields read as; no device runs at it.
        return value * unit if isinstance(value, int) and value > 0 else None


class CpuClocks:
    """The cores of a CPU rank, where the kernel shows their frequencies or that they were hot."""

    def __init__(self, cores: Sequence[int], root: Path = Path("/")) -> None:
        """cores: what the rank may run on."""
        step = max(1, -(-len(cores) // _MOST_CORES))
        self._cores = [root / _CPUS / f"cpu{core}" for core in sorted(cores)[::step]]
        self._num_hot = self._count_hot()
        most = [_number(core / "cpufreq/cpuinfo_max_freq") for core in self._cores]
        limits = [_number(core / "cpufreq/scaling_max_freq") for core in self._cores]
        known = [value for value in most if value]
        self._is_limited = any(
            limit and top and limit < top for limit, top in zip(limits, most, strict=True)
        )
        self.limits = DeviceLimits("cpu", "CPU", max(known) / 1e3 if known else None)

    @property
    def says_something(self) -> bool:
        """Whether the kernel has any of the files."""
        return self.limits.most_compute_mhz is not None or self._num_hot is not None

    def read(self) -> Reading:
        """See `ClockSource`."""
        kilohertz = [_number(core / "cpufreq/scaling_cur_freq") for core in self._cores]
        known = [value for value in kilohertz if value]
        before, self._num_hot = self._num_hot, self._count_hot()
        reasons = ["cpu_frequency_limit"] if self._is_limited else []
        if None not in (before, self._num_hot) and self._num_hot != before:
            reasons.append("cpu_thermal")
        tells = self._is_limited or self._num_hot is not None
        return Reading(
            # Idle cores rest at a low clock: the fastest is one that works.
            compute_mhz=max(known) / 1e3 if known else None,
            reasons=tuple(reasons) if tells else None,
        )

    def _count_hot(self) -> int | None:
        """How often the cores, and their packages, were slowed for being hot since they started."""
        names = ("core_throttle_count", "package_throttle_count")
        counts = [
            _number(core / "thermal_throttle" / name) for core in self._cores for name in names
        ]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None


def find_gpu(driver: Driver, uuid: str, bus: int | None) -> int | None:
    """The driver's number of a card, by its UUID or (a MIG slice has one of its own) by its PCI bus
    number; None where neither tells."""
    count = driver.read("count")
    numbers = range(count if isinstance(count, int) else 0)
    wanted = uuid.removeprefix("GPU-")
    for index in numbers:
        if wanted and str(driver.read("uuid", index) or "").removeprefix("GPU-") == wanted:
            return index
    places = [str(driver.read("bus", index) or "").split(":") for index in numbers]
    matches = [i for i, place in enumerate(places) if len(place) == 3 and _hex(place[1]) == bus]
    return matches[0] if len(matches) == 1 else None


def gpu_source(driver: Driver, properties: Any) -> tuple[ClockSource | None, str]:
    """The clocks of the card that torch describes by `properties`; older torch says less of it."""
    bus = getattr(properties, "pci_bus_id", None)
    number = find_gpu(driver, str(getattr(properties, "uuid", "")), bus)
    if number is None and driver.read("count") == 1:
        number = 0
    if number is None:
        return None, "torch does not say which of the driver's cards this is"
    return GpuClocks(driver, number), ""


class ClockSampler:
    """Samples a source from `start` to `stop`; or over a `with` block."""

    def __init__(
        self,
        source: ClockSource,
        rank: int = 0,
        period_s: float = PERIOD_S,
        most_samples: int = MOST_SAMPLES,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._source = source
        self._rank = rank
        self._period_s = period_s
        self._most = most_samples
        self._now_ns = now_ns
        self._taken: list[tuple[int, Reading]] = []
        self._pairs: list[tuple[int, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tpinfer-clocks", daemon=True)

    def start(self) -> None:
        """Take the first sample and go on on a thread."""
        self._pair()
        self.sample()
        self._thread.start()

    def stop(self) -> ClockSamples:
        """Take the last sample; everything since `start`."""
        self._over.set()
        self._thread.join()
        self.sample()
        self._pair()
        return self.samples()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def sample(self) -> None:
        """Look once."""
        moment_ns = self._now_ns()
        if self._taken and moment_ns <= self._taken[-1][0]:
            return
        self._taken.append((moment_ns, self._source.read()))
        if len(self._taken) > self._most:
            del self._taken[1::2]
            self._period_s *= 2

    def samples(self) -> ClockSamples:
        """What was seen so far."""
        taken, limits = list(self._taken), self._source.limits
        readings = [reading for _, reading in taken]
        return ClockSamples(
            rank=self._rank,
            kind=limits.kind,
            device=limits.device,
            period_ns=int(self._period_s * 1e9),
            clock_pairs=list(self._pairs),
            monotonic_ns=[moment for moment, _ in taken],
            compute_mhz=[reading.compute_mhz for reading in readings],
            memory_mhz=[reading.memory_mhz for reading in readings],
            power_w=[reading.power_w for reading in readings],
            temperature_c=[reading.temperature_c for reading in readings],
            reasons=[None if r.reasons is None else list(r.reasons) for r in readings],
            most_compute_mhz=limits.most_compute_mhz,
            most_memory_mhz=limits.most_memory_mhz,
            power_limit_w=limits.power_limit_w,
        )

    def _run(self) -> None:
        while not self._over.wait(self._period_s):
            self.sample()

    def _pair(self) -> None:
        self._pairs.append((time.monotonic_ns(), time.time_ns()))


def measured_clocks(samples: ClockSamples) -> Clocks:
    """What a measured layer keeps of them: medians of the samples with work, and every reason."""
    compute, memory = (samples.median(c) for c in (samples.compute_mhz, samples.memory_mhz))
    return Clocks(
        compute_mhz=_whole(compute),
        memory_mhz=_whole(memory),
        throttled_by=samples.reasons_seen(),
        most_compute_mhz=_whole(samples.most_compute_mhz),
        most_memory_mhz=_whole(samples.most_memory_mhz),
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _hex(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        return -1


def _number(path: Path) -> int | None:
    """The number in a file of the kernel; None where it has none."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return int(os.read(file, 64))
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
