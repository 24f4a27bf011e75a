"""`tpprof export`: the events of all ranks for other tools."""

import argparse
from pathlib import Path

from tpprof.cli.inputs import add_path_flags, read_paths, spare_recordings
from tpprof.report.wording import plural

EPILOG = """examples:
  tpprof export traces/ --nsys-sqlite run.sqlite      then: nsys stats run.sqlite
  tpprof export traces/ --arrow run.arrow             then: pyarrow, Polars, DuckDB

--nsys-sqlite writes the tables that Nsight Systems exports: kernels, copies, calls, annotations,
each rank as a process. --arrow writes one table of events and needs the package pyarrow.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare all flags."""
    add_path_flags(parser)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--nsys-sqlite", type=Path, metavar="FILE", help="write Nsight Systems' SQLite schema"
    )
    target.add_argument("--arrow", type=Path, metavar="FILE", help="write an Arrow IPC file")


def run(args: argparse.Namespace) -> int:
    """Write the file."""
    traces = read_paths(args.paths)
    spare_recordings(traces, args.arrow)
    if args.arrow:
        from tpprof.report.arrow import write_arrow

        count = write_arrow(args.arrow, traces)
    else:
        from tpprof.report.nsight_sqlite import write_nsight

        count = write_nsight(args.nsys_sqlite, traces)
    path = args.arrow or args.nsys_sqlite
    print(f"{plural(count, 'event')} of {plural(len(traces), 'rank')} in {path}")
    return 0
