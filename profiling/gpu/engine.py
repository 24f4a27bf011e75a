"""How near a GPU's engine comes to what the card can do, in one run on one card: the shape of
Llama-3.1-8B in bfloat16, random weights made on the device.

    python profiling/gpu/engine.py --out profiling/results/gpu/engine.json [--only ceilings,decode]
    [--budget-s 540] [--shape llama-3.1-8b] [--rows 1,32,64]

Parts run one after the other in processes of their own: `ceilings` (read and copy bandwidth, matrix
rate), `decode` (1, 32 and 64 rows at a mean context of 1k, with one and two steps in flight, and
one row op by op), `prefill` (4,096 tokens), `equal` (tokens of recorded steps against op by op, and
what the run chose), `shard` (rank 0's part of a 70B shape at tp=8, its collectives left out).
`ratios` sets them against floors: bytes of weights and keys over the read bandwidth of this run,
operations over its matrix rate. Without a GPU the script says so and ends with exit code 3.
"""

import argparse
import json
import statistics
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

LIMITS_S = {"ceilings": 60, "decode": 260, "prefill": 60, "equal": 90, "shard": 90}
CONTEXT, NUM_TOKENS, PROMPT, FEW = 1024, 128, 4096, 32


def main() -> int:
    """Run all parts, or one of them in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "profiling/results/gpu/engine.json")
    parser.add_argument("--only", default=",".join(LIMITS_S))
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--rows", default="1,32,64", help="of decode, each with two in flight")
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--part", choices=list(LIMITS_S), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print("RESULT " + json.dumps(PARTS[args.part](args)), flush=True)
        return 0
    if not first_call.has_gpu():
        print("engine: no GPU is visible here; run it on a machine that has one")
        return 3
    found: dict[str, Any] = {"command": sys.argv, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    found["machine"] = first_call.part_machine(SimpleNamespace())
    deadline = time.monotonic() + args.budget_s
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for part in args.only.split(","):
        found[part] = run_part(part, args, min(LIMITS_S[part], deadline - time.monotonic()))
        print(f"{part}: {json.dumps(found[part])[:600]}", flush=True)
        found["ratios"] = ratios(found)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["ratios"], indent=1))
    return 0


def run_part(part: str, args: argparse.Namespace, limit_s: float) -> Any:
    """One part in a process of its own; what it prints behind RESULT."""
    if limit_s < 5:
        return {"skipped": "the time budget is spent"}
    command = [sys.executable, __file__, "--part", part, "--shape", args.shape]
    command += ["--rows", args.rows]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, cwd=ROOT)
    except subprocess.TimeoutExpired as late:
        return {"timeout_s": limit_s, "tail": first_call.text_tail(late.stdout)}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    tail = first_call.text_tail(done.stdout) + first_call.text_tail(done.stderr)
    return {"exit": done.returncode, "tail": tail}


def part_ceilings(args: argparse.Namespace) -> dict[str, Any]:
    """What the others are held against."""
    return {
        **first_call.part_bandwidth(SimpleNamespace()),
        "matrix_tflops": first_call.part_matmul(SimpleNamespace())["bf16_m8192"]["tflops"],
    }


def generated(args: argparse.Namespace, rows: int, length: int, count: int, **settings: Any) -> Any:
    """Tokens and times of `rows` prompts of `length` tokens, behind a warm-up; and the choices."""
    from tpinfer import LLM, SamplingParams

    settings = {"max_model_len": length + count + 16, "max_num_batched_tokens": 4096, **settings}
    prompts = [[(7 * row + 13 * i) % 30000 + 10 for i in range(length)] for row in range(rows)]
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    with LLM(
        f"shape:{args.shape}", load_format="random", dtype="bfloat16", max_num_seqs=rows,
        prefix_caching=False, **settings,
    ) as llm:  # fmt: skip
        llm.generate(prompts[:1], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        few = SamplingParams(temperature=0, max_tokens=FEW, ignore_eos=True)
        if rows > 1:
            llm.generate(prompts, few)  # compiles what steps of prompts beside other rows take
        began = time.perf_counter()
        outputs = [result.outputs[0] for result in llm.generate(prompts, sampling)]
        whole_s = time.perf_counter() - began
        tpot_s = statistics.median(output.timing.tpot_s for output in outputs)
        if rows > 1 and count > FEW:
            # Other rows' prompts run between a row's tokens; as they do in a run of fewer tokens.
            began = time.perf_counter()
            llm.generate(prompts, few)
            tpot_s = (whole_s - (time.perf_counter() - began)) / (count - FEW)
    whole = outputs[0].attribution.whole.to_json() if outputs[0].attribution else {}
    return SimpleNamespace(
        tokens=[output.token_ids for output in outputs],
        tpot_s=tpot_s,
        ttft_s=min(output.timing.ttft_s for output in outputs),
        rollup=whole.get("rollup"),
    )


def part_decode(args: argparse.Namespace) -> dict[str, Any]:
    """TPOT in ms by rows and steps in flight (of several rows: while all of them decode), and the
    six words of one request in ns, its prompt and the wait for others' included."""
    found: dict[str, Any] = {}
    length = CONTEXT - NUM_TOKENS // 2
    sizes = [int(rows) for rows in args.rows.split(",")]
    cases = [(rows, 2) for rows in sizes] + [(1, 1)] * (1 in sizes)
    for rows, depth in cases:
        run = generated(args, rows, length, NUM_TOKENS, steps_in_flight=depth)
        found[f"rows {rows}, in flight {depth}"] = {
            "tpot_ms": run.tpot_s * 1e3, "rollup_ns": run.rollup,
        }  # fmt: skip
        print(f"rows {rows}, in flight {depth}: {run.tpot_s * 1e3:.3f} ms", flush=True)
    if 1 in sizes:
        plain = generated(args, 1, length, NUM_TOKENS, cuda_graphs=False)
        found["rows 1, op by op"] = {"tpot_ms": plain.tpot_s * 1e3, "rollup_ns": plain.rollup}
    return found


