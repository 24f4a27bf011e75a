"""`tpprof analyze`: where the wall time of one run went."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tpprof.cli.inputs import (
    GROUPINGS,
    WINDOWS,
    add_limit_flags,
    add_output_flags,
    add_path_flags,
    options_of,
    read_paths,
    spare_recordings,
    write_text,
)

if TYPE_CHECKING:
    from tpprof.analyze import AnalysisOptions
    from tpprof.attribute.findings import RankFindings
    from tpprof.events import Trace
    from tpprof.results import Report

EPILOG = """examples:
  tpprof analyze traces/
  tpprof analyze 'vllm_profile/*rank*.pt.trace.json.gz' --device h100-sxm-80g --window steps
  tpprof analyze run.sqlite --model config.json --tp 8 --by layer --html report.html

Every rank's wall is split into six words - compute, memory, communication, small kernels, host,
queue - that add up to it in integer nanoseconds. Waiting for a later rank is told from transfer
when the traces of all ranks are given. Windows: all (the whole recording), steps (each step),
ttft (request accepted to first token), itl (token to token).
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    add_path_flags(parser)
    parser.add_argument(
        "--window", choices=WINDOWS, default="all", help="which wall intervals (all)"
    )
    parser.add_argument("--by", choices=GROUPINGS, default="", help="a table by this, too")
    add_limit_flags(parser)
    add_output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; write what was asked for."""
    from tpprof.analyze import prepare
    from tpprof.report.text import render_report

    traces = read_paths(args.paths)
    spare_recordings(traces, args.json, args.html)
    options = options_of(args, traces, args.window, args.by)
    found = prepare(traces, options)
    report = advised(found, replace(options, by=args.by or ("layer" if args.html else "")))
    print(render_report(report if args.by else replace(report, by="", groups=[])))
    if args.json:
        from tpprof.report.jsonform import encode_report

        write_text(args.json, encode_report(report).decode())
    if args.html:
        from tpprof.report.html import render_html
        from tpprof.report.whatif import WhatIf

        steps = advised(found, replace(options, window="steps", by=""))
        answer = WhatIf(found).answer()
        write_text(args.html, render_html(report, steps, answer=answer))
        print(f"page written to {args.html}", file=sys.stderr)
    return 0


def advised(found: "RankFindings", *options: "AnalysisOptions") -> "Report":
    """The report about the first window that the recording has, with advice where it gave none."""
    from tpprof.analyze import report_on
    from tpprof.report.advice import advise

    report = report_on(found, options[0])
    for other in options[1:]:
        if report.windows and report.wall_ns > 0:
            break
        report = report_on(found, other)
    return report if report.advice else replace(report, advice=advise(report))


def report_of(
    traces: "Sequence[Trace]", args: argparse.Namespace, by: str = ""
) -> "tuple[Report, RankFindings]":
    """The report of a run for a comparison - in the windows asked for where it has any, else of the
    whole recording - and what it was made from."""
    from tpprof.analyze import prepare

    options = options_of(args, traces, args.window, by)
    found = prepare(traces, options)
    return advised(found, options, replace(options, window="all")), found
