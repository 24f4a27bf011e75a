"""Several ranks on one GPU by each route: whether their tokens are those of one rank. Emulation: no
speed claim.

    python profiling/gpu/ranks.py --out profiling/results/gpu/ranks [--nccl libnccl.so.2]
    [--routes C,A,B] [--tp 2,4] [--no-mps] [--budget-s 240]

C: symmetric memory, gloo beside it. A: `--nccl`, an NCCL of 2.30 or newer, for everything. B:
torch's own NCCL, a host name per rank. Each in float32, greedy tokens against tp=1, and in
bfloat16, where log-probabilities of the prompt's tokens are compared. A private MPS daemon, started
and ended here, lets ranks run side by side instead of in turns (C and A; B goes without). Route A
at tp=2 also writes NCCL's own log and a recording, from which tpprof draws no cause. Several cases
run at once: most of a case is starting processes. Without a GPU it ends with exit code 3.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import first_call  # noqa: E402

NUM_TOKENS, AT_ONCE = 16, 6
PROMPTS = [[0, 300, 411, 502, 77, 12, 640], [0, 41], [0, *range(100, 140)]]
COLLECTIVES = {"C": "auto", "A": "nccl", "B": "nccl"}


@dataclass(frozen=True)
class Case:
    """One run of `tpinfer generate`."""

    route: str
    tp: int
    dtype: str
    has_mps: bool = False

    @property
    def name(self) -> str:
        """For people and files."""
        beside = "-mps" if self.has_mps else ""
        return f"{self.route}-tp{self.tp}-{self.dtype}{beside}"


def main() -> int:
    """One rank first, then the routes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "profiling/results/gpu/ranks")
    parser.add_argument("--nccl", type=Path)
    parser.add_argument("--routes", default="C,A,B")
    parser.add_argument("--tp", default="2,4")
    parser.add_argument("--no-mps", dest="mps", action="store_false")
    parser.add_argument("--budget-s", type=float, default=240.0)
    args = parser.parse_args()
    if not first_call.has_gpu():
        print("ranks: no GPU is visible here; run it on a machine that has one")
        return 3
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"label": "emulation: no speed claim", "command": sys.argv}
    found["date"] = time.strftime("%Y-%m-%d %H:%M:%S")
    found["machine"] = first_call.part_machine(SimpleNamespace())
    deadline = time.monotonic() + args.budget_s
    one_rank = run_all([Case("one", 1, dtype) for dtype in ("float32", "bfloat16")], args, deadline)
    sizes = [int(size) for size in args.tp.split(",")]
    routes = [route for route in args.routes.split(",") if route != "A" or args.nccl]
    cases = [Case(r, n, d) for r in routes for n in sizes for d in ("float32", "bfloat16")]
    cases = [case for case in cases if case.dtype == "float32" or case.tp == sizes[0]]
    results = run_all([case for case in cases if case.route != "A"], args, deadline)
    with private_mps(args.mps) as variables:
        beside = [case for case in cases if case.route != "B"]
        if variables:
            beside = [Case(case.route, case.tp, case.dtype, True) for case in beside]
        results |= run_all(beside, args, deadline, variables)
    for name, run in {**one_rank, **results}.items():
        found[name] = compared(run, one_rank[f"one-tp1-{name.split('-')[2]}"])
        print(f"{name}: {json.dumps(found[name])[:700]}", flush=True)
    (args.out / "ranks.json").write_text(json.dumps(found, indent=1) + "\n")
    recording = args.out / "recording"
    if recording.is_dir():
        found["recording"] = kernels_of(recording)
        command = [sys.executable, "-m", "tpprof", "analyze", str(recording), "--window", "steps"]
        paths = f"{ROOT / 'profiling'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        said = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
        )
        (args.out / "recording.txt").write_text(said.stdout + said.stderr)
    (args.out / "ranks.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def run_all(
    cases: list[Case], args: argparse.Namespace, deadline: float, more: dict[str, str] | None = None
) -> dict[str, Any]:
    """What each case printed, by its name."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = pool.map(lambda case: run_case(case, args, deadline, more or {}), cases)
        return {case.name: run for case, run in zip(cases, done, strict=True)}


def run_case(
    case: Case, args: argparse.Namespace, deadline: float, more: dict[str, str]
) -> dict[str, Any]:
    """Tokens, log-probabilities and what was chosen."""
    limit_s, began = min(120.0, deadline - time.monotonic()), time.monotonic()
    if limit_s < 10:
        return {"skipped": "the time budget is spent"}
    prompts = args.out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": p}) + "\n" for p in PROMPTS))
    command = [sys.executable, "-m", "tpinfer", "generate", "--greedy", "--ignore-eos", "--explain"]
    command += ["--prompts", str(prompts), "--max-tokens", str(NUM_TOKENS), "--dtype", case.dtype]
    command += ["--json", "-", "--prompt-logprobs", "0", "--no-table", "--device", "cuda"]
    command += ["--kv-bytes", "64MB", "--step-timeout", "100"]
    if case.tp > 1:
        command += ["--tp", str(case.tp), "--share-device"]
        command += ["--collective", COLLECTIVES[case.route]]
    environment = {**os.environ, **more, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if case.route == "A":
        command += ["--nccl-library", str(args.nccl)]
    if case.route == "A" and case.dtype == "float32":
        log = args.out / f"nccl-{case.name}.log"
        environment |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,GRAPH,TUNING"}
        environment |= {"NCCL_DEBUG_FILE": str(log)}
        if case.tp == 2:
            command += ["--profile", str(args.out / "recording"), "--profile-steps", "4"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, cwd=ROOT, env=environment
        )
    except subprocess.TimeoutExpired as late:
        return {"timeout_s": limit_s, "tail": first_call.text_tail(late.stderr, 600)}
    if done.returncode:
        return {"exit": done.returncode, "tail": first_call.text_tail(done.stderr, 900)}
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    topics = ("collective", "shared device", "recorded steps", "attention", "layers", "linears")

    def said(line: str) -> bool:
        return line.strip().startswith(topics)

    return {
        "tokens": [line["token_ids"] for line in lines],
        "logprobs": [flat_logprobs(line.get("prompt_logprobs")) for line in lines],
        "seconds": round(time.monotonic() - began, 1),
        "choices": [line.strip() for line in done.stderr.splitlines() if said(line)],
    }


def flat_logprobs(found: Any) -> list[float]:
    """Every number under `logprob` keys, in order."""
    if isinstance(found, dict):
        own = [found["logprob"]] if isinstance(found.get("logprob"), float) else []
        return own + [one for value in found.values() for one in flat_logprobs(value)]
    if isinstance(found, list):
        return [one for value in found for one in flat_logprobs(value)]
    return []


def compared(run: dict[str, Any], one_rank: dict[str, Any]) -> dict[str, Any]:
    """How far a run is from one rank's."""
    if "tokens" not in run or "tokens" not in one_rank:
        return run
    shares = [
        sum(a == b for a, b in zip(mine, theirs, strict=False)) / len(theirs)
        for mine, theirs in zip(run["tokens"], one_rank["tokens"], strict=True)
    ]
    pairs = [
        pair
        for mine, theirs in zip(run["logprobs"], one_rank["logprobs"], strict=True)
        for pair in zip(mine, theirs, strict=False)
    ]
    return {
        "equal_tokens": run["tokens"] == one_rank["tokens"],
        "equal_shares": shares,
        "num_logprobs": len(pairs),
        "largest_logprob_difference": max((abs(a - b) for a, b in pairs), default=None),
        "seconds_with_start": run["seconds"],
        "choices": run["choices"],
    }


