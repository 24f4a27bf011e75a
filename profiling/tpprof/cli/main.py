"""The `tpprof` command. Each verb lives in its own file and imports what it needs when it runs."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from tpinfer.config.errors import TpinferError

VERBS = {
    "analyze": "say where the wall time of a run went, on every rank, adding up exactly",
    "scale": "compare runs on 1, 2, 4 ... ranks and say what ate the speed-up",
    "whatif": "replay the ranks with one cause removed and say what that would win",
    "diff": "compare two runs, or two reports, and fail where one got worse",
    "merge": "write one Perfetto trace of all ranks on one clock",
    "export": "write the events for Nsight's tools or as an Arrow table",
    "record": "run a Python script under torch's profiler, one trace a rank",
}
ORIENTATION = """tpprof - where the time of a tensor-parallel run went, on anybody's traces

  tpprof record --out traces -- torchrun --nproc-per-node 2 script.py     record a script
  tpprof analyze traces                                                  where the wall went
  tpprof analyze traces --by layer --html report.html                    the same to look at
  tpprof scale runs/tp1 runs/tp2 runs/tp4                                what ate the speed-up
  tpprof diff before.json traces --fail-on communication:+5%             a check for CI

Traces are Kineto files (torch, vLLM, SGLang: .json or .json.gz) and Nsight Systems exports
(.sqlite), one a rank; pass files, directories or globs. `tpprof VERB --help` explains a verb."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Help of one width everywhere, so that it can be compared."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=98)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every verb."""
    parser = argparse.ArgumentParser(
        prog="tpprof",
        description="Say where the time of a tensor-parallel run went, on anybody's traces.",
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"tpprof {_version()}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, summary in VERBS.items():
        verb = importlib.import_module(f"tpprof.cli.{name}")
        verb.add_flags(
            verbs.add_parser(
                name,
                help=summary,
                description=f"{summary[0].upper()}{summary[1:]}.",
                formatter_class=Help,
                epilog=verb.EPILOG,
            )
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a limit that was passed or a script that
    failed, 2 for a mistake in the call or its files."""
    parser = build_parser()
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.verb is None:
        print(ORIENTATION)
        return 0
    try:
        return importlib.import_module(f"tpprof.cli.{args.verb}").run(args)
    except TpinferError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away, such as `head`; nothing is left to be said
        return 0
    except OSError as error:  # files are told by name where they are written; this is the terminal
        print(f"error: the output cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _version() -> str:
    try:
        return version("tpinfer")
    except PackageNotFoundError:
        return "(not installed)"
