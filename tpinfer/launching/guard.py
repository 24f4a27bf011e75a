"""What a rank does for itself at its start: die with its launcher, stop when told, say why it
failed.

For the command line only: it installs signal handlers, which a library must not do to its host
process. Does not start ranks (see `ranks`) and does not watch other ranks.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tpinfer.config.environment import Environment
from tpinfer.launching.failure import describe_exception, write_failure
from tpinfer.launching.seat import Seat
from tpinfer.launching.sweep import sweep_stale

STACKS_SIGNAL = signal.SIGUSR1
"""Has a rank write its threads' stacks to standard error."""
STOP_GRACE_S = 2.0
"""How long a rank may take to wind up after SIGINT or SIGTERM before it is killed."""
_PR_SET_PDEATHSIG = 1


def die_with_parent(expected_parent: int) -> None:
    """Let the kernel SIGKILL this process when the thread that made it ends. prctl(2),
    PR_SET_PDEATHSIG.

    The request only covers what is to come: if the parent is gone already, this process ends here.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != expected_parent:
        os.kill(os.getpid(), signal.SIGKILL)


def guard_rank(seat: Seat) -> None:
    """Call first in a rank's process, on its main thread, before anything that starts threads.

    Ties the rank's life to its launcher's, clears away what dead runs left in /dev/shm, and makes
    SIGINT and SIGTERM end the rank: as KeyboardInterrupt and SystemExit in Python code, and by
    SIGKILL after STOP_GRACE_S when the main thread sits in native code (a collective that waits for
    a dead rank) and never gets to raise them. STACKS_SIGNAL has the stacks written, also from
    there.
    """
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    if seat.launcher != "single":
        die_with_parent(os.getppid())
    if seat.local_rank == 0:
        sweep_stale()
    _stop_on_signals()


def run_rank(seat: Seat, environment: Environment, body: Callable[[], int]) -> int:
    """Run a rank's work and return its exit code; an error is reported once, as `rank N failed:
    ...`.

    Under our own launcher the report goes to the launcher, which prints that of the first rank to
    fail, so that the cause stands on top. Elsewhere it goes to standard error. Interrupted: 130.
    Terminated: 143.
    """
    report_file = _open_crash_report(environment.error_file)
    try:
        return body()
    except KeyboardInterrupt:
        if seat.world == 1:
            print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        # Whoever read our output has had enough (`| head`): no error, but nothing more can be
        # written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except Exception as error:
        summary, detail = describe_exception(error)
        if environment.error_file is not None:
            write_failure(environment.error_file, summary, detail)
        else:
            named = f"rank {seat.rank} failed: " if seat.world > 1 else "error: "
            print(
                f"{named}{summary}" + (f"\n{detail}" if detail else ""), file=sys.stderr, flush=True
            )
        return 1
    finally:
        if report_file is not None:
            faulthandler.disable()
            os.close(report_file)


def leave(code: int) -> NoReturn:
    """End a rank whose seat `ends_process`, everything of it written and closed: what a GPU's
    libraries do at the interpreter's end may wait for ranks that are gone."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _open_crash_report(path: Path | None) -> int | None:
    """Have the interpreter write where it was when it crashes (SIGSEGV and the like), to the
    launcher if any.
    """
    if path is None:
        faulthandler.enable()
        return None
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError:
        return None
    faulthandler.enable(descriptor)
    return descriptor


def _stop_on_signals() -> None:
    """SIGINT and SIGTERM raise once in the main thread; a watching thread kills the process if that
    does not help.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(read_end, True)
    # The interpreter's C handler writes here even while the main thread is in native code.
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(
        target=_kill_when_stuck, args=(read_end,), name="tpinfer-stop", daemon=True
    ).start()
    signal.signal(signal.SIGINT, _raise_stop)
    signal.signal(signal.SIGTERM, _raise_stop)


def _raise_stop(number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _kill_when_stuck(read_end: int) -> None:
    while True:
        arrived = os.read(read_end, 64)
        if signal.SIGINT in arrived or signal.SIGTERM in arrived:
            time.sleep(STOP_GRACE_S)
            os.kill(os.getpid(), signal.SIGKILL)
