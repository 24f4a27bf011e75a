"""`tpprof merge`: all ranks in one Perfetto trace, on one clock."""

import argparse
from pathlib import Path

from tpprof.cli.inputs import add_path_flags, read_paths, spare_recordings
from tpprof.report.wording import plural

EPILOG = """example:
  tpprof merge traces/ -o merged.json.gz        then open it at ui.perfetto.dev

Clocks of the ranks are aligned by the collectives they share. Above each rank's streams lies a
track that divides each collective into waiting for a later rank and transfer. Ranks whose clock
could not be aligned keep their own, and are named.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    add_path_flags(parser)
    parser.add_argument(
        "-o", dest="out", type=Path, default=Path("merged.json.gz"), metavar="FILE",
        help="file to write, compressed where it ends in .gz (merged.json.gz)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the merged trace and say how the clocks fit."""
    from tpprof.analyze import prepare
    from tpprof.report.merging import merge_ranks

    traces = read_paths(args.paths)
    spare_recordings(traces, args.out)
    found = prepare(traces)
    merged = merge_ranks(
        args.out, found.traces, found.works, found.matched, found.waits, found.clocks
    )
    print(f"{plural(merged.num_slices, 'slice')} of {plural(len(traces), 'rank')} in {args.out}")
    for line in merged.clocks:
        print(line)
    for warning in merged.warnings:
        print(f"warning: {warning}")
    return 0
