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
    flops_per_s: dict[str, float]
    """Attainable, by format."""
    kernel_floor_s: float
    fabric: str
    """Key of `planner.fabrics`: how a host's devices are joined."""
    link_bytes_per_s: float

    def device(self) -> DeviceTimes:
        """As a step model wants it."""
        level = MemoryLevel("HBM", int(self.memory_bytes), self.bytes_per_s * self.memory_share)
        return DeviceTimes((level,), self.flops_per_s, self.kernel_floor_s, f"catalogue {self.sku}")


def _flops(bf16: float, fp8: float = 0.0, fp4: float = 0.0) -> dict[str, float]:
    """Attainable rates from those of three formats, in TFLOPS; 0 where the device has no such
    units."""
    rates: dict[str, float] = {DType.BFLOAT16: bf16, DType.FLOAT16: bf16, DType.FLOAT32: bf16 / 12}
    if fp8:
        rates[DType.FLOAT8_E4M3] = fp8
    if fp4:
        rates["fp4"] = fp4
    return {name: rate * 1e12 for name, rate in rates.items()}


MIB = 2.0**20
DATASHEETS = {
    one.sku: one
    for one in (
        Datasheet("a100-sxm-80g", 81920 * MIB, 2.039e12, 0.69, _flops(312 * 0.73), 5.7e-6, "nvlink3", 300e9),
        Datasheet("h100-sxm-80g", 81559 * MIB, 3.35e12, 0.83, _flops(989 * 0.78, 1979 * 0.73), 3.7e-6, "nvlink4", 450e9),
        Datasheet("h200-sxm", 143771 * MIB, 4.8e12, 0.80, _flops(989 * 0.77, 1979 * 0.73), 4.0e-6, "nvlink4", 450e9),
        Datasheet("gh200-96g", 97871 * MIB, 4.0e12, 0.82, _flops(989 * 0.78, 1979 * 0.73), 3.7e-6, "nvlink4", 450e9),
        Datasheet("b200-sxm", 183359 * MIB, 7.7e12, 0.76, _flops(2250 * 0.70, 4500 * 0.70, 9000 * 0.60), 3.6e-6, "nvlink5", 900e9),
        Datasheet("gb200", 189471 * MIB, 8.0e12, 0.76, _flops(2500 * 0.70, 5000 * 0.70, 10000 * 0.60), 3.6e-6, "nvlink5", 900e9),
        Datasheet("l40s", 46068 * MIB, 0.864e12, 0.82, _flops(362 * 0.58, 733 * 0.58), 3.0e-6, "pcie4", 32e9),
        Datasheet("rtx-4090", 24564 * MIB, 1.008e12, 0.85, _flops(165 * 0.8, 330 * 0.8), 3.0e-6, "pcie4", 32e9),
        Datasheet("rtx-pro-6000", 97887 * MIB, 1.792e12, 0.80, _flops(468 * 0.7, 936 * 0.7, 1871 * 0.6), 3.0e-6, "pcie5", 64e9),
        Datasheet("mi300x", 196288 * MIB, 5.3e12, 0.75, _flops(668, 1300), 5.0e-6, "xgmi", 448e9),
    )
}
