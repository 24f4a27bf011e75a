"""How a rank tells its launcher why it ended: one block of text, written once, through a pipe or a
file.

The first line is `<monotonic ns> <one-line summary>`, the rest is the traceback (or the
interpreter's own report of a crash, which has no such first line). Does not decide what to do about
it.
"""

import os
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from tpinfer.config.errors import TpinferError

LARGEST_TEXT_BYTES = 32_000
"""Less than a pipe holds, so that a dying rank never blocks on writing."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one rank ended."""

    rank: int
    """Rank that ended."""
    at_ns: int
    """When, on the host's monotonic clock."""
    summary: str
    """One line."""
    detail: str
    """Traceback; empty for errors that are the user's to mend."""

    def text(self) -> str:
        """What the user reads, the reason first."""
        return f"rank {self.rank} failed: {self.summary}" + (
            f"\n{self.detail}" if self.detail else ""
        )


def describe_exception(error: BaseException) -> tuple[str, str]:
    """One line and the traceback. A TpinferError's message is written for users and needs no
    traceback.
    """
    if isinstance(error, TpinferError):
        return str(error) or type(error).__name__, ""
    lines = str(error).strip().splitlines()
    summary = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return summary, "".join(traceback.format_exception(error)).rstrip()


def write_failure(path: Path, summary: str, detail: str) -> None:
    """Leave the reason at `path` (which may be /dev/fd/<n>, a pipe). A launcher that is gone reads
    nothing.
    """
    head = f"{time.monotonic_ns()} {summary}\n".encode()[: LARGEST_TEXT_BYTES // 2]
    # The end of a traceback says what happened; of one that is too long the beginning goes.
    tail = detail.encode()[-(LARGEST_TEXT_BYTES - len(head)) :]
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        return
    try:
        os.write(descriptor, head + tail)
    except BrokenPipeError:
        return
    finally:
        os.close(descriptor)


def read_failure(rank: int, text: str, exit_status: int) -> Failure:
    """Put together what rank `rank` wrote, if anything, and its exit status (-n: killed by signal
    n).
    """
    first, _, detail = text.partition("\n")
    stamp, _, summary = first.partition(" ")
    if stamp.isdecimal() and summary:
        return Failure(rank, int(stamp), summary, detail.strip())
    return Failure(rank, time.monotonic_ns(), describe_status(exit_status), text.strip())


def describe_status(exit_status: int) -> str:
    """`killed by SIGKILL (...)` or `exit code 3`, for a process that said nothing itself."""
    if exit_status >= 0:
        ended_by = f" (ended by {_signal_name(exit_status - 128)})" if exit_status > 128 else ""
        return f"exit code {exit_status} without a message{ended_by}"
    name = _signal_name(-exit_status)
    hint = {
        "SIGKILL": " (from outside: often the kernel, out of memory; see `dmesg`)",
        "SIGBUS": " (a shared-memory page could not be had; see `df /dev/shm`)",
        "SIGILL": " (an instruction this CPU lacks; rebuild what was compiled elsewhere)",
    }.get(name, "")
    return f"killed by {name}{hint}"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
