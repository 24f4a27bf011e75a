"""Start one rank as a child of this process: by fork alone, or by fork and exec of a fresh
interpreter.

The child leads a process group of its own, dies with its parent and has a pipe to report its
failure through. Does not watch it (see `watch`).
"""

import gc
import importlib
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tpinfer.config.environment import child_environment, export_variables
from tpinfer.launching.failure import describe_exception, write_failure
from tpinfer.launching.guard import die_with_parent

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)


@dataclass(slots=True)
class RankProcess:
    """A started rank, as its launcher sees it."""

    rank: int
    """Rank in the run."""
    pid: int
    """Process, which also leads a process group of this number."""
    report: int
    """Read end of the pipe the rank leaves its failure in; not blocking."""
    exit_status: int | None = None
    """None while it runs; -n when signal n ended it."""
    report_text: str = ""
    """What was read from the pipe so far."""

    def read_report(self) -> str:
        """All that the rank has reported until now."""
        try:
            while arrived := os.read(self.report, 65536):
                self.report_text += arrived.decode(errors="replace")
        except BlockingIOError:
            pass  # nothing more for now; the rank still holds the other end
        return self.report_text


def preload_modules(names: Sequence[str]) -> bool:
    """Import what every rank will need, so that forked ranks have it at once. True when forking is
    safe afterwards.

    It is safe while this process has one thread: locks held by other threads would stay held in the
    children. Collection is off meanwhile (importing torch is a fifth faster so), and what was
    imported is then left out of later collections, which would otherwise touch, and so copy, the
    shared pages.
    """
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        if was_collecting:
            gc.enable()
    gc.freeze()
    return num_threads() == 1


def num_threads() -> int:
    """Native threads of this process, those of libraries included."""
    return len(os.listdir("/proc/self/task"))


def start_rank(
    rank: int,
    module: str,
    argv: Sequence[str],
    variables: Mapping[str, str],
    stdin: int | None,
    fork_only: bool,
    not_shared: Sequence[int] = (),
) -> RankProcess:
    """Run `python -m <module> <argv>` as rank `rank` with `variables` added to the environment.

    `stdin` is the descriptor it reads, None for nothing. With `fork_only` the child goes on in a
    copy of this interpreter, with everything that is imported; it never returns from here.
    `not_shared` are descriptors of the launcher that the child closes.
    """
    launcher = os.getpid()
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    added = {**variables, "TPINFER_ERROR_FILE": f"/dev/fd/{write_end}"}
    sys.stdout.flush()
    sys.stderr.flush()
    # Until the child has let go of the launcher's wake-up descriptor, a signal meant for the child
    # would be told to the launcher as its own.
    former_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    pid = os.fork()
    if pid == 0:
        try:
            _take_place(launcher, stdin)
            signal.pthread_sigmask(signal.SIG_SETMASK, former_mask)
            for descriptor in (read_end, *not_shared):
                os.close(descriptor)
            if fork_only:
                _run_here(module, argv, added)
            os.set_inheritable(write_end, True)
            command = [sys.executable, "-m", module, *argv]
            os.execve(sys.executable, command, child_environment(added))
        except BaseException as error:
            write_failure(Path(added["TPINFER_ERROR_FILE"]), *describe_exception(error))
        finally:
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, former_mask)
    os.close(write_end)
    os.set_blocking(read_end, False)
    return RankProcess(rank, pid, read_end)


def _take_place(launcher: int, stdin: int | None) -> None:
    """What a child does before anything else."""
    # A group of its own: the terminal's Ctrl-C reaches the launcher alone, which passes it on once.
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(launcher)
    source = os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin
    if source != 0:
        os.dup2(source, 0)


def _run_here(module: str, argv: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Be `python -m <module> <argv>` in this interpreter, up to its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    export_variables(variables)
    sys.argv = [module, *argv]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # The frames above belong to the launcher: neither its `finally` blocks nor its exit
        # handlers are ours.
        os._exit(code)
