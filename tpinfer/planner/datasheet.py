"""Devices of published measurements: what the catalogue does not say of them.

Attainable rates and the least time of a kernel are the catalogue's, that is e, g and t0 of
`t0 + max(bytes / (e * BW), FLOPs / (g * peak))`. Here are the peaks, by which a measurement is
found impossible, float4's rate, the memory that the driver reports (more than the round number on
the box), and the fabric of the servers they come in. Peaks are the makers' (dense, one direction).
"""

from dataclasses import dataclass

from tpinfer.config.catalogue import read_catalogue
from tpinfer.config.ceilings import MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import ConfigError
from tpinfer.planner.kernel_times import DeviceTimes

FLOAT4_SHARE = 0.5
"""Part of float4's peak that its matrix products reach. Assumed: no table of them was at hand, and
published runs bear it out."""


@dataclass(frozen=True, slots=True)
class Datasheet:
    """One kind of device."""

    sku: str
    memory_bytes: float
    bytes_per_s: float
    tflops: tuple[float, float, float]
    """Dense peaks of bfloat16, float8 and float4; 0 where the device has no such units."""
    fabric: str
    """Key of `planner.fabrics`: how a server's devices are joined."""
    link_bytes_per_s: float
    like: str | None = None
    """The catalogue's entry with the same chip and other memory, where it has none of this one."""

    def device(self) -> DeviceTimes:
        """With attainable rates."""
        cards = read_catalogue().gpus
        rates = cards[self.like or self.sku]
        scale = self.bytes_per_s / DATASHEETS[self.like].bytes_per_s if self.like else 1.0
        level = MemoryLevel("HBM", int(self.memory_bytes), rates.memory[-1].bytes_per_s * scale)
        flops = {str(dtype): rate for dtype, rate in rates.flops_per_s.items()}
        if self.tflops[2]:
            flops["fp4"] = self.tflops[2] * 1e12 * FLOAT4_SHARE
        return DeviceTimes((level,), flops, rates.kernel_floor_s, rates.origin)

    def peak_device(self) -> DeviceTimes:
        """With the makers' peaks."""
        level = MemoryLevel("HBM", int(self.memory_bytes), self.bytes_per_s)
        bf16, fp8, fp4 = (rate * 1e12 for rate in self.tflops)
        flops: dict[str, float] = {DType.BFLOAT16: bf16, DType.FLOAT16: bf16}
        flops |= {DType.FLOAT8_E4M3: fp8} if fp8 else {}
        flops |= {"fp4": fp4} if fp4 else {}
        return DeviceTimes((level,), flops, self.device().kernel_floor_s, f"datasheet {self.sku}")


_MIB, _GB, _TB = 2.0**20, 1e9, 1e12
_H100_TFLOPS, _B200_TFLOPS = (989.0, 1979.0, 0.0), (2250.0, 4500.0, 9000.0)
_ALL = (
    Datasheet("a100-sxm-40g", 40960 * _MIB, 1.555 * _TB, (312, 0, 0), "nvlink3", 300 * _GB),
    Datasheet("a100-sxm-80g", 81920 * _MIB, 2.039 * _TB, (312, 0, 0), "nvlink3", 300 * _GB),
    Datasheet("h100-sxm-80g", 81559 * _MIB, 3.35 * _TB, _H100_TFLOPS, "nvlink4", 450 * _GB),
    Datasheet("h200-sxm", 143771 * _MIB, 4.8 * _TB, _H100_TFLOPS, "nvlink4", 450 * _GB),
    Datasheet(
        "gh200-96g", 97871 * _MIB, 4.0 * _TB, _H100_TFLOPS, "nvlink4", 450 * _GB, "h100-sxm-80g"
    ),
    Datasheet("b200", 183359 * _MIB, 7.7 * _TB, _B200_TFLOPS, "nvlink5", 900 * _GB),
    Datasheet("gb200", 189471 * _MIB, 8.0 * _TB, (2500, 5000, 10000), "nvlink5", 900 * _GB),
    Datasheet("l40s", 46068 * _MIB, 0.864 * _TB, (362, 733, 0), "pcie4", 32 * _GB),
    Datasheet("l4", 23034 * _MIB, 0.300 * _TB, (121, 242, 0), "pcie4", 32 * _GB),
    Datasheet("rtx-4090", 24564 * _MIB, 1.008 * _TB, (165, 330, 0), "pcie4", 32 * _GB),
    Datasheet("rtx-pro-6000", 97887 * _MIB, 1.792 * _TB, (468, 936, 1871), "pcie5", 64 * _GB),
    Datasheet("mi300x", 196288 * _MIB, 5.3 * _TB, (1307, 2615, 0), "xgmi", 448 * _GB),
)
DATASHEETS = {one.sku: one for one in _ALL}


def datasheet_of(sku: str) -> Datasheet:
    """Raises ConfigError for a device that is not known."""
    if sku not in DATASHEETS:
        raise ConfigError(f"device {sku!r} is unknown; known are {', '.join(DATASHEETS)}")
    return DATASHEETS[sku]
