"""Everything that is claimed of a GPU, in one run: the scripts beside this one by their importance,
each within a time of its own, and a table of claims at the end.

    python profiling/gpu/claims.py --out results [--budget-s 540] [--only engine,ranks] [--plan]
    [--nccl libnccl.so.2]

Each part writes DIR/NAME.log and its JSON as it goes. One that takes too long is ended, with all
processes it started; the next one goes on. `--plan` says what would run and stops. `--table DIR`
only reads the figures of an earlier run. Ends with 0 where every claim that was measured is held.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GRACE_S = 5.0
LEAST_S = 5.0
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Part:
    """One script."""

    name: str
    command: tuple[str, ...]
    """Behind the interpreter; OUT stands for the directory."""
    budget_s: float


def parts_of(args: argparse.Namespace) -> list[Part]:
    """The most telling first: what was missed, what was never measured, then the rest."""
    gpu, nccl = str(HERE), ("--nccl", str(args.nccl)) if args.nccl else ()
    decode = ROOT / "profiling/peers/gpu_decode.py"
    return [
        Part("engine", (f"{gpu}/engine.py", "--out", "OUT/engine.json", "--only",
             "ceilings,decode,shard,prefill,equal", "--budget-s", "170"), 180),
        Part("ranks", (f"{gpu}/ranks.py", "--out", "OUT/ranks", "--budget-s", "130", *nccl), 165),
        Part("peers", (str(decode), "--out", "OUT/peers.json"), 120),
        Part("attribution", (f"{gpu}/attribution.py", "--out", "OUT/attribution.json",
             "--budget-s", "90"), 100),
        Part("collectives", (f"{gpu}/collectives.py", "--out", "OUT/collectives.json"), 90),
        Part("ncu", (f"{gpu}/ncu_bytes.py", "--out", "OUT/ncu_bytes.json"), 120),
        Part("linears", (f"{gpu}/linears.py", "--out", "OUT/linears.json", "--rows", "16,64"), 60),
        Part("attention", (f"{gpu}/attention.py", "--out", "OUT/attention.json", "--budget-s",
             "70"), 90),
        Part("tests", ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"), 180),
    ]  # fmt: skip


def main() -> int:
    """Run, then tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "profiling/results/gpu/claims")
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--only", help="names of parts, with commas between")
    parser.add_argument("--nccl", type=Path, help="an NCCL of 2.30 or newer, for route A")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--table", type=Path, metavar="DIR")
    args = parser.parse_args()
    args.out = args.out.resolve()  # parts run in the repository's root
    args.nccl = args.nccl.resolve() if args.nccl else None
    if args.table:
        return tell(args.table)
    parts = parts_of(args)
    if args.only:
        wanted = args.only.split(",")
        unknown = set(wanted) - {part.name for part in parts}
        if unknown:
            names = ", ".join(part.name for part in parts)
            print(
                f"claims: {', '.join(sorted(unknown))} unknown; there are {names}", file=sys.stderr
            )
            return 2
        parts = [part for part in parts if part.name in wanted]
    if args.plan:
        for part in parts:
            print(f"{part.budget_s:5.0f} s  {part.name:<12} {' '.join(part.command)}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    run_all(parts, args.out, args.budget_s)
    return tell(args.out)


def run_all(parts: Sequence[Part], out: Path, budget_s: float) -> dict[str, str]:
    """How each part ended, by its name; kept in OUT/parts.json as it goes on."""
    until_s, ends = time.monotonic() + budget_s, {}
    for part in parts:
        began_s = time.monotonic()
        left_s = until_s - began_s
        if left_s < LEAST_S:
            ends[part.name] = "skipped: the time is spent"
        else:
            ends[part.name] = run_part(part, out, min(part.budget_s, left_s))
        spent_s = time.monotonic() - began_s
        print(f"{part.name:<12} {spent_s:6.1f} s  {ends[part.name]}", flush=True)
        (out / "parts.json").write_text(json.dumps(ends, indent=1) + "\n")
    return ends


def run_part(part: Part, out: Path, limit_s: float) -> str:
    """Run it in a group of processes of its own, which is ended whole when the time is over."""
    words = [word.replace("OUT", str(out), 1) if "OUT/" in word else word for word in part.command]
    paths = f"{ROOT}:{ROOT / 'profiling'}:{os.environ.get('PYTHONPATH', '')}"
    with (out / f"{part.name}.log").open("wb") as log:
        try:
            process = subprocess.Popen(
                [sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "PYTHONPATH": paths},
            )  # fmt: skip
        except OSError as error:
            return f"failed: {error.strerror}"
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            end_group(process)
            return f"ended after {limit_s:.0f} s"
    return "done" if code == 0 else f"ended with {code}, see {part.name}.log"


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ask, then kill: also what it has started and left behind."""
    for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue


@dataclass(frozen=True)
class Claim:
    """A figure that is promised."""

    words: str
    target: float
    unit: str
    is_least: bool
    """The figure must be at least the target; else at most."""
    file: str
    figure: Callable[[Any], float | None]

    def verdict(self, out: Path) -> tuple[str, str]:
        """(figure, held or missed), as words."""
        try:
            found = self.figure(json.loads((out / self.file).read_text()))
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            found = None
        if found is None:
            return "", NOT_MEASURED
        held = found >= self.target if self.is_least else found <= self.target
        return f"{found:.3g} {self.unit}", "held" if held else "missed"


def percent(*keys: str) -> Callable[[Any], float | None]:
    """A share that lies under these keys, as percent."""

    def figure(found: Any) -> float | None:
        for key in keys:
            found = found[key]
        return 100.0 * found

    return figure


def host_share(found: Any) -> float | None:
    """Percent of a request's time that is the host's."""
    words = found["decode"]["rows 1, in flight 2"]["rollup_ns"]
    return 100.0 * words["host"] / sum(words.values())


def peer_ratio(found: Any) -> float | None:
    """The slowest relation of a peer's step to ours of the same batch; our steps lie beside it."""
    ours = {"1": found["ours"]["rows 1, in flight 2"], "32": found["ours"]["rows 32, in flight 2"]}
    ratios = [
        one["step_ms"] / ours[name.rpartition(" ")[2]]["tpot_ms"]
        for name, one in found.items()
        if isinstance(one, dict) and "step_ms" in one and name.rpartition(" ")[2] in ours
    ]
    return min(ratios, default=None)


def routes_equal(found: Any) -> float | None:
    """Percent of float32 runs on several ranks that came to their end whose tokens are one rank's;
    which did not is in the log."""
    runs = [one for name, one in found.items() if "-float32" in name and not name.startswith("one")]
    told = [one["equal_tokens"] for one in runs if "equal_tokens" in one]  # of those that ended
    return 100.0 * sum(told) / len(told) if told else None


def one_shot_ratio(found: Any) -> float | None:
    """The largest relation of the own one-shot to torch's."""
    pairs = [
        one["own"] / one["torch one_shot alone"]
        for size in found.values() if isinstance(size, dict)
        for one in size.values() if isinstance(one, dict) and "own" in one
        and "torch one_shot alone" in one
    ]  # fmt: skip
    return max(pairs, default=None)


def stamp_us(found: Any) -> float | None:
    """Median of what the stamps cost a call, in us."""
    costs = sorted(
        one["own"] - one["own without stamps"]
        for size in found.values() if isinstance(size, dict)
        for one in size.values() if isinstance(one, dict) and "own without stamps" in one
    )  # fmt: skip
    return costs[len(costs) // 2] if costs else None


def byte_error(found: Any) -> float | None:
    """The largest distance of the ledger's bytes from DRAM's, in percent."""
    return max(100.0 * abs(one["dram"] / one["ledger"] - 1) for one in found["ops"].values())


def bound_agreement(found: Any) -> float | None:
    """Percent of kernel time, over all steps looked at, whose class is ncu's."""
    told = [one for one in found["bounds"].values() if one.get("agree") is not None]
    spent = sum(one["us"] for one in told)
    return 100.0 * sum(one["agree"] * one["us"] for one in told) / spent if spent else None


def least_explained(found: Any) -> float | None:
    """Percent of wall that tpprof explains, of the run with the least."""
    told = [one["explained"] for one in found.values()
            if isinstance(one, dict) and "explained" in one and "held" in one]  # fmt: skip
    return 100.0 * min(told) if told else None


def most_gaps(found: Any) -> float | None:
    """Percent of wall between nodes of a graph, of the run with the most."""
    told = [one["graph gaps"] for one in found.values()
            if isinstance(one, dict) and "graph gaps" in one]  # fmt: skip
    return 100.0 * max(told) if told else None


CLAIMS = (
    Claim("one row decodes, of its floor", 86, "%", True, "engine.json",
          percent("ratios", "decode rows 1, in flight 2")),
    Claim("64 rows at 1k, of their floor", 80, "%", True, "engine.json",
          percent("ratios", "decode rows 64, in flight 2")),
    Claim("prefill of 4k, of the matrix rate", 70, "%", True, "engine.json",
          percent("ratios", "prefill")),
    Claim("a shard of 70B at tp=8, of its floor", 70, "%", True, "engine.json",
          percent("ratios", "shard of 70B at tp=8")),
    Claim("host, of a request of one row", 1, "%", False, "engine.json", host_share),
    Claim("graph gaps, of the step", 5, "%", False, "attribution.json", most_gaps),
    Claim("a peer's step over ours, the least", 1, "times", True, "peers.json", peer_ratio),
    Claim("ranks on one card, float32 tokens equal", 100, "%", True, "ranks/ranks.json",
          routes_equal),
    Claim("own one-shot over torch's, the most", 1.15, "times", False, "collectives.json",
          one_shot_ratio),
    Claim("stamps of a call", 0.2, "us", False, "collectives.json", stamp_us),
    Claim("ledger's bytes from DRAM's", 5, "%", False, "ncu_bytes.json", byte_error),
    Claim("bound class as ncu's, of kernel time", 95, "%", True, "ncu_bytes.json",
          bound_agreement),
    Claim("wall that tpprof explains", 97, "%", True, "attribution.json", least_explained),
)  # fmt: skip


def tell(out: Path) -> int:
    """The table, also as OUT/claims.json; 1 where a claim was missed or none was measured."""
    join_peers(out)
    rows = [(claim, *claim.verdict(out)) for claim in CLAIMS]
    for claim, figure, verdict in rows:
        sign = ">=" if claim.is_least else "<="
        print(f"{claim.words:<42} {sign} {claim.target:<5g} {figure:>12}  {verdict}")
    told = {claim.words: {"figure": figure, "verdict": verdict} for claim, figure, verdict in rows}
    if out.is_dir():
        (out / "claims.json").write_text(json.dumps(told, indent=1) + "\n")
    verdicts = [verdict for _, _, verdict in rows]
    return 0 if "missed" not in verdicts and "held" in verdicts else 1


def join_peers(out: Path) -> None:
    """Lay our own steps beside the peers' in their file."""
    try:
        peers = json.loads((out / "peers.json").read_text())
        ours = json.loads((out / "engine.json").read_text())["decode"]
    except (OSError, ValueError, KeyError):
        return
    (out / "peers.json").write_text(json.dumps({**peers, "ours": ours}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
