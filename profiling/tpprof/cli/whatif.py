"""`tpprof whatif`: what removing one cause would win."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tpprof.cli.inputs import (
    add_limit_flags,
    add_path_flags,
    options_of,
    read_paths,
    spare_recordings,
    write_text,
)

EPILOG = """examples:
  tpprof whatif traces/
  tpprof whatif traces/ --no wait --no host:schedule

The ranks are replayed along the collectives that they share: every rank works on its own until the
last one has come. Removing a cause cuts its time out of the replay, and what the others waited for
it goes too. Causes: wait (every rank comes with the first), wait:RANK (that rank is never later
than the next-latest), transfer (at its ceiling where one is known, else none), a word (host,
memory, compute, small_kernels), a leaf (latency, copy, launch_latency, ...) or host:PART (schedule,
prepare, sample, detokenize, ...). The gain is an upper bound: nothing moves into the time won.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    add_path_flags(parser)
    parser.add_argument(
        "--no", action="append", default=[], metavar="CAUSE",
        help="remove only this one; may be given more than once (each cause in turn)",
    )  # fmt: skip
    add_limit_flags(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answers as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the wall that each removal leaves."""
    from tpprof.analyze import prepare
    from tpprof.report.whatif import WhatIf
    from tpprof.report.whatif_text import render_whatif

    traces = read_paths(args.paths)
    spare_recordings(traces, args.json)
    answer = WhatIf(prepare(traces, options_of(args, traces, "all"))).answer(args.no)
    print(render_whatif(answer))
    if args.json:
        write_text(args.json, json.dumps({"format_version": 1, **asdict(answer)}, indent=1) + "\n")
    return 0
