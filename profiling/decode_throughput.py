"""Decode throughput of many requests against one, at tp=1 and tp=2: what batching is worth.

    python -m profiling.decode_throughput                   # shape:qwen3-0.6b, 1 and 32 requests
    python -m profiling.decode_throughput --model shape:qwen3-0.6b-slice --output-len 16 --rounds 1

Runs `tpinfer bench throughput` with 16 tokens in and 128 out in bfloat16, one request and many in
turns, and takes the median of the rounds. Decode tokens per second are requests over the median
time per output token, so the prompts' own time is left out; all output tokens over the wall time
are given beside it. The target is 8 times for 32 requests on two cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Rate:
    """What one run showed, in tokens per second."""

    decode: float
    output: float


def measure(args: argparse.Namespace, tp: int, num_requests: int) -> Rate:
    """One run in a process of its own. Ends the program where it fails."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "found.json")
        command = [sys.executable, "-m", "tpinfer", "bench", "throughput", "--model", args.model]
        command += ["--tp", str(tp), "--dtype", args.dtype, "--num-prompts", str(num_requests)]
        command += ["--input-len", str(args.input_len), "--output-len", str(args.output_len)]
        command += ["--max-num-seqs", str(max(args.requests)), "--num-iters", "1"]
        command += ["--num-iters-warmup", str(args.num_warmups), "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        found = json.loads(path.read_text(encoding="utf-8"))
    return Rate(num_requests / found["tpot_s"], found["output_tokens_per_s"])


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shape:qwen3-0.6b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--requests", type=int, nargs=2, default=[1, 32], metavar=("FEW", "MANY"))
    parser.add_argument("--input-len", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="of few and many in turns (3)")
    parser.add_argument("--num-warmups", type=int, default=0, help="runs before each counted (0)")
    args = parser.parse_args()
    few, many = args.requests
    print(
        f"{args.model}, {args.dtype}, {args.input_len} in, {args.output_len} out, "
        f"median of {args.rounds}"
    )
    for tp in args.tp:
        runs = [
            {count: measure(args, tp, count) for count in args.requests} for _ in range(args.rounds)
        ]
        for name in ("decode", "output"):
            rates = {
                count: statistics.median(getattr(run[count], name) for run in runs)
                for count in args.requests
            }
            print(
                f"tp={tp} {name} tokens/s: {few} request {rates[few]:.1f}, "
                f"{many} requests {rates[many]:.1f}, ratio {rates[many] / rates[few]:.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
