"""DRAM bytes of a decode step's kernels by Nsight Compute, against what the cost ledger says of
their ops: some layers of Llama-3.1-8B in bfloat16, one GPU, op by op.

    python profiling/gpu/ncu_bytes.py --out profiling/results/gpu/ncu_bytes.json [--rows 1]
    [--context 1024] [--layers 2]

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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import first_call  # noqa: E402

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
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
    args = parser.parse_args()
    if args.step:
        print("RESULT " + json.dumps(run_step(args)), flush=True)
        return 0
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if not first_call.has_gpu() or ncu is None:
        print("ncu_bytes: no GPU is visible here, or no ncu; run it on a machine that has both")
        return 3
    command = [ncu, "--profile-from-start", "off", "--csv", "--print-units", "base"]
    command += ["--metrics", ",".join(METRICS), sys.executable, __file__, "--step"]
    command += ["--rows", str(args.rows), "--context", str(args.context)]
    done = subprocess.run(
        [*command, "--layers", str(args.layers)], capture_output=True, text=True, cwd=ROOT
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not told:
        print(f"ncu_bytes: the run failed\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
        return 1
    found: dict[str, Any] = {"command": sys.argv, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    found["machine"] = first_call.part_machine(SimpleNamespace())
    kernels = kernels_of(done.stdout)
    found["kernels"] = kernels
    found["ops"] = compared(json.loads(told[0].removeprefix("RESULT ")), kernels)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for op, one in found["ops"].items():
        print(f"{op:<28} ledger {one['ledger'] / 1e6:9.2f} MB  DRAM {one['dram'] / 1e6:9.2f} MB  "
              f"{one['dram'] / one['ledger']:.3f}  {one['kernel']}")  # fmt: skip
    return 0


def run_step(args: argparse.Namespace) -> dict[str, float]:
    """Op -> bytes by the ledger, of the one step that ncu sees."""
    import torch

    from tpinfer.config.dtypes import DType
    from tpinfer.config.engine import EngineConfig
    from tpinfer.config.model_name import model_directory
    from tpinfer.launching.seat import Seat
    from tpinfer.steps.plan import SamplingRecord, SequenceRecord, StepPlan
    from tpinfer.worker.assemble import assemble

    device = torch.device(args.device)
    config = EngineConfig(
        model_dir=model_directory("shape:llama-3.1-8b"), load_format="random", dtype=DType.BFLOAT16,
        num_layers_override=args.layers, max_num_seqs=args.rows,
        device="cpu" if device.type == "cpu" else "cuda",
        max_model_len=args.context + 64, max_num_batched_tokens=max(512, args.rows),
        cuda_graphs=False,
    )  # fmt: skip
    seat = Seat(0, 1, 0, 1, args.device, "run-ncu", 0, "single")
    assembly = assemble(config, seat, lambda text: None)
    worker, block = assembly.worker, assembly.limits.block_size
    each = -(-(args.context + 32) // block)
    rows = tuple(range(args.rows))
    for row in rows:
        tokens = tuple((7 * row + place) % 1000 for place in range(args.context))
        record = SequenceRecord(row, tokens, args.context, args.context - 1, SamplingRecord(0.0))
        worker.admit(record)
    blocks = tuple((row, *range(row * each, (row + 1) * each)) for row in rows)
    for step in range(4):
        plan = StepPlan(
            step, rows, (1,) * args.rows, (1,) * args.rows, new_blocks=() if step else blocks
        )
        if step == 3:
            profiled(device, "cudaProfilerStart")
        result = worker.execute(plan)
        assert result.failure is None, result.failure
    profiled(device, "cudaProfilerStop")
    aggregates = worker.take_measurements().records[-1].aggregates
    ledger = assembly.ledger(0)
    return {op: float(ledger.cost(op, aggregates).bytes_moved) for op in ledger.op_ids()}


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
