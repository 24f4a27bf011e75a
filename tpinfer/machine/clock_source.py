"""The sampler of the clocks of a rank's own device."""

from typing import Any

import torch

from tpinfer.machine.clocks import ClockSampler, ClockSource, CpuClocks, GpuClocks, find_gpu
from tpinfer.machine.discover import usable_cores
from tpinfer.machine.nvml_driver import Driver, open_driver


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


def gpu_source(driver: Driver, properties: Any) -> tuple[ClockSource | None, str]:
    """The clocks of the card that torch describes by `properties`; older torch says less of it."""
    bus = getattr(properties, "pci_bus_id", None)
    number = find_gpu(driver, str(getattr(properties, "uuid", "")), bus)
    if number is None and driver.read("count") == 1:
        number = 0
    if number is None:
        return None, "torch does not say which of the driver's cards this is"
    return GpuClocks(driver, number), ""
