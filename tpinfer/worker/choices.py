"""What is decided for this machine, in one frozen record with the reason behind each choice.

`choose_execution` is pure: the same configuration and machine give the same choices.
"""

from dataclasses import dataclass

from tpinfer.config.dtypes import DType
from tpinfer.config.engine import EngineConfig
from tpinfer.config.errors import ConfigError
from tpinfer.config.model import ModelSpec
from tpinfer.machine.discover import Machine


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class ExecutionChoices:
    """How one run computes."""

    device_type: str
    """`cpu` or `cuda`."""
    compute_dtype: DType
    kv_dtype: DType
    num_threads: int
    """CPU threads of each rank's tensor ops."""
    reasons: tuple[Choice, ...]

    def explain(self) -> list[str]:
        """One line per choice, for people."""
        width = max(len(choice.name) for choice in self.reasons)
        return [f"{c.name:<{width}}  {c.value}  ({c.reason})" for c in self.reasons]


def choose_execution(
    config: EngineConfig, spec: ModelSpec, machine: Machine, ranks_per_host: int
) -> ExecutionChoices:
    """Decide device, dtype and threads. Raises ConfigError for a device the machine lacks."""
    device, device_reason = _device(config, machine)
    dtype, dtype_reason = _dtype(config, spec, machine, device)
    cores = machine.num_cores
    threads = max(1, cores // ranks_per_host)
    return ExecutionChoices(
        device_type=device,
        compute_dtype=dtype,
        kv_dtype=dtype,
        num_threads=threads,
        reasons=(
            Choice("device", device, device_reason),
            Choice("dtype", dtype.value, dtype_reason),
            Choice("KV dtype", dtype.value, "the compute dtype"),
            Choice("threads", str(threads), f"{cores} usable cores over {ranks_per_host} ranks"),
        ),
    )


def _device(config: EngineConfig, machine: Machine) -> tuple[str, str]:
    if config.device == "cuda" and not machine.gpus:
        raise ConfigError("--device cuda: no GPU is visible here; use --device cpu or check the driver")
    if config.device != "auto":
        return config.device, "asked for"
    if machine.gpus:
        return "cuda", f"{len(machine.gpus)} GPU(s) visible"
    return "cpu", "no GPU visible"


def _dtype(config: EngineConfig, spec: ModelSpec, machine: Machine, device: str) -> tuple[DType, str]:
    if config.dtype is not None:
        return config.dtype, "asked for"
    if device == "cpu" and "avx512_bf16" not in machine.cpu_flags:
        return DType.FLOAT32, "this CPU has no AVX512_BF16, where 16-bit matmuls are slower than float32"
    if spec.dtype in (DType.BFLOAT16, DType.FLOAT16):
        return spec.dtype, "the checkpoint's"
    return DType.BFLOAT16 if device == "cuda" else spec.dtype, "for a float32 checkpoint"
