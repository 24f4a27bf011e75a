"""`tpprof scale`: what ate the speed-up between runs on different numbers of ranks."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tpinfer.config.errors import ConfigError
from tpprof.cli.analyze import report_of
from tpprof.cli.inputs import (
    WINDOWS,
    add_limit_flags,
    add_output_flags,
    is_report,
    read_paths,
    world_of,
    write_text,
)

if TYPE_CHECKING:
    from tpprof.attribute.findings import RankFindings
    from tpprof.report.scale import Waterfall
    from tpprof.results import Report

EPILOG = """examples:
  tpprof scale runs/tp1 runs/tp2 runs/tp4
  tpprof scale tp4.json tp8.json --html scale.html
  tpprof scale a b --sizes 4,8 --model config.json --device h200-sxm

Record the same work at every size, a run a directory; a JSON report of `analyze --window steps`
does as well. Ideal is the smallest run's wall divided among the ranks. What the larger run needs
beyond it is split into unsharded work, thin GEMMs, transfer, waiting (for whom, and why), host and
the rest; the parts sum exactly, and each comes with what removing it would win at most.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="directory of traces, or JSON report, of one size"
    )
    parser.add_argument(
        "--sizes", metavar="N,N,...", help="ranks of each run, in order (as recorded)"
    )
    parser.add_argument(
        "--window", choices=WINDOWS, default="steps", help="wall intervals to compare (steps)"
    )
    add_limit_flags(parser)
    add_output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the waterfalls; write what was asked for."""
    from tpprof.report.scale import build_waterfalls
    from tpprof.report.scale_text import render_waterfalls

    runs = _runs(args)
    reports = {size: report for size, (report, _) in runs.items()}
    waterfalls = [_replayed(one, runs[one.tp][1]) for one in build_waterfalls(reports)]
    print(render_waterfalls(waterfalls))
    if args.json:
        write_text(args.json, json.dumps(scale_json(waterfalls), indent=1) + "\n")
    if args.html:
        from tpprof.report.html import render_html

        write_text(args.html, render_html(reports[max(reports)], waterfalls=waterfalls))
        print(f"page written to {args.html}", file=sys.stderr)
    return 0


def _replayed(one: "Waterfall", found: "RankFindings | None") -> "Waterfall":
    """With gains by replay, where there are traces."""
    if found is None:
        return one
    from tpprof.report.scale import replayed_causes, with_replay
    from tpprof.report.whatif import WhatIf

    present = {str(trace.rank) for trace in found.traces}
    causes = [c for c in replayed_causes(one) if ":" not in c or c.split(":")[1] in present]
    return with_replay(one, WhatIf(found).answer(causes))


def scale_json(waterfalls: "list[Waterfall]") -> dict[str, object]:
    """Every waterfall with its speed-up and efficiency."""
    return {
        "format_version": 1,
        "runs": [
            {**asdict(one), "speedup": one.speedup, "efficiency": one.efficiency}
            for one in waterfalls
        ],
    }


def _runs(args: argparse.Namespace) -> "dict[int, tuple[Report, RankFindings | None]]":
    """By number of ranks the report, and the findings where traces were given.

    Raises ConfigError for two runs of one size.
    """
    sizes = _sizes(args.sizes, len(args.runs)) if args.sizes else [None] * len(args.runs)
    found: dict[int, tuple[Report, RankFindings | None]] = {}
    for name, asked in zip(args.runs, sizes, strict=True):
        size, report, findings = _run(name, asked, args)
        if size in found:
            raise ConfigError(
                f"{name} is a second run of {size} ranks; give each size once, or say what they "
                "are with --sizes 1,2,4"
            )
        found[size] = report, findings
    return found


def _run(
    name: str, size: int | None, args: argparse.Namespace
) -> "tuple[int, Report, RankFindings | None]":
    path = Path(name)
    if is_report(path):
        from tpprof.report.jsonform import read_report

        report = read_report(path)
        return size or len(report.ranks), report, None
    traces = read_paths([name])
    size = size or world_of(traces)
    asked = argparse.Namespace(**{**vars(args), "tp": size})
    return size, *report_of(traces, asked, "layer" if args.html else "")


def _sizes(text: str, count: int) -> list[int | None]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != count or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(
            f"--sizes {text} must name {count} numbers of ranks, one for each run, such as 1,2,4"
        )
    return [int(part) for part in parts]
