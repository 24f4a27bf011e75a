"""`tpinfer explain --tp 1,2,4`: run and record the same work on each number of ranks, and say what
ate the speed-up."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tpinfer.cli.profile import outputs, record_bench, recording_output_flags
from tpinfer.config.errors import ConfigError

EPILOG = """What follows -- goes to `tpinfer bench latency`; see its --help.

examples:
  tpinfer explain --tp 1,2
  tpinfer explain --tp 1,2,4 --out runs --html scale.html -- --model DIR --batch-size 1
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    parser.add_argument(
        "--tp", default="1,2", metavar="N,N,...", help="numbers of ranks to compare (1,2)"
    )
    recording_output_flags(parser, "explain")


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Record each size, then show the waterfall."""
    sizes = _sizes(args.tp)
    directories = [Path(args.out) / f"tp{size}" for size in sizes]
    for size, directory in zip(sizes, directories, strict=True):
        print(f"== {size} rank{'s' if size > 1 else ''}", flush=True)
        code = record_bench(size, directory, args.num_steps, args.bench)
        if code:
            return code
    from tpprof.cli.main import main as tpprof

    return tpprof(["scale", *map(str, directories), *outputs(args)])


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts) or len(parts) < 2:
        raise ConfigError(f"--tp {text} must name two or more numbers of ranks, such as 1,2,4")
    return sorted({int(part) for part in parts})
