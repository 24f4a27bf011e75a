"""Own sums over symmetric memory against torch's, between ranks on one GPU: emulation, so that
times compare kernels with each other and say nothing about links between GPUs.

    python profiling/gpu/collectives.py --out profiling/results/gpu/collectives.json [--tp 2,4]
    [--no-mps]

Per size and kind: median us of a call in a replayed graph of 50, by device events on rank 0;
the same of the own kernel without its stamps, the difference being their cost; how long kernels
lasted by torch's profiler, against the waits that they stamped. Under a private MPS daemon, without
which ranks take turns. Without a GPU it ends with exit code 3.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import first_call  # noqa: E402
import ranks  # noqa: E402

SIZES = (8 << 10, 64 << 10, 256 << 10, 1 << 20)
CALLS, REPEATS, LIMIT_S = 50, 9, 100
GROUP = "ranks-on-one-gpu"
WIDTH = 4096


def main() -> int:
    """All ranks of each size under one MPS daemon."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "profiling/results/gpu/collectives.json")
    parser.add_argument("--tp", default="2,4")
    parser.add_argument("--no-mps", dest="mps", action="store_false")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        found = measured(args.rank, int(args.tp), args.meeting)
        if args.rank == 0:
            print("RESULT " + json.dumps(found), flush=True)
        return 0
    if not first_call.has_gpu():
        print("collectives: no GPU is visible here; run it on a machine that has one")
        return 3
    found = {"label": "emulation: no speed claim", "command": sys.argv}
    found["date"] = time.strftime("%Y-%m-%d %H:%M:%S")
    found["machine"] = first_call.part_machine(SimpleNamespace())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with ranks.private_mps(args.mps) as variables:
        found["mps"] = bool(variables)
        for size in map(int, args.tp.split(",")):
            found[f"tp {size}"] = run_ranks(size, variables)
            print(f"tp {size}: {json.dumps(found[f'tp {size}'])}", flush=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def run_ranks(size: int, variables: dict[str, str]) -> Any:
    """What rank 0 found, or the last words of a rank that failed."""
    environment = {**os.environ, **variables, "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    with tempfile.TemporaryDirectory() as meeting:
        command = [sys.executable, __file__, "--tp", str(size), "--meeting", meeting, "--rank"]
        logs = [(Path(meeting) / f"log{rank}").open("w+") for rank in range(size)]
        processes = [
            subprocess.Popen(
                [*command, str(rank)], env=environment, cwd=ROOT, stdout=logs[rank],
                stderr=subprocess.STDOUT,
            )
            for rank in range(size)
        ]  # fmt: skip
        deadline = time.monotonic() + LIMIT_S
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if any(p.poll() for p in processes):
                break
            time.sleep(0.1)
        for process in processes:
            process.kill()
            process.wait()
        texts = []
        for log in logs:
            log.seek(0)
            texts.append(log.read())
            log.close()
    for line in texts[0].splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    return {"failed": [first_call.text_tail(text, 500) for text in texts]}


def measured(rank: int, size: int, meeting: Path) -> dict[str, Any]:
    """One rank's part; every rank makes the same calls."""
    import torch
    from torch._C._distributed_c10d import PrefixStore

    from tpinfer.collectives.device_group import DeviceGroup, open_device_group
    from tpinfer.collectives.host_staged import HostStagedGroup
    from tpinfer.collectives.torch_groups import directory_store, open_gloo

    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    store = directory_store(meeting, size, 60)
    rest = HostStagedGroup(open_gloo(store, rank, size, 60), device)
    group, words, why = open_device_group(rest, PrefixStore("symmetric", store), GROUP, device)
    found: dict[str, Any] = {"uses": words, "why": why}
    if not isinstance(group, DeviceGroup) or group.one_shot is None:
        return found
    one_shot, stamps = group.one_shot, torch.zeros(1, dtype=torch.int64, device=device)
    unstamped = replace(one_shot, is_timed=False)
    weight = torch.ones(WIDTH, dtype=torch.bfloat16, device=device)
    for num_bytes in SIZES:
        t = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=device)
        rows = t.view(-1, WIDTH)
        kinds: dict[str, Callable[[], object]] = {
            "own": lambda t=t: one_shot.sum(t, stamps),
            "own without stamps": lambda t=t: unstamped.sum(t, stamps),
            **torch_kinds(t, device, GROUP),
        }
        if num_bytes > one_shot.half_bytes:
            del kinds["own"], kinds["own without stamps"]
        elif len(rows) <= 64:
            kinds["own with norm"] = lambda rows=rows: one_shot.sum_and_norm(
                rows, rows, weight, 1e-5, stamps
            )
        # In turns, so that what drifts touches all alike.
        replays = {name: graph_of(call, group) for name, call in kinds.items()}
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(REPEATS):
            for name, replay in replays.items():
                group.barrier()
                times[name].append(timed_us(replay))
        found[f"{num_bytes >> 10} KiB"] = {
            name: round(statistics.median(one), 3) for name, one in times.items()
        }
    found["stamps"] = stamped(group, device)
    group.barrier()
    return found


def torch_kinds(t: Any, device: Any, name: str) -> dict[str, Callable[[], object]]:
    """torch's ops over symmetric memory: one_shot as it would replace ours, with its copy in, and
    alone; two_shot in place."""
    import torch
    import torch.distributed._symmetric_memory as symmetric_memory

    symmetric: Any = symmetric_memory
    shared = symmetric.empty(t.numel(), dtype=t.dtype, device=device)
    symmetric.rendezvous(shared, name)
    shared.zero_()
    ops, out = torch.ops.symm_mem, torch.empty_like(t)

    def with_copy() -> None:
        shared.copy_(t)
        ops.one_shot_all_reduce_out(shared, "sum", name, t)

    return {
        "torch one_shot alone": lambda: ops.one_shot_all_reduce_out(shared, "sum", name, out),
        "torch one_shot with copy in": with_copy,
        "torch two_shot in place": lambda: ops.two_shot_all_reduce_(shared, "sum", name),
    }


def graph_of(call: Callable[[], object], group: Any) -> Callable[[], None]:
    """CALLS calls, recorded."""
    import torch

    group.barrier()
    call()
    torch.cuda.synchronize()
    group.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    torch.cuda.synchronize()
    group.barrier()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def timed_us(replay: Callable[[], None]) -> float:
    """One call's share of a replay."""
    import torch

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / CALLS


def stamped(group: Any, device: Any) -> dict[str, Any]:
    """Rank 1 comes late by a kernel of some us before every sum: what rank 0's kernels lasted by
    the profiler, and what they stamped, in us."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    count = 40
    t = torch.zeros(WIDTH, dtype=torch.bfloat16, device=device)
    group.num_stamped = 0
    group.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for number in range(count):
            if group.rank:
                torch.cuda._sleep(20_000 * (1 + number % 4))
            group.all_reduce(t)
        torch.cuda.synchronize()
    waits_us = (group.stamps[:count].cpu().double() / 1e3).tolist()
    group.num_stamped = 0
    lasted = [
        event.device_time_total
        for event in sorted(prof.events(), key=lambda event: event.time_range.start)
        if event.name.startswith("sum_parts")
    ]
    pairs = list(zip(waits_us, lasted, strict=False))
    return {
        "num": len(pairs),
        "kernel_us": [round(b, 2) for _, b in pairs[:12]],
        "stamp_us": [round(a, 2) for a, _ in pairs[:12]],
        "median_kernel_minus_stamp_us": statistics.median(b - a for a, b in pairs),
        "stamps_beyond_their_kernel": sum(a > b + 0.1 for a, b in pairs),
    }


if __name__ == "__main__":
    sys.exit(main())
