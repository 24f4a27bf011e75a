"""The `tpinfer` command. Each verb lives in its own file and imports what it needs when it runs."""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from tpinfer.config.errors import TpinferError

VERBS = {
    "generate": "write text with a model, over one rank or several, and say where the time went",
    "bench": "time latency or throughput with made-up prompts, and say where the time went",
    "profile": "run and record a benchmark, and say where its wall time went",
    "explain": "run it on 1, 2, 4 ... ranks and say what ate the speed-up",
    "plan": "predict how fast a model would be on a machine, which placement to take, and why",
    "topo": "find out what machines are made of and reach, look at it, and see what would hurt",
    "doctor": "show what this machine has, what would be chosen here, and what is missing",
}
ORIENTATION = """tpinfer - tensor-parallel LLM inference that knows where every microsecond goes

  tpinfer generate --prompt "Once upon a time"        a small model that comes along writes a story
  tpinfer generate --tp 2 --model DIR --prompt "..."  your checkpoint on two ranks
  tpinfer doctor                                      what this machine has and what is missing

`tpinfer VERB --help` explains a verb."""


class OneLineParser(argparse.ArgumentParser):
    """A parser that answers a mistake with one line, where argparse puts the whole usage above it.
    The parsers of the verbs are of the same class."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every verb."""
    parser = OneLineParser(
        prog="tpinfer",
        description="Tensor-parallel LLM inference that knows where every microsecond goes.",
    )
    parser.add_argument("--version", action="version", version=f"tpinfer {_version()}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, summary in VERBS.items():
        verb = importlib.import_module(f"tpinfer.cli.{name}")
        verb.add_flags(
            verbs.add_parser(
                name,
                help=summary,
                description=f"{summary[0].upper()}{summary[1:]}.",
                formatter_class=argparse.RawDescriptionHelpFormatter,
                epilog=verb.EPILOG,
            )
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a failure, 2 for a mistake in the call."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _complete_streams()
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.verb is None:
        print(ORIENTATION)
        return 0
    verb = importlib.import_module(f"tpinfer.cli.{args.verb}")
    try:
        return verb.run(args, argv)
    except TpinferError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _complete_streams() -> None:
    """Have all three standard streams, and never fail for a character the locale lacks."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        # The lowest free numbers are those of the closed streams: nothing else may land on them.
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
        sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
        sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _version() -> str:
    try:
        return version("tpinfer")
    except PackageNotFoundError:
        return "(not installed)"
