"""Everything to learn in the first minutes on a lone GPU, in one run. Writes JSON and small
fixtures; changes no setting.

    python profiling/gpu/first_call.py --out profiling/results/gpu [--probe PATH/probe_gpu.py]
    [--budget-s 540]

Parts run one after the other, each in its own process with its own time limit, so that one
failure costs only itself: what is left of the budget goes to the next. Every number names what
was measured and how. Without a GPU the script says so and ends with exit code 3.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PART_LIMITS_S = {
    "machine": 20,
    "bandwidth": 40,
    "matmul": 60,
    "floors": 40,
    "nvml": 20,
    "clocks": 40,
    "ranks": 200,
    "generate": 120,
    "trace": 60,
    "ncu": 90,
}
"""Parts in order, and the most each may take."""


def main() -> int:
    """Run all parts (or, with --part, one of them in this process)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "profiling" / "results" / "gpu")
    parser.add_argument("--probe", type=Path, help="probe_gpu.py: several ranks on one card")
    parser.add_argument("--nccl", type=Path, help="libnccl.so.2 >= 2.30 for the probe")
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--only", help="comma-separated parts")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print("RESULT " + json.dumps(PARTS[args.part](args)), flush=True)
        return 0
    if not has_gpu():
        print("first_call: no GPU is visible here; run it on a machine that has one")
        return 3
    args.out.mkdir(parents=True, exist_ok=True)
    results = run_parts(args)
    target = args.out / f"first_call-{time.strftime('%Y%m%d-%H%M%S')}.json"
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {target}")
    return 0


def run_parts(args: argparse.Namespace) -> dict[str, object]:
    """Each part in a process of its own; what it prints behind RESULT is its outcome."""
    deadline = time.monotonic() + args.budget_s
    chosen = args.only.split(",") if args.only else list(PARTS)
    results: dict[str, object] = {"command": sys.argv, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    for part in chosen:
        limit_s = min(PART_LIMITS_S[part], deadline - time.monotonic())
        if limit_s < 5:
            results[part] = {"skipped": "the time budget is spent"}
            continue
        began = time.monotonic()
        results[part] = run_part(part, args, limit_s)
        print(
            f"{part}: {time.monotonic() - began:.1f} s {json.dumps(results[part])[:300]}",
            flush=True,
        )
    return results


def run_part(part: str, args: argparse.Namespace, limit_s: float) -> object:
    """One part under its time limit."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--part",
        part,
        "--out",
        str(args.out),
    ]
    for flag in ("probe", "nccl"):
        if getattr(args, flag):
            command += [f"--{flag}", str(getattr(args, flag))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, cwd=ROOT)
    except subprocess.TimeoutExpired as late:
        return {"timeout_s": limit_s, "tail": text_tail(late.stdout)}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    return {"exit": done.returncode, "tail": text_tail(done.stdout) + text_tail(done.stderr)}


def text_tail(output: str | bytes | None, size: int = 1500) -> str:
    """The end of what a process printed."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return text[-size:]


def has_gpu() -> bool:
    """Whether nvidia-smi lists a device."""
    if not shutil.which("nvidia-smi"):
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def median_us(call: Callable[[], object], repeats: int = 30, inner: int = 1) -> float:
    """Median device time of `call` between two events, in us; `inner` calls a sample."""
    import torch

    for _ in range(5):
        call()
    samples = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            call()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) * 1e3 / inner)
    return sorted(samples)[len(samples) // 2]


def part_machine(args: argparse.Namespace) -> dict[str, object]:
    """Versions and the device, so that every other number has an address."""
    import torch
    import triton

    props = torch.cuda.get_device_properties(0)
    query = "name,driver_version,clocks.max.mem,clocks.max.sm,pcie.link.gen.max,pcie.link.width.max"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "nccl": list(torch.cuda.nccl.version()),
        "smi": smi.stdout.strip(),
        "num_sms": props.multi_processor_count,
        "memory_bytes": props.total_memory,
        "l2_bytes": props.L2_cache_size,
    }


