"""Runs a script inside a rank that `tpprof record` started, under torch's profiler.

Started as a file, with whatever Python the user's command names: nothing of tpprof is imported,
and of tpinfer only the reader of ranks' environments, which needs the standard library alone.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> int:
    """argv: output directory, directory of the package tpinfer, `record` or `time`, and then the
    script or -m MODULE with its arguments."""
    out, root, mode, *command = argv
    rank, world = _rank_and_world(root)
    profiler = _profiler() if mode == "record" else None
    start_ns = time.perf_counter_ns()
    if profiler is not None:
        profiler.start()
    try:
        code = _run(command)
    finally:
        wall_ns = time.perf_counter_ns() - start_ns
        if profiler is not None:
            profiler.stop()
            profiler.export_chrome_trace(str(Path(out, f"rank{rank}.trace.json")))
        wall = {"rank": rank, "world": world, "wall_ns": wall_ns}
        Path(out, f"rank{rank}.wall.json").write_text(json.dumps(wall), encoding="utf-8")
    return code


def _rank_and_world(root: str) -> tuple[int, int]:
    """(0, 1) where no launcher says otherwise."""
    sys.path.append(root)
    try:
        from tpinfer.config.environment import read_environment

        found = read_environment().rank
    finally:
        sys.path.remove(root)
        # The script may bring a tpinfer of its own.
        for name in [name for name in sys.modules if name.partition(".")[0] == "tpinfer"]:
            del sys.modules[name]
    return (found.rank, found.world) if found else (0, 1)


def _profiler() -> Any:
    """Shapes on, stacks off, every kind of device that this torch can record."""
    from torch import profiler

    return profiler.profile(
        activities=profiler.supported_activities(), record_shapes=True, with_stack=False
    )


def _run(command: list[str]) -> int:
    """What `python COMMAND` would do; the exit code."""
    is_module = command[0] == "-m"
    sys.argv = command[1:] if is_module else list(command)
    sys.path[0] = os.getcwd() if is_module else str(Path(command[0]).resolve().parent)
    try:
        if is_module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
