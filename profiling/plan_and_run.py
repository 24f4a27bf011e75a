"""Probe, plan, run, compare: how far the planner is off on this very machine.

    python -m profiling.plan_and_run                        # 0.6B, tp 1 and 2, 1 and 8 at a time
    python -m profiling.plan_and_run --model shape:qwen3-0.6b-slice --rounds 1

For each tp: discovers the host, probes it on that many ranks, plans each load, and serves the load
with the plan's own limits in a closed loop: a request that ends sends the next. Loads take turns
over the rounds; medians are compared. Time to first token, which grows with every request that
waits, is compared where fewer requests are in flight than saturate the engine: one at a time. The
transfer term is that of `tpinfer bench latency`, which tells it from waiting. Run it on idle cores:
what else runs is measured too.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TARGETS = {"tpot": 0.12, "ttft": 0.15, "transfer": 0.30}
"""Largest relative error that is asked for."""


@dataclass(frozen=True, slots=True)
class Load:
    """One load on one number of ranks."""

    tp: int
    concurrency: int

    @property
    def name(self) -> str:
        """For people."""
        return f"tp={self.tp} at {self.concurrency}"


def tpinfer(*arguments: str) -> None:
    """One command of tpinfer. Ends the program where it fails."""
    command = [sys.executable, "-m", "tpinfer", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def probed(args: argparse.Namespace, tp: int) -> Path:
    """A topology of this host with what `tp` ranks reach on it."""
    box = args.out / f"box-tp{tp}.yaml"
    tpinfer("topo", "discover", "-o", str(box))
    tpinfer("topo", "probe", str(box), "--tp", str(tp), "--seconds", str(args.seconds))
    return box


def planned(args: argparse.Namespace, box: Path, load: Load) -> dict[str, object]:
    """The plan of one load, with its details. Ends the program where it does not fit."""
    path = args.out / f"plan-tp{load.tp}-c{load.concurrency}.json"
    lengths = ["--input-len", str(args.input_len), "--output-len", str(args.output_len)]
    tpinfer(
        "plan", "--model", args.model.removeprefix("shape:"), "--topology", str(box),
        "--tp", str(load.tp), "--pp", "1", "--dp", "1", *lengths,
        "--concurrency", str(load.concurrency), "--json", str(path),
    )  # fmt: skip
    found = json.loads(path.read_text(encoding="utf-8"))
    plan, details = found["plans"][0], found["details"][0]
    if not plan["fits"]:
        sys.exit(f"{load.name}: {details['reason']}")
    return {**plan, "limits": {k: details[k] for k in ("max_num_seqs", "max_num_batched_tokens")}}


def served(args: argparse.Namespace, load: Load, limits: dict[str, int]) -> dict[str, float]:
    """Mean times of one closed loop in a process of its own."""
    wanted = {
        "model": args.model, "tp": load.tp, "concurrency": load.concurrency, "limits": limits,
        "input_len": args.input_len, "output_len": args.output_len, "requests": args.requests,
    }  # fmt: skip
    command = [sys.executable, "-m", "profiling.plan_and_run", "--serve", json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def transferred(args: argparse.Namespace, load: Load) -> float:
    """Seconds of transfer in an output token's time, on rank 0."""
    path = args.out / "bench.json"
    tpinfer(
        "bench", "latency", "--model", args.model, "--tp", str(load.tp), "--batch-size",
        str(load.concurrency), "--input-len", str(args.input_len), "--output-len",
        str(args.output_len), "--num-iters", "2", "--num-iters-warmup", "1", "--json", str(path),
    )  # fmt: skip
    found = json.loads(path.read_text(encoding="utf-8"))["attribution"]
    return found["leaves"].get("comm_transfer", 0) / 1e9 / (2 * args.output_len)


async def closed_loop(wanted: dict[str, object]) -> dict[str, float]:
    """Keep `concurrency` requests in flight until `requests` of each have ended; the first of each
    only warms up."""
    from tpinfer import AsyncEngine, SamplingParams

    draws = random.Random(0)
    model, lengths = str(wanted["model"]), (int(wanted["input_len"]), int(wanted["output_len"]))
    sampling = SamplingParams(temperature=0, max_tokens=lengths[1], ignore_eos=True)
    timings = []
    limits: dict[str, int] = wanted["limits"]
    settings = {"load_format": "random"} if model.startswith("shape:") else {}
    engine = await AsyncEngine.start(model, tp=wanted["tp"], **limits, **settings)
    async with engine:

        async def caller() -> None:
            for number in range(int(wanted["requests"]) + 1):
                prompt = [draws.randrange(100, 30000) for _ in range(lengths[0])]
                result = await engine.complete(prompt, sampling)
                if number:
                    timings.append(result.outputs[0].timing)

        await asyncio.gather(*(caller() for _ in range(int(wanted["concurrency"]))))
    return {
        "ttft_s": statistics.mean(one.ttft_s for one in timings),
        "tpot_s": statistics.mean(one.tpot_s for one in timings),
    }


def compare(args: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of what was predicted and measured."""
    loads = [Load(tp, count) for tp in args.tp for count in args.concurrency]
    boxes = {tp: probed(args, tp) for tp in args.tp}
    plans = {load: planned(args, boxes[load.tp], load) for load in loads}
    runs: dict[Load, list[dict[str, float]]] = {load: [] for load in loads}
    for _ in range(args.rounds):
        for load in loads:
            runs[load].append(served(args, load, plans[load]["limits"]))
    rows = []
    for load in loads:
        plan = plans[load]
        found = {k: statistics.median(run[k] for run in runs[load]) for k in ("ttft_s", "tpot_s")}
        pairs = [("tpot", plan["tpot_s"], found["tpot_s"])]
        if load.concurrency == 1:
            pairs.append(("ttft", plan["ttft_s"], found["ttft_s"]))
            if load.tp > 1:
                sent = plan["split"]["communication"]
                pairs.append(("transfer", sent, transferred(args, load)))
        rows += [row(load, *pair, plan["interval"]) for pair in pairs]
    return rows


def row(
    load: Load, what: str, predicted: float, measured: float, interval: dict[str, Sequence[float]]
) -> dict[str, object]:
    """One comparison."""
    error = predicted / measured - 1
    return {
        "load": load.name, "what": what, "predicted_s": predicted, "measured_s": measured,
        "error": error, "target": TARGETS[what], "held": abs(error) <= TARGETS[what],
        "interval_s": interval.get(f"{what}_s"),
    }  # fmt: skip


def main() -> int:
    """Compare, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shape:qwen3-0.6b")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--requests", type=int, default=3, help="of each caller, a round (3)")
    parser.add_argument("--rounds", type=int, default=3, help="over all loads in turns (3)")
    parser.add_argument("--seconds", type=int, default=30, help="of each probe (30)")
    parser.add_argument("--out", type=Path, default=Path("plan_and_run"))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        print(json.dumps(asyncio.run(closed_loop(json.loads(args.serve)))))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    began = os.getloadavg()[0]
    rows = compare(args)
    print(f"{args.model}, {args.input_len} in, {args.output_len} out, median of {args.rounds}; "
          f"load {began:.1f} before; {time.strftime('%Y-%m-%d %H:%M')}")  # fmt: skip
    for one in rows:
        print(
            f"{one['load']:>10}  {one['what']:<8}  predicted {one['predicted_s'] * 1e3:9.3f} ms  "
            f"measured {one['measured_s'] * 1e3:9.3f} ms  {one['error']:+7.1%}  "
            f"{'held' if one['held'] else 'missed'} (target {one['target']:.0%})"
        )
    (args.out / "compared.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
