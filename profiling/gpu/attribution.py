"""How much of a decode step tpprof explains on this machine: decode steps of a shape with random
weights are recorded as `tpinfer bench latency --profile` records them, and read.

    python profiling/gpu/attribution.py --out profiling/results/gpu/attribution.json
    [--shape llama-3.1-8b] [--rows 1,32] [--context 960] [--budget-s 240] [--keep DIR]

Per number of rows: the share of wall in leaves that say something (`explained`, asked: 97 %), of
device time with a layer, the leaves, graph gaps and host as shares of the wall (asked: 5 and 1 %,
with recording's own cost in them), the dilation, and what reading took. Runs on a CPU too, with a
shape that it can hold; without either, and where a run fails, it says why and goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "profiling"), str(HERE)]

from tpinfer.cli.profile import bench_command  # noqa: E402

STEPS, TOKENS = 24, 64
LEAST_S = 10.0
"""What a run takes at least; with less time left none is begun."""
TARGETS = {"explained": 0.97}
_IDLE = (
    "host", "launch_latency", "dependency_wait", "host_tail", "idle_unexplained", "unrecorded",
    "graph_gap",
)  # fmt: skip
"""Leaves in which nothing ran: they have no op."""


def main() -> int:
    """Record and read each number of rows, and write what was found after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "profiling/results/gpu/attribution.json")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--context", type=int, default=960, help="tokens of each prompt")
    parser.add_argument("--budget-s", type=float, default=240.0)
    parser.add_argument("--keep", type=Path, help="recordings and reports go there and stay")
    args = parser.parse_args()
    found: dict[str, Any] = {"command": sys.argv, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    found["targets"] = TARGETS
    until_s = time.monotonic() + args.budget_s
    with TemporaryDirectory() as scratch:
        for rows in map(int, args.rows.split(",")):
            directory = (args.keep or Path(scratch)) / f"rows{rows}"
            found[f"rows {rows}"] = one = attributed(args, rows, directory, until_s)
            print(f"rows {rows}: {json.dumps(one)}", flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if any("explained" in one for one in found.values() if isinstance(one, dict)) else 1


def attributed(args: argparse.Namespace, rows: int, directory: Path, until_s: float) -> Any:
    """What tpprof says of a run of `rows`, or why there is nothing to say."""
    if until_s - time.monotonic() < LEAST_S:
        return {"skipped": "the time budget is spent"}
    # Whatever chunks prompts go in, they are over before the first recorded step.
    num_prompt_steps = rows * -(-args.context // 2048) + 2
    more = ["--model", f"shape:{args.shape}", "--batch-size", str(rows)]
    more += ["--input-len", str(args.context), "--output-len", str(TOKENS)]
    more += ["--max-num-seqs", str(rows), "--no-prefix-caching", "--disable-detokenize"]
    more += ["--max-model-len", str(args.context + TOKENS + 16)]
    more += ["--profile-skip", str(num_prompt_steps)]
    command = bench_command(1, directory, STEPS, more)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=until_s - time.monotonic()
        )
    except subprocess.TimeoutExpired as late:
        return {"timeout_s": round(late.timeout, 1)}
    if done.returncode:
        return {"exit": done.returncode, "tail": (done.stdout + done.stderr)[-1500:]}
    return read(directory)


def read(directory: Path) -> dict[str, Any]:
    """The report's shares, and what making it took."""
    from tpprof.analyze import AnalysisOptions, analyze
    from tpprof.attribute.grouping import UNATTRIBUTED
    from tpprof.readers.find import find_traces
    from tpprof.readers.read import read_traces
    from tpprof.report.jsonform import encode_report

    began = time.perf_counter()
    report = analyze(read_traces([directory]), AnalysisOptions(window="steps", by="op"))
    spent_s = time.perf_counter() - began
    (directory / "report.json").write_bytes(encode_report(report))
    wall = max(report.wall_ns, 1)
    idle = sum(report.leaves.get(leaf, 0) for leaf in _IDLE)
    nobodys = [row.wall_ns for row in report.groups if row.key == UNATTRIBUTED]
    of_kernels = max(report.wall_ns - idle, 1)
    return {
        "explained": report.coverage.explained,
        "held": report.coverage.explained >= TARGETS["explained"],
        "with an op": 1 - max(sum(nobodys) - idle, 0) / of_kernels,
        "with a layer": report.coverage.layer,
        "with a model of its cost": report.coverage.flop_model,
        "with a launch": report.coverage.launch_link,
        "dilation": report.dilation,
        "graph gaps": report.leaves.get("graph_gap", 0) / wall,
        "host": report.rollup["host"] / wall,
        "windows": len(report.windows),
        "wall_ns": report.wall_ns,
        "leaves": report.leaves,
        "rollup": report.rollup,
        "warnings": report.warnings,
        "bytes of traces": sum(path.stat().st_size for _, path in find_traces([directory]).files),
        "analysis_s": spent_s,
    }


if __name__ == "__main__":
    sys.exit(main())
