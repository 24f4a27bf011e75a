"""Remove what dead runs left in /dev/shm. Touches only files of this user called `tpinfer-...`, and
DeepSpeed's that carry such a name behind its own.
"""

import fcntl
import os
import shutil
import time
from pathlib import Path

from tpinfer.steps.liveness import process_start_ticks
from tpinfer.steps.segment import DEEPSPEED_PREFIX, PREFIX, SHM_DIRECTORY

_CLOCK_SLACK_S = 2.0


def sweep_stale(directory: Path = SHM_DIRECTORY) -> list[Path]:
    """Remove files and directories `tpinfer-<pid>-...` whose maker is gone; returns what was
    removed.

    A maker is gone when no process has its pid, or when the one that has it started after the file
    was made. A file somebody holds locked is kept: its maker may live in another pid namespace that
    shares /dev/shm.
    """
    removed = []
    for path in sorted(_named(directory, f"{PREFIX}*")):
        pid = path.name[path.name.index(PREFIX) + len(PREFIX) :].partition("-")[0]
        if pid.isdecimal() and _is_orphan(path, int(pid)) and _remove(path):
            removed.append(path)
    return removed


def remove_run(run_id: str, directory: Path = SHM_DIRECTORY) -> list[Path]:
    """Remove everything of the run `run_id`, all of whose ranks must have ended; returns what was
    removed.
    """
    paths = sorted(_named(directory, f"{PREFIX}*-{run_id}-*"))
    return [path for path in paths if _remove(path)]


def _named(directory: Path, pattern: str) -> list[Path]:
    return [*directory.glob(pattern), *directory.glob(f"{DEEPSPEED_PREFIX}*_{pattern}")]


def _is_orphan(path: Path, pid: int) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    if status.st_uid != os.getuid():
        return False
    ticks = process_start_ticks(pid)
    if ticks is None:
        return not _is_locked(path)
    started_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    started_s += ticks / os.sysconf("SC_CLK_TCK")
    return started_s > status.st_mtime + _CLOCK_SLACK_S and not _is_locked(path)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _remove(path: Path) -> bool:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError:
        return False
    return True
