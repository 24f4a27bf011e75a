"""`tpprof diff`: two runs side by side, with limits for CI."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tpprof.cli.analyze import report_of
from tpprof.cli.inputs import WINDOWS, add_limit_flags, is_report, read_paths, write_text

if TYPE_CHECKING:
    from tpprof.results import Report

EPILOG = """examples:
  tpprof diff before/ after/
  tpprof diff baseline.json after/ --window steps --fail-on communication:+5% --fail-on wall:+2%

A and B are directories of traces, or JSON reports of `analyze --json`. With --window steps, means
of the steps are compared. A limit is KEY:+N% or KEY:+N with ns, us, ms or s; KEY is wall, a word
(compute, memory, communication, small_kernels, host, queue) or a leaf such as comm_wait. The exit
code is 1 when B passes a limit, which is for CI.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    parser.add_argument("before", metavar="A", help="traces or report to compare with")
    parser.add_argument("after", metavar="B", help="traces or report that may be worse")
    parser.add_argument(
        "--fail-on", action="append", default=[], metavar="KEY:+N%",
        help="most that KEY may grow; may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--window", choices=WINDOWS, default="steps", help="wall intervals to compare (steps)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the difference as JSON")
    add_limit_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the difference; 1 when a limit was passed."""
    from tpprof.report.diff_text import render_difference
    from tpprof.report.diffing import compare, parse_limit

    limits = [parse_limit(text) for text in args.fail_on]
    before, after = (_report(name, args) for name in (args.before, args.after))
    found = compare(before, after, limits)
    print(render_difference(found, (args.before, args.after)))
    if args.json:
        import json

        write_text(args.json, json.dumps({"format_version": 1, **asdict(found)}, indent=1) + "\n")
    return 1 if found.failures else 0


def _report(name: str, args: argparse.Namespace) -> "Report":
    path = Path(name)
    if is_report(path):
        from tpprof.report.jsonform import read_report

        return read_report(path)
    return report_of(read_paths([name]), args)[0]
