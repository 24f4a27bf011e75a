"""`tpinfer profile`: run `tpinfer bench latency` with a recorder on and read the recording."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tpinfer.config.errors import ConfigError

EPILOG = """What follows -- goes to `tpinfer bench latency`; see its --help.

examples:
  tpinfer profile --tp 2 --by op
  tpinfer profile --tp 2 --out traces --html report.html -- --model DIR --batch-size 1
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (1)")
    recording_output_flags(parser, "profile")
    parser.add_argument(
        "--by", choices=["rank", "step", "phase", "layer", "op", "kernel", "stream"],
        help="a table by this, too",
    )  # fmt: skip
    parser.add_argument(
        "--window", choices=["all", "steps", "ttft", "itl"], default="all",
        help="which wall intervals (all)",
    )  # fmt: skip


def recording_output_flags(parser: argparse.ArgumentParser, verb: str) -> None:
    """Where recordings and reports go, and what `bench` is told."""
    parser.add_argument(
        "--out", default=f"tpinfer-{verb}", metavar="DIR", help=f"traces go there (tpinfer-{verb})"
    )
    parser.add_argument("--html", metavar="FILE", help="the report as a page to look at")
    parser.add_argument("--json", metavar="FILE", help="the report as JSON")
    parser.add_argument(
        "--num-steps", type=int, default=10, metavar="N", help="steps recorded (10)"
    )
    parser.add_argument(
        "bench", nargs="*", metavar="-- FLAG", help="flags of tpinfer bench latency"
    )


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Record, then analyze."""
    directory = Path(args.out)
    code = record_bench(args.tp, directory, args.num_steps, args.bench)
    if code:
        return code
    from tpprof.cli.main import main as tpprof

    more = ["--by", args.by] if args.by else []
    return tpprof(["analyze", str(directory), "--window", args.window, *more, *outputs(args)])


def outputs(args: argparse.Namespace) -> list[str]:
    """The report's files, as tpprof's flags."""
    named = (("--html", args.html), ("--json", args.json))
    return [part for flag, name in named if name for part in (flag, name)]


def record_bench(tp: int, directory: Path, num_steps: int, more: Sequence[str]) -> int:
    """Run `bench latency` on `tp` ranks with a recorder; returns its exit code.

    Raises ConfigError for tp below 1.
    """
    if tp < 1:
        raise ConfigError(f"--tp {tp} must be 1 or more")
    return subprocess.run(bench_command(tp, directory, num_steps, more), check=False).returncode


def bench_command(tp: int, directory: Path, num_steps: int, more: Sequence[str]) -> list[str]:
    """The program and its arguments: one run behind a warm-up, recorded."""
    command = [sys.executable, "-m", "tpinfer", "bench", "latency", "--tp", str(tp)]
    command += ["--num-iters-warmup", "1", "--num-iters", "1"]
    return [*command, "--profile", str(directory), "--profile-steps", str(num_steps), *more]
