"""What a real driver tells of a GPU's clocks under load, and what asking costs. Changes no setting.

    python profiling/gpu/clock_fields.py [--seconds 2] [--json FILE]

Samples as `--profile` and `topo probe` do, every 20 ms, while bf16 matrices of 8192 are multiplied.
Prints per field how many samples had it with their least, median and most; the reasons; the time of
one read, field by field; and how many small launches a second the host issues with the sampler on
and off, in turns. Without a GPU it says so and ends with exit code 3.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from tpinfer.config.clock_samples import ClockSamples, describe_reasons
from tpinfer.machine.clock_source import sampler_of, source_of
from tpinfer.machine.nvml_driver import open_driver

FIELDS = (
    "compute_clock_now_mhz", "memory_clock_now_mhz", "compute_clock_mhz", "memory_clock_mhz",
    "clock_reasons", "power_mw", "power_limit_mw", "temperature_c",
)  # fmt: skip
SIZE = 8192
READS = 50


def main() -> int:
    """Print the findings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("clock_fields: no GPU is visible here; run it on a machine that has one")
        return 3
    found = clocks_under_load(args.seconds)
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


def clocks_under_load(seconds: float) -> dict[str, object]:
    """Everything that the module's text says, of device 0."""
    device = torch.device("cuda", 0)
    source, why = source_of(device)
    if source is None:
        return {"error": why}
    left, right = (torch.randn(SIZE, SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    sampler, _ = sampler_of(device)
    assert sampler is not None, "the source is there"
    num_done, began = 0, time.monotonic()
    with sampler:
        while time.monotonic() - began < seconds:
            for _ in range(10):
                left @ right
            num_done += 10
            torch.cuda.synchronize(device)
    spent = time.monotonic() - began
    samples = sampler.samples()
    return {
        "device": samples.device,
        "limits": {
            "most_compute_mhz": samples.most_compute_mhz,
            "most_memory_mhz": samples.most_memory_mhz,
            "power_limit_w": samples.power_limit_w,
        },
        "bf16_tflops": round(2 * SIZE**3 * num_done / spent / 1e12, 1),
        **describe(samples),
        "read_us": round(median_us(source.read), 1),
        "field_us": cost_of_fields(),
        "launches_per_s": launches(device),
    }


def describe(samples: ClockSamples) -> dict[str, object]:
    """Per column what was there."""
    gaps = [b - a for a, b in zip(samples.monotonic_ns, samples.monotonic_ns[1:], strict=False)]
    columns = {
        name: spread(getattr(samples, name))
        for name in ("compute_mhz", "memory_mhz", "power_w", "temperature_c")
    }
    said = Counter("+".join(names) for names in samples.reasons if names is not None)
    return {
        "num_samples": len(samples),
        "num_busy": len(samples.busy()),
        "period_ms": round(statistics.median(gaps) / 1e6, 2) if gaps else None,
        "columns": columns,
        "reasons": dict(said),
        "reasons_in_words": describe_reasons(samples.reasons_seen()),
    }


def spread(column: list[float | None]) -> dict[str, float | int]:
    """Least, median and most of the samples that have the field, and how many do."""
    known = [value for value in column if value is not None]
    if not known:
        return {"known": 0}
    return {
        "known": len(known),
        "least": min(known),
        "median": statistics.median(known),
        "most": max(known),
    }


def cost_of_fields() -> dict[str, object]:
    """Value and time in us of each field of the driver; None where it does not say."""
    driver, why = open_driver()
    if driver is None:
        return {"error": why}
    try:
        return {
            field: {
                "value": driver.read(field, 0),
                "us": round(median_us(lambda field=field: driver.read(field, 0)), 1),
            }
            for field in FIELDS
        }
    finally:
        driver.close()


def median_us(call: Callable[[], object]) -> float:
    """Median time of a call on the host."""
    times = []
    for _ in range(READS):
        began = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - began)
    return statistics.median(times) / 1e3


def launches(device: torch.device) -> dict[str, list[int]]:
    """Small launches a second that this host issues, without and with a sampler, three turns."""
    small = torch.zeros(1024, device=device)
    found: dict[str, list[int]] = {"without": [], "with": []}
    for _ in range(3):
        for name, counts in found.items():
            sampler = sampler_of(device)[0] if name == "with" else None
            if sampler is not None:
                sampler.start()
            began = time.perf_counter()
            for _ in range(20_000):
                small.add_(1)
            torch.cuda.synchronize(device)
            counts.append(round(20_000 / (time.perf_counter() - began)))
            if sampler is not None:
                sampler.stop()
    return found


if __name__ == "__main__":
    sys.exit(main())
