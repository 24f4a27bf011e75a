"""What is fitted per (device, engine, precision), as one small record that JSON can carry."""

from dataclasses import dataclass

import msgspec

from tpinfer.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Traits:
    """Factors on the machine's own rates, and what the host adds.

    The defaults change nothing about the machine and are what an engine of good make does: times
    of kernels inside one captured graph, half a millisecond of host work a step.
    """

    name: str = "datasheet"
    """Such as `h100-sxm-80g/vllm/fp8`."""
    mode: str = "datasheet"
    """`datasheet`, `probe` or `calibrated`: where the numbers come from."""
    memory: float = 1.0
    """Factor on the memory rate of linears and of small ops."""
    compute: float = 1.0
    """Factor on the arithmetic rate of linears."""
    kv_read: float = 1.12
    """Factor on the memory rate where attention reads keys and values: long, even reads."""
    attention: float = 0.7
    """Part of the bfloat16 rate that attention over long prompts reaches."""
    kernel_floor: float = 1.0
    """Factor on the least time of a kernel."""
    collective: float = 1.0
    """Factor on the time of every collective."""
    host_step_s: float = 0.5e-3
    """Host time of a step that the device waits for."""
    host_row_s: float = 5e-6
    """The same for each row of a step."""
    host_is_all: bool = False
    """Whether host times are all that the host does, of which steps planned ahead hide what fits
    behind the device; else they are what the device waits for."""
    reserved_bytes: float = 0.6e9
    """Of a device's memory, what driver, collectives and the engine's own buffers keep."""
    overlap_power: float = 2.0
    """How memory and arithmetic of a kernel overlap: large for fully, 1 for not at all. The same
    for all published groups; a fit of 1, 2, 3 or 6 to them is best at 1.5 to 2."""
    collectives_of: str = "nccl"
    """Engine whose all-reduce was at work, as `planner.fabrics` names it; counts on known fabrics
    that were not measured."""
    kv: str = "auto"
    """Format of the cache where the measured engines' was fitted: `bf16` or `fp8`; `auto` for
    what the engine does by default."""
    interval: tuple[float, float] = (0.12, 0.2)
    """How far a measurement may lie below and above a prediction in 80 of 100 cases, relative to
    the prediction. The defaults are those of NVIDIA cards in published runs; profiling/results has
    the figures."""
    origin: str = "assumed"
    """What the numbers rest on, for people."""


def write_traits(traits: Traits) -> str:
    """As JSON."""
    return msgspec.json.format(msgspec.json.encode(traits), indent=2).decode()


def read_traits(text: str, source: str) -> Traits:
    """From JSON; `source` names the file in errors. Raises ConfigError."""
    try:
        found = msgspec.json.decode(text, type=Traits)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{source}: {error}; write it with `tpinfer plan calibrate` again"
        ) from error
    if found.overlap_power < 1:
        raise ConfigError(f"{source}: overlap_power is {found.overlap_power}; it must be 1 or more")
    for name in ("memory", "compute", "kv_read", "attention", "kernel_floor", "collective"):
        if not getattr(found, name) > 0:
            raise ConfigError(f"{source}: {name} is {getattr(found, name)}; it must be above 0")
    return found
