"""DRAM bytes of a decode step's kernels by Nsight Compute, against what the cost ledger says of
their ops; and what bounds the kernels of that step and of chunks of a prompt by the counters,
against the ledger's verdict (`ncu_bounds`): some layers of Llama-3.1-8B in bfloat16, one GPU, op by
op.

    python profiling/gpu/ncu_bytes.py --out profiling/results/gpu/ncu_bytes.json [--rows 1]
    [--context 1024] [--layers 2] [--prompts 512,4096]

ncu empties the caches before every kernel, so weights and keys come from memory, as they do in a
step of a whole model; what a kernel writes may still lie in L2 at its end. Compared are ops that
move a megabyte or more: smaller ones live in L2 in a real step. Without a GPU or ncu the script
says so and ends with exit code 3.
"""

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import first_call  # noqa: E402
from ncu_bounds import DRAM_PCT, SM_PCT, TIME, bounds, op_in  # noqa: E402

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", TIME, DRAM_PCT, SM_PCT)
LEAST_AGREEMENT = 0.95
LEAST_BYTES = 1 << 20
PRODUCTS = (".qkv", ".out", ".gate_up", ".down", "head")


def main() -> int:
    """Run the step under ncu and compare; or be that run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "profiling/results/gpu/ncu_bytes.json")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cuda:0", help=argparse.SUPPRESS)
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prompts", default="512,4096", help="tokens of prompts, for bounds alone")
    parser.add_argument("--prompt", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print("RESULT " + json.dumps(run_step(args)), flush=True)
        return 0
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if not first_call.has_gpu() or ncu is None:
        print("ncu_bytes: no GPU is visible here, or no ncu; run it on a machine that has both")
        return 3
    found: dict[str, Any] = {"command": sys.argv, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    found["machine"] = first_call.part_machine(args)
    found["bounds"] = {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for prompt in (0, *map(int, filter(None, args.prompts.split(",")))):
        step, kernels, why = counted(ncu, args, prompt)
        name = f"prompt of {prompt}" if prompt else f"{args.rows} rows"
        if step is None:
            found["bounds"][name] = {"failed": why}
            print(f"ncu_bytes: {name} failed\n{why}")
            continue
        if not prompt:
            found["kernels"], found["ops"] = kernels, compared(step["bytes"], kernels)
            show(found["ops"])
        found["bounds"][name] = one = bounds(kernels, step["bounds"])
        if one["agree"] is not None:
            print(f"{name}: ledger and counters agree on {100 * one['agree']:.1f} % of "
                  f"{one['us']:.0f} us in ops (asked: {100 * LEAST_AGREEMENT:.0f})")  # fmt: skip
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found.get("ops") else 1


def counted(
    ncu: str, args: argparse.Namespace, prompt: int
) -> tuple[dict[str, Any] | None, list[dict[str, Any]], str]:
    """(what the run says of its ops, its kernels' counters, why there are none) of one step."""
    command = [ncu, "--profile-from-start", "off", "--csv", "--print-units", "base", "--nvtx"]
    command += ["--print-nvtx-rename", "kernel", "--metrics", ",".join(METRICS)]
    command += [sys.executable, __file__, "--step", "--prompt", str(prompt)]
    command += ["--rows", str(args.rows), "--context", str(args.context)]
    done = subprocess.run(
        [*command, "--layers", str(args.layers)], capture_output=True, text=True, cwd=ROOT
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not told:
        return None, [], f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return json.loads(told[0].removeprefix("RESULT ")), kernels_of(done.stdout), ""


def show(ops: dict[str, Any]) -> None:
    """A line per op."""
    for op, one in ops.items():
        print(f"{op:<28} ledger {one['ledger'] / 1e6:9.2f} MB  DRAM {one['dram'] / 1e6:9.2f} MB  "
              f"{one['dram'] / one['ledger']:.3f}  {one['kernel']}")  # fmt: skip


def run_step(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By the ledger, op -> bytes and op -> what bounds it, of the one step that ncu sees."""
    import torch

    from tpinfer.config.dtypes import DType
    from tpinfer.config.engine import EngineConfig
    from tpinfer.config.model_name import model_directory
    from tpinfer.costs.bound import classify
    from tpinfer.launching.seat import Seat
    from tpinfer.machine.probe import probe_ceilings
    from tpinfer.worker.assemble import assemble

    device = torch.device(args.device)
    config = EngineConfig(
        model_dir=model_directory("shape:llama-3.1-8b"), load_format="random", dtype=DType.BFLOAT16,
        num_layers_override=args.layers, max_num_seqs=args.rows,
        device="cpu" if device.type == "cpu" else "cuda",
        max_model_len=max(args.context, args.prompt) + 64,
        max_num_batched_tokens=max(512, args.rows, args.prompt),
        cuda_graphs=False,
        kv_bytes=256 << 20,  # ncu copies all that a kernel may write before it repeats the kernel
    )  # fmt: skip
    seat = Seat(0, 1, 0, 1, args.device, "run-ncu", 0, "single")
    assembly = assemble(config, seat, lambda text: None)
    worker = assembly.worker
    make = prompt_plans if args.prompt else decode_plans
    plans = make(args, assembly.limits.block_size)
    worker.annotate(nvtx_range if device.type == "cuda" else None)
    for step, (records, plan) in enumerate(plans):
        for record in records:
            worker.admit(record)
        if step == len(plans) - 1:
            profiled(device, "cudaProfilerStart")
        result = worker.execute(plan)
        assert result.failure is None, result.failure
    profiled(device, "cudaProfilerStop")
    sums = worker.take_measurements().records[-1].aggregates
    ceilings = probe_ceilings(assembly.group, (DType.BFLOAT16,), budget_s=0.3, device=device)
    ledger, level = assembly.ledger(0), ceilings.memory[-1]  # ncu empties the caches
    costs = {op: ledger.cost(op, sums) for op in ledger.op_ids()}
    return {
        "bytes": {op: float(cost.bytes_moved) for op, cost in costs.items()},
        "bounds": {
            op: classify(ledger.kind(op), cost, DType.BFLOAT16, level, ceilings).leaf
            for op, cost in costs.items()
        },
    }


def decode_plans(args: argparse.Namespace, block: int) -> list[Any]:
    """Four steps of rows that each feed one token behind their context."""
    from tpinfer.steps.plan import SamplingRecord, SequenceRecord, StepPlan

    each = -(-(args.context + 32) // block)
    rows = tuple(range(args.rows))
    records = [
        SequenceRecord(
            row, tuple((7 * row + place) % 1000 for place in range(args.context)), args.context,
            args.context - 1, SamplingRecord(0.0),
        )
        for row in rows
    ]  # fmt: skip
    blocks = tuple((row, *range(row * each, (row + 1) * each)) for row in rows)
    ones = (1,) * args.rows
    plans = [StepPlan(i, rows, ones, ones, new_blocks=() if i else blocks) for i in range(4)]
    return [([] if i else records, plan) for i, plan in enumerate(plans)]


def prompt_plans(args: argparse.Namespace, block: int) -> list[Any]:
    """One prompt, twice: the first time warms up what is compiled and tuned."""
    from tpinfer.steps.plan import SamplingRecord, SequenceRecord, StepPlan

    count = args.prompt
    tokens = tuple(place % 1000 for place in range(count))
    record = SequenceRecord(0, tokens, count, 0, SamplingRecord(0.0))
    blocks = ((0, *range(-(-(count + 32) // block))),)
    return [([record], StepPlan(i, (0,), (count,), (1,), new_blocks=blocks)) for i in range(2)]


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """By torch's own calls, which need no package beside it."""
    import torch

    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def profiled(device: Any, call: str) -> None:
    """Begin or end what ncu looks at."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        runtime: Any = torch.cuda.cudart()
        getattr(runtime, call)()


def kernels_of(text: str) -> list[dict[str, Any]]:
    """Name, bytes and ns of each kernel, in order of launch."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[first:]))):
        if not (row["ID"] or "").isdigit():
            continue
        one = found.setdefault(row["ID"], {"name": row["Kernel Name"][:60]})
        one["op"] = op_in([text for text in row.values() if isinstance(text, str)])
        one[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return list(found.values())


def compared(ledger: dict[str, float], kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """Products and attention in the program's order, with the kernels in theirs."""
    ops = [op for op in ledger if op.endswith((*PRODUCTS, ".core"))]
    large = [one for one in kernels if one["dram__bytes_read.sum"] >= LEAST_BYTES]
    found: dict[str, Any] = {}
    for op in ops:
        if ledger[op] < LEAST_BYTES or not large:
            continue
        one = large.pop(0)
        dram = one["dram__bytes_read.sum"] + one["dram__bytes_write.sum"]
        found[op] = {
            "ledger": ledger[op], "dram": dram, "kernel": one["name"],
            "us": one["gpu__time_duration.sum"] / 1e3,
        }  # fmt: skip
    if large:
        print(f"{len(large)} large kernels are left over: {[one['name'] for one in large]}")
    return found


if __name__ == "__main__":
    sys.exit(main())
