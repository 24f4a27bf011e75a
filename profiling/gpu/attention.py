"""The paged attention kernel on a GPU: held against plain torch over shapes, then how fast it
reads and computes; and prompts by it and by the libraries that are installed, each with its error.

    python profiling/gpu/attention.py --out profiling/results/gpu/attention.json [--budget-s 240]
    [--only prompts]

Bandwidth counts keys and values alone, of 32 query and 8 KV heads of 128; rates of prompts count
4 x heads x dim x pairs that the causal mask lets through. Medians of device events, the cache far
beyond L2 or flushed between calls by its own size. Without a GPU it ends with exit code 3.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import first_call  # noqa: E402

DECODES = ((1, 1024), (1, 16384), (16, 4096), (32, 1024), (64, 1024), (64, 4096), (32, 16384))
PROMPTS = ((1, 1024), (1, 4096), (4, 2048), (1, 16384))
BLOCK = 16


def main() -> int:
    """Check, then time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "profiling/results/gpu/attention.json")
    parser.add_argument("--budget-s", type=float, default=240.0)
    parser.add_argument("--only", choices=["prompts"], help="prompts by all kernels, no more")
    args = parser.parse_args()
    if not first_call.has_gpu():
        print("attention: no GPU is visible here; run it on a machine that has one")
        return 3
    deadline = time.monotonic() + args.budget_s
    found: dict[str, Any] = {"command": sys.argv, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    found["machine"] = first_call.part_machine(SimpleNamespace())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.only is None:
        time_own_kernel(found, deadline)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    from prompt_rates import prompt_rates

    found["prompts"] = prompt_rates(deadline)
    for name, rates in found["prompts"].items():
        print(f"{name}: {json.dumps(rates)}", flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def time_own_kernel(found: dict[str, Any], deadline: float) -> None:
    """Its checks, and what it reads and computes a second."""
    found["read_gbps"] = first_call.part_bandwidth(SimpleNamespace())["read_gbps"]
    found["checks"] = checks()
    cases = [(kv, 1, rows, context) for kv in ("bf16", "int8", "fp8") for rows, context in DECODES]
    cases += [("bf16", context, rows, context) for rows, context in PROMPTS]
    for kv, length, rows, context in cases:
        name = f"{kv}, {rows} x {length} tokens at {context}"
        if time.monotonic() > deadline:
            found[name] = "the time budget is spent"
            continue
        found[name] = timed(kv, rows, length, context)
        print(f"{name}: {json.dumps(found[name])}", flush=True)


def checks() -> dict[str, str]:
    """The cases of the interpreter's tests, by the compiler on the device."""
    import subprocess

    found = {}
    for case in ("decode", "prefill", "mixed", "uneven", "window", "eight_bits", "padding"):
        command = [sys.executable, "-m", "tests.cpu.triton_attention_program", case, "cuda"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        lines = (done.stdout + done.stderr).strip().splitlines() or ["nothing was printed"]
        found[case] = lines[-1][:300]
        print(f"{case}: {found[case]}", flush=True)
    return found


def timed(kv_dtype: str, rows: int, length: int, context: int) -> dict[str, float]:
    """Median us of one call, and what it reads or computes a second."""
    import torch

    from tpinfer.attention.interface import HeadLayout, PagedSpans, StepSpans
    from tpinfer.attention.paged_kv import PagedKV
    from tpinfer.attention.triton_attention import TritonAttention
    from tpinfer.config.dtypes import DType
    from tpinfer.sharding.kv_layout import KVLayout

    device, heads, dim = torch.device("cuda"), HeadLayout(32, 8, 4, 0), 128
    each = -(-context // BLOCK)
    layout = KVLayout(BLOCK, each * rows)
    names = {"bf16": DType.BFLOAT16, "int8": DType.INT8, "fp8": DType.FLOAT8_E4M3}
    kv = PagedKV(1, heads.num_kv_heads, dim, layout, names[kv_dtype], device)
    for tensor in kv.tensors():
        tensor.fill_(1)
    tables = torch.randperm(each * rows, device=device, dtype=torch.int32).view(rows, each)

    def column(values: Any) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    starts = column(range(0, rows * length + 1, length))
    paged = PagedSpans(
        tables, column(range(rows)), starts, column([context] * rows), rows, length, context
    )
    query = torch.randn(rows * length, heads.num_heads, dim, device=device, dtype=torch.bfloat16)
    attend = TritonAttention(layout, device).bind_attention(heads, dim, None)
    cache, spans = kv.layer(0), StepSpans((), paged)
    flush = torch.empty(128 << 20, dtype=torch.uint8, device=device)

    def call() -> None:
        flush.zero_()
        attend(query, cache, spans)

    both_us = first_call.median_us(call, 20)
    call_us = both_us - first_call.median_us(lambda: flush.zero_(), 20)
    num_bytes = sum(tensor.nbytes for tensor in kv.tensors())
    pairs = rows * (length * context - length * (length - 1) // 2)
    return {
        "us": call_us,
        "gbps": num_bytes / call_us / 1e3,
        "tflops": 4 * heads.num_heads * dim * pairs / call_us / 1e6,
    }


if __name__ == "__main__":
    sys.exit(main())
