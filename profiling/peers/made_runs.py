"""Makes the runs whose truth is known, and tells what files hold: `made_runs.py make DIR` and
`made_runs.py facts OUT.json RANK0 [RANK1 ...]`. Started by tpprof_peers.py, whose own process must
stay small.

The runs are two ranks of tests/traces, in which the kernel before each collective of rank 1 takes
100 us longer: `late` with NCCL; `drift` the same, where rank 1's clock is 1.7 ms ahead and loses
85 ppm; `custom` with an all-reduce kernel of vLLM's own. `large` is one rank's recording of 200,000
events, of which nothing is known.
"""

import gzip
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "profiling")]
DEVICE = "h100-sxm-80g"
LATE_NS = 100_000
NUM_EVENTS = 200_000
US_APART = 1_000_000
"""The generator gives each rank a `baseTimeNanoseconds` of its own, this much earlier for each.
Kineto's is the same in all processes of a run, and peers rely on that."""


def make(folder: Path) -> None:
    """Write the runs, what is true of them, and the card's rates as TraceLens wants them."""
    import read_speed

    from tests.traces.kineto import KinetoStyle, write_kineto
    from tests.traces.scenario import Clock, Delay, Scenario
    from tests.traces.simulate import simulate
    from tests.traces.truth import truth_of

    late = Scenario(
        "late", num_ranks=2, num_steps=24, num_layers=16, delays=(Delay(1, LATE_NS, "kernel"),)
    )
    drift = replace(late, name="drift", clocks=(Clock(), Clock(1_700_000, -85)))
    for scenario in (late, drift, replace(late, name="custom", collective="custom")):
        name = scenario.name
        run = simulate(scenario)
        paths = write_kineto(run, folder / name, KinetoStyle())
        for rank, path in enumerate(paths):
            _to_one_base(path, rank)
        truth = truth_of(run)
        waits = list(zip(*(one.wait_ns for one in truth.collectives()), strict=True))
        moved = list(zip(*(one.transfer_ns for one in truth.collectives()), strict=True))
        walls = [truth.split(rank, *truth.whole(rank)) for rank in (0, 1)]
        true = {
            "wall_ns": [wall.wall_ns for wall in walls],
            "leaves": [wall.leaves for wall in walls],
            "wait_ns": [sum(one) for one in waits],
            "transfer_ns": [sum(one) for one in moved],
        }
        (folder / f"{name}.truth.json").write_text(json.dumps(true))
    (folder / "large").mkdir()
    plain = folder / "large.json"
    read_speed.write_kineto(plain, NUM_EVENTS)
    packed = folder / "large" / "rank0.trace.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=4))
    plain.unlink()
    (folder / "arch.json").write_text(json.dumps(_arch()))


def _to_one_base(path: Path, rank: int) -> None:
    """The same moments, counted from rank 0's base."""

    def later(found: re.Match[str]) -> str:
        return f"{found[1]}{int(found[2]) + rank * -US_APART}"

    def base(found: re.Match[str]) -> str:
        return f"{found[1]}{int(found[2]) + rank * US_APART * 1000}"

    text = gzip.decompress(path.read_bytes()).decode()
    text = re.sub(r'("ts": )(\d+)(?=\.)', later, text)
    text = re.sub(r'("baseTimeNanoseconds": )(\d+)', base, text)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=1))


def _arch() -> dict[str, Any]:
    """Attainable rates of DEVICE, the ones tpprof judges by."""
    from tpprof.cli.inputs import ceilings_of

    ceilings = ceilings_of(None, DEVICE, 2)
    assert ceilings is not None
    rates = {kind.value: rate / 1e12 for kind, rate in ceilings.flops_per_s.items()}
    memory = ceilings.memory[-1]
    matrix = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "int8": "int8"}
    return {
        "name": DEVICE,
        "mem_bw_gbps": memory.bytes_per_s / 1e9,
        "memory_gb": memory.capacity_bytes / 1e9,
        "max_achievable_tflops": {
            f"matrix_{short}": rates[long] for short, long in matrix.items() if long in rates
        },
    }


COMM_NAME = re.compile(r"nccl|rccl|cross_device_reduce", re.IGNORECASE)


def facts(paths: list[str]) -> list[dict[str, Any]]:
    """Of each rank's file, in ms and without any judgement: host from its first to its last event,
    device from its first to its last kernel, and kernels that are collectives by the recorder's
    own arguments or by name."""
    found = []
    for path in paths:
        content = Path(path).read_bytes()
        content = gzip.decompress(content) if path.endswith(".gz") else content
        events = [e for e in json.loads(content)["traceEvents"] if e.get("ph") == "X"]
        device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        host = [e for e in events if e.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime")]
        kernels = [e for e in device if e["cat"] == "kernel"]
        comm = [
            e
            for e in kernels
            if "Collective name" in e.get("args", {}) or COMM_NAME.search(e["name"])
        ]
        found.append(
            {
                "events": len(events),
                "host_ms": _span(host),
                "device_ms": _span(device),
                "busy_ms": _union(device),
                "kernels": len(kernels),
                "kernel_ms": sum(e["dur"] for e in kernels) / 1000,
                "comm": len(comm),
                "comm_ms": sum(e["dur"] for e in comm) / 1000,
                "comm_names": sorted({re.split(r"[(<]", e["name"])[0] for e in comm}),
            }
        )
    return found


def _span(events: list[dict[str, Any]]) -> float:
    if not events:
        return 0.0
    return (max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)) / 1000


def _union(events: list[dict[str, Any]]) -> float:
    """Time in which at least one of them ran."""
    total, reach = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["ts"]):
        end = event["ts"] + event["dur"]
        total += max(0.0, end - max(event["ts"], reach))
        reach = max(reach, end)
    return total / 1000


def main() -> int:
    verb, target, *paths = sys.argv[1:]
    if verb == "make":
        make(Path(target))
    else:
        Path(target).write_text(json.dumps(facts(paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
