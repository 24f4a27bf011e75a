"""Whether a process on this host still runs, read from /proc. Does not signal or wait."""

from pathlib import Path


def process_start_ticks(pid: int) -> int | None:
    """Clock ticks after boot at which `pid` started, or None when it is gone, a zombie or
    unreadable.

    Source: proc(5), fields 3 (state) and 22 (starttime) of /proc/<pid>/stat; the name in field 2
    may hold spaces.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    if not fields or fields[0] in "ZX":
        return None
    return int(fields[19])


def is_running(pid: int, start_ticks: int | None = None) -> bool:
    """True when `pid` is alive and, if `start_ticks` is given, is still the same process (pids are
    reused).
    """
    found = process_start_ticks(pid)
    return found is not None and (start_ticks is None or found == start_ticks)
