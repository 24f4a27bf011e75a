"""Devices of published measurements by the names their publishers use.

Peaks are those of the makers' datasheets (dense, one direction); e, g and t0 are fits of
`t0 + max(bytes / (e * BW), FLOPs / (g * peak))` to the measured GEMM tables of
github.com/ai-dynamo/aiconfigurator where there are some (A100, H100, H200, B200, L40S), and
g * peak is the matmul search's of github.com/stas00/ml-engineering where there is no such fit.
Memory is what the driver reports, which is more than the round number on the box.
"""

from dataclasses import dataclass

from tpinfer.config.ceilings import MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import ConfigError
from tpinfer.planner.kernel_times import DeviceTimes


@dataclass(frozen=True, slots=True)
class Datasheet:
    """One kind of device."""

    sku: str
    memory_bytes: float
    bytes_per_s: float
    memory_share: float
    """e: part of the bandwidth that kernels reach."""
    tflops: tuple[float, float, float]
    """Dense peaks of bfloat16, float8 and float4; 0 where the device has no such units."""
    shares: tuple[float, float, float]
    """g: part of each that kernels reach."""
    kernel_floor_s: float
    fabric: str
    """Key of `planner.fabrics`: how a host's devices are joined."""
    link_bytes_per_s: float

    def device(self) -> DeviceTimes:
        """With attainable rates."""
        return self._times(self.memory_share, self.shares)

    def peak_device(self) -> DeviceTimes:
        """With the datasheet's peaks."""
        return self._times(1.0, (1.0, 1.0, 1.0))

    def _times(self, memory: float, shares: tuple[float, float, float]) -> DeviceTimes:
        level = MemoryLevel("HBM", int(self.memory_bytes), self.bytes_per_s * memory)
        bf16, fp8, fp4 = (t * s * 1e12 for t, s in zip(self.tflops, shares, strict=True))
        rates: dict[str, float] = {DType.BFLOAT16: bf16, DType.FLOAT16: bf16}
        rates |= {DType.FLOAT8_E4M3: fp8} if fp8 else {}
        rates |= {"fp4": fp4} if fp4 else {}
        return DeviceTimes((level,), rates, self.kernel_floor_s, f"datasheet {self.sku}")


_MIB, _GB, _TB, _US = 2.0**20, 1e9, 1e12, 1e-6
DATASHEETS = {
    one.sku: one
    for one in (
        Datasheet(
            "a100-sxm-80g", 81920 * _MIB, 2.039 * _TB, 0.69,
            (312, 0, 0), (0.73, 0, 0), 5.7 * _US, "nvlink3", 300 * _GB,
        ),
        Datasheet(
            "h100-sxm-80g", 81559 * _MIB, 3.35 * _TB, 0.83,
            (989, 1979, 0), (0.78, 0.73, 0), 3.7 * _US, "nvlink4", 450 * _GB,
        ),
        Datasheet(
            "h200-sxm", 143771 * _MIB, 4.8 * _TB, 0.80,
            (989, 1979, 0), (0.77, 0.73, 0), 4.0 * _US, "nvlink4", 450 * _GB,
        ),
        Datasheet(  # e, g and t0 as the H100's
            "gh200-96g", 97871 * _MIB, 4.0 * _TB, 0.83,
            (989, 1979, 0), (0.78, 0.73, 0), 3.7 * _US, "nvlink4", 450 * _GB,
        ),
        Datasheet(  # g of fp4: assumed
            "b200", 183359 * _MIB, 7.7 * _TB, 0.76,
            (2250, 4500, 9000), (0.70, 0.70, 0.50), 3.6 * _US, "nvlink5", 900 * _GB,
        ),
        Datasheet(  # e, g and t0 as the B200's
            "gb200", 189471 * _MIB, 8.0 * _TB, 0.76,
            (2500, 5000, 10000), (0.70, 0.70, 0.50), 3.6 * _US, "nvlink5", 900 * _GB,
        ),
        Datasheet(
            "l40s", 46068 * _MIB, 0.864 * _TB, 0.82,
            (362, 733, 0), (0.58, 0.58, 0), 3.0 * _US, "pcie4", 32 * _GB,
        ),
        Datasheet(  # shares: assumed
            "rtx-4090", 24564 * _MIB, 1.008 * _TB, 0.85,
            (165, 330, 0), (0.80, 0.80, 0), 3.0 * _US, "pcie4", 32 * _GB,
        ),
        Datasheet(  # shares: assumed
            "rtx-pro-6000", 97887 * _MIB, 1.792 * _TB, 0.80,
            (468, 936, 1871), (0.70, 0.70, 0.50), 3.0 * _US, "pcie5", 64 * _GB,
        ),
        Datasheet(  # e and t0: assumed
            "mi300x", 196288 * _MIB, 5.3 * _TB, 0.75,
            (1307, 2615, 0), (0.51, 0.50, 0), 5.0 * _US, "xgmi", 448 * _GB,
        ),
    )
}  # fmt: skip


def datasheet_of(sku: str) -> Datasheet:
    """Raises ConfigError for a device that is not known."""
    if sku not in DATASHEETS:
        raise ConfigError(f"device {sku!r} is unknown; known are {', '.join(DATASHEETS)}")
    return DATASHEETS[sku]