def part_bandwidth(args: argparse.Namespace) -> dict[str, object]:
    """Copy (read + write counted) and read-only bandwidth over buffers far beyond L2, on random
    values."""
    import torch

    num_bytes = 4 << 30
    source = torch.empty(num_bytes // 4, device="cuda").uniform_()
    target = torch.empty_like(source)
    copy_us = median_us(lambda: target.copy_(source), 15)
    read_us = median_us(lambda: source.sum(), 15)
    vector = torch.randn(8192, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(28672, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    turn = iter(range(1 << 30))
    gemv_us = median_us(lambda: torch.mv(weights[next(turn) % 4], vector), 40)
    return {
        "copy_gbps": 2 * num_bytes / copy_us / 1e3,
        "read_gbps": num_bytes / read_us / 1e3,
        "gemv_bf16_28672x8192_gbps": weights[0].numel() * 2 / gemv_us / 1e3,
    }


def part_matmul(args: argparse.Namespace) -> dict[str, object]:
    """Dense matrix rates: bf16 over thinness, and row-scaled fp8 at 8192 cubed."""
    import torch

    found: dict[str, object] = {}
    size = 8192
    weight = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for rows in (1, 4, 16, 64, 256, 1024, size):
        tokens = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
        spent_us = median_us(lambda tokens=tokens: tokens @ weight.t(), 20)
        found[f"bf16_m{rows}"] = {
            "us": spent_us,
            "tflops": 2 * rows * size * size / spent_us / 1e6,
            "weight_gbps": size * size * 2 / spent_us / 1e3,
        }
    left = torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn)
    right = torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn).t()
    ones = torch.ones(size, 1, device="cuda")
    spent_us = median_us(
        lambda: torch._scaled_mm(
            left, right, ones, ones.t().contiguous(), out_dtype=torch.bfloat16
        ),
        20,
    )
    found["fp8_8192"] = {"us": spent_us, "tflops": 2 * size**3 / spent_us / 1e6}
    return found


def part_floors(args: argparse.Namespace) -> dict[str, object]:
    """Least times: an eager launch, a graph node, an event pair, the global timer's tick."""
    import torch

    sys.path.insert(0, str(HERE))
    from read_timer import read_timer

    small = torch.zeros(1024, device="cuda")
    eager_us = median_us(lambda: small.add_(1), 50, inner=200)
    began = time.perf_counter()
    for _ in range(2000):
        small.add_(1)
    issue_us = (time.perf_counter() - began) / 2000 * 1e6
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(1000):
            small.add_(1)
    node_us = median_us(graph.replay, 20) / 1000

    stamps = torch.zeros(4096, dtype=torch.int64, device="cuda")
    read_timer[(1,)](stamps, 4096)
    steps = stamps.diff()
    ticks = steps[steps > 0]
    return {
        "eager_kernel_us": eager_us,
        "host_issue_us": issue_us,
        "graph_node_us": node_us,
        "globaltimer_tick_ns": int(ticks.min()) if ticks.numel() else None,
    }


def part_nvml(args: argparse.Namespace) -> dict[str, object]:
    """Every NVML reading that topology discovery will use; a field that fails says why."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    calls = {
        "name": lambda: pynvml.nvmlDeviceGetName(handle),
        "uuid_prefix": lambda: pynvml.nvmlDeviceGetUUID(handle)[:4],
        "memory": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        "bus_width_bits": lambda: pynvml.nvmlDeviceGetMemoryBusWidth(handle),
        "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "pcie_gen": lambda: pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
        "pcie_width": lambda: pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle),
        "mig_mode": lambda: pynvml.nvmlDeviceGetMigMode(handle),
        "throttle_reasons": lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        "nvlinks": lambda: [pynvml.nvmlDeviceGetNvLinkState(handle, i) for i in range(18)],
        "numa": lambda: pynvml.nvmlDeviceGetNumaNodeId(handle),
    }
    found: dict[str, object] = {}
    for name, call in calls.items():
        try:
            found[name] = call()
        except (pynvml.NVMLError, AttributeError) as error:
            found[name] = repr(error)
    pynvml.nvmlShutdown()
    return found


def part_clocks(args: argparse.Namespace) -> dict[str, object]:
    """What the driver tells of clocks, power and throttling while matrices are multiplied."""
    sys.path.insert(0, str(HERE))
    from clock_fields import clocks_under_load

    return clocks_under_load(2.0)


def part_ranks(args: argparse.Namespace) -> dict[str, object]:
    """Several ranks on one card, by the routes the probe script knows."""
    if not args.probe or not args.probe.exists():
        return {"skipped": "no probe script; pass --probe PATH/probe_gpu.py"}
    command = [sys.executable, str(args.probe), "--timeout", "25"]
    if args.nccl:
        command += ["--nccl", str(args.nccl)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return {"exit": done.returncode, "cases": [json.loads(line) for line in lines]}


def part_generate(args: argparse.Namespace) -> dict[str, object]:
    """Greedy bf16 tokens of the embedded model on the GPU against transformers', and the run's
    own split."""
    import torch
    import transformers

    from tpinfer.embedded.locate import embedded_model

    directory, out = embedded_model(), args.out / "generate.jsonl"
    prompts = [[0, 300 + i, 400, 500 + i] for i in range(4)]
    source = args.out / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt_token_ids": p}) + "\n" for p in prompts))
    command = [sys.executable, "-m", "tpinfer", "generate", "--model", str(directory), "--tp", "1"]
    command += [
        "--prompts",
        str(source),
        "--max-tokens",
        "32",
        "--temperature",
        "0",
        "--ignore-eos",
    ]
    command += ["--dtype", "bfloat16", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"exit": done.returncode, "tail": text_tail(done.stderr)}
    ours = [json.loads(line) for line in out.read_text().splitlines()]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16
    ).cuda()
    agreements = []
    for prompt, line in zip(prompts, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt], device="cuda"),
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        agreements.append(sum(a == b for a, b in zip(theirs, line["token_ids"], strict=True)) / 32)
    return {
        "token_agreement": agreements,
        "timing": ours[0]["timing"],
        "attribution": ours[0]["attribution"],
    }


def part_trace(args: argparse.Namespace) -> dict[str, object]:
    """A small Kineto trace of the same three-layer step, eager and as a graph replay, kept as
    fixtures."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    size = 1024
    weights = [torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    tokens = torch.randn(4, size, device="cuda", dtype=torch.bfloat16)

    def step() -> torch.Tensor:
        hidden = tokens
        for weight in weights:
            hidden = torch.nn.functional.silu(
                torch.nn.functional.rms_norm(hidden @ weight, (size,))
            )
        return hidden

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    found: dict[str, object] = {}
    for form, call in (("eager", step), ("graph", graph.replay)):
        with profile(
            activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True
        ) as prof:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
        target = args.out / f"trace-{form}.json"
        prof.export_chrome_trace(str(target))
        kernels = [e for e in prof.events() if str(e.device_type).endswith("CUDA")]
        found[form] = {"file": target.name, "num_kernels": len(kernels)}
    return found


NCU_PROGRAM = """
import torch
weight = torch.randn(28672, 8192, device="cuda", dtype=torch.bfloat16)
vector = torch.randn(8192, device="cuda", dtype=torch.bfloat16)
x = torch.randn(4096, 8192, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
torch.cuda.profiler.start()
torch.mv(weight, vector)
torch.nn.functional.silu(x)
x @ weight.t()
torch.cuda.synchronize()
torch.cuda.profiler.stop()
"""
"""A GEMV over 470 MB of weights, an elementwise op (67 MB in, 67 MB out) and a GEMM."""


def part_ncu(args: argparse.Namespace) -> dict[str, object]:
    """DRAM bytes of three kernels by hardware counter, to hold the cost ledger's bytes against."""
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not Path(ncu).exists():
        return {"skipped": "ncu is not installed"}
    metrics = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--metrics", metrics]
    command += ["--csv", sys.executable, "-c", NCU_PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith('"')]
    expected = {
        "mv": {"read": 28672 * 8192 * 2, "write": 28672 * 2},
        "silu": {"read": 4096 * 8192 * 2, "write": 4096 * 8192 * 2},
        "matmul": {"read": (28672 + 4096) * 8192 * 2, "write": 4096 * 28672 * 2},
    }
    return {
        "exit": done.returncode,
        "csv": rows,
        "ledger_bytes": expected,
        "tail": text_tail(done.stderr, 400),
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, object]]] = {
    "machine": part_machine,
    "bandwidth": part_bandwidth,
    "matmul": part_matmul,
    "floors": part_floors,
    "nvml": part_nvml,
    "clocks": part_clocks,
    "ranks": part_ranks,
    "generate": part_generate,
    "trace": part_trace,
    "ncu": part_ncu,
}


if __name__ == "__main__":
    sys.exit(main())
