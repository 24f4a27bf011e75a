"""The sampler of the clocks of a rank's own device."""

import torch

from tpinfer.machine.clocks import ClockSampler, ClockSource, CpuClocks, gpu_source
from tpinfer.machine.discover import usable_cores
from tpinfer.machine.nvml_driver import open_driver


def sampler_of(device: torch.device, rank: int = 0) -> tuple[ClockSampler | None, str]:
    """(a sampler of `device`, not started; why there is none)."""
    source, why = source_of(device)
    return (None if source is None else ClockSampler(source, rank)), why


def source_of(device: torch.device) -> tuple[ClockSource | None, str]:
    """(what tells the clocks of `device`, why nothing does)."""
    if device.type != "cuda":
        cores = CpuClocks(usable_cores())
        if cores.says_something:
            return cores, ""
        return None, "the kernel shows no cpufreq and no thermal_throttle files here"
    driver, why = open_driver()
    if driver is None:
        return None, why
    return gpu_source(driver, torch.cuda.get_device_properties(device))