@contextmanager
def private_mps(is_wanted: bool) -> Iterator[dict[str, str]]:
    """Variables by which processes find a daemon of their own; none where there is no MPS."""
    control = shutil.which("nvidia-cuda-mps-control")
    if not is_wanted or control is None:
        yield {}
        return
    with tempfile.TemporaryDirectory() as directory:
        variables = {
            "CUDA_MPS_PIPE_DIRECTORY": f"{directory}/pipe",
            "CUDA_MPS_LOG_DIRECTORY": f"{directory}/log",
        }
        for path in variables.values():
            Path(path).mkdir()
        environment = {**os.environ, **variables}
        started = subprocess.run([control, "-d"], env=environment, capture_output=True, text=True)
        if started.returncode:
            print(f"no MPS: {started.stderr[-200:]}", flush=True)
            yield {}
            return
        try:
            yield variables
        finally:
            subprocess.run([control], input="quit\n", env=environment, text=True, timeout=20)


def kernels_of(recording: Path) -> dict[str, int]:
    """How often each kernel that sums over ranks is in a recording, by file and name."""
    counts: dict[str, int] = {}
    for path in sorted(recording.glob("rank*.trace.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        for event in events:
            name = str(event.get("name", ""))
            if event.get("cat") == "kernel" and ("nccl" in name or "sum_" in name):
                key = f"{path.name}: {name[:60]}"
                counts[key] = counts.get(key, 0) + 1
    return counts


if __name__ == "__main__":
    sys.exit(main())