def part_prefill(args: argparse.Namespace) -> dict[str, Any]:
    """Least time to first token of a prompt of 4,096 tokens, of three."""
    runs = [generated(args, 1, PROMPT, 2, max_num_batched_tokens=PROMPT) for _ in range(3)]
    return {"ttft_ms": min(run.ttft_s for run in runs) * 1e3}


def part_equal(args: argparse.Namespace) -> dict[str, Any]:
    """Whether a slice in float32 draws the same tokens recorded and op by op."""
    args.shape = "qwen3-0.6b-slice"
    runs = [
        generated(args, 5, 40, 64, dtype="float32", cuda_graphs=graphs, steps_in_flight=depth)
        for graphs in (True, False)
        for depth in (1, 2)
    ]
    command = [sys.executable, "-m", "tpinfer", "generate", "--explain", "--max-tokens", "4"]
    shown = subprocess.run(
        [*command, "--prompt", "Once upon a time"], capture_output=True, text=True, cwd=ROOT
    )
    return {
        "equal": all(run.tokens == runs[0].tokens for run in runs),
        "explain": (shown.stdout + shown.stderr).splitlines()[-40:],
    }


def part_shard(args: argparse.Namespace) -> dict[str, Any]:
    """Step of one row at 1k of context on rank 0 of 8, of 20 layers of 70B, and its bytes."""
    import torch
    from shard_alone import shard_step_s

    step_s, num_bytes = shard_step_s("llama-3.1-70b", 8, 20, CONTEXT, torch.device("cuda:0"))
    return {"step_ms": step_s * 1e3, "num_bytes": num_bytes}


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Shares of the floors, as far as their parts ran."""
    from tpinfer.config.huggingface import read_model_spec
    from tpinfer.config.model_name import model_directory

    spec = read_model_spec(model_directory("shape:llama-3.1-8b"))
    ceilings, made = found.get("ceilings", {}), {}
    if "read_gbps" not in ceilings:
        return {}
    read = max(ceilings["read_gbps"], ceilings["gemv_bf16_28672x8192_gbps"]) * 1e9
    kv = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2 * CONTEXT
    weights = 2 * weight_count(spec)
    for name, run in found.get("decode", {}).items():
        if isinstance(run, dict) and "tpot_ms" in run:
            rows = int(name.split()[1].rstrip(","))
            made[f"decode {name}"] = (weights + rows * kv) / read / (run["tpot_ms"] / 1e3)
    if "ttft_ms" in found.get("prefill", {}):
        flops = 2 * PROMPT * (weights / 2 - spec.vocab_size * spec.hidden_size)
        flops += 2 * spec.num_layers * spec.num_heads * spec.head_dim * PROMPT**2
        spent_s = found["prefill"]["ttft_ms"] / 1e3
        made["prefill"] = flops / spent_s / (ceilings["matrix_tflops"] * 1e12)
    if "step_ms" in found.get("shard", {}):
        floor_s = found["shard"]["num_bytes"] / read
        made["shard of 70B at tp=8"] = floor_s / (found["shard"]["step_ms"] / 1e3)
    return made


def weight_count(spec: Any) -> int:
    """Elements that a decode step multiplies with: all linears and the head."""
    heads = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    layer = heads * spec.hidden_size + 3 * spec.hidden_size * spec.intermediate_size
    return spec.num_layers * layer + spec.vocab_size * spec.hidden_size


PARTS = {
    "ceilings": part_ceilings, "decode": part_decode, "prefill": part_prefill,
    "equal": part_equal, "shard": part_shard,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
