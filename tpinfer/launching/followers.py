"""Ranks 1 and up as children of a program that is rank 0 itself: a script, a notebook, a server.

For libraries: installs no signal handlers and no exit handlers here. A follower is a fresh process
that leads a group of its own, so that the terminal's Ctrl-C reaches rank 0 alone; it dies with the
thread that started it, which lives here until `close`. Ranks of a next generation are other
followers.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tpinfer.config.engine import DeviceName
from tpinfer.config.environment import child_environment
from tpinfer.config.errors import RankError
from tpinfer.launching.child import RankProcess
from tpinfer.launching.failure import read_failure
from tpinfer.launching.guard import STACKS_SIGNAL
from tpinfer.launching.ranks import make_rendezvous, shared_variables
from tpinfer.launching.seat import Seat, choose_device, count_gpus
from tpinfer.launching.sweep import remove_run, sweep_stale

CLOSE_GRACE_S = 5.0
"""How long followers may take to end after rank 0 closed the engine."""
"""A follower writes its stacks on it."""
_STACKS_S = 0.3
_LOOK_S = 0.25


class Followers:
    """The other ranks of a run whose rank 0 is this process."""

    def __init__(
        self,
        world: int,
        module: str,
        argv: Sequence[str],
        device: DeviceName,
        generation: int = 0,
        *,
        shares: bool = False,
    ) -> None:
        """Start ranks 1 to world - 1 as `python -m <module> <argv>`.

        `shares`: several ranks may sit on one GPU. Raises ConfigError or OSError.
        """
        variables = shared_variables(world, {})
        variables["TORCHELASTIC_RESTART_COUNT"] = str(generation)
        self.seat = Seat(
            rank=0,
            world=world,
            local_rank=0,
            local_world=world,
            device=choose_device(device, 0, world, count_gpus(None), shares=shares),
            run_id=variables["TORCHELASTIC_RUN_ID"],
            generation=generation,
            launcher="tpinfer",
            rendezvous=Path(variables["TPINFER_RENDEZVOUS"]),
        )
        sweep_stale()
        make_rendezvous(Path(variables["TPINFER_RENDEZVOUS"]))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ranks: list[RankProcess] = []
        self.on_end: Callable[[], None] | None = None
        """Called once, on a thread of this object, soon after a follower has failed."""
        self._closing, started = threading.Event(), threading.Event()
        self._failed_start: BaseException | None = None
        self._thread = threading.Thread(
            target=self._keep,
            args=(module, argv, variables, started),
            name="tpinfer-followers",
            daemon=True,
        )
        self._thread.start()
        started.wait()
        if self._failed_start is not None:
            self.close()
            raise self._failed_start

    def explain(self, error: RankError) -> RankError:
        """`error` as rank 0 met it, or what a follower that has ended said of its own end."""
        for rank, process in zip(self._ranks, self._processes, strict=True):
            try:
                status = process.wait(0.5)  # a cause is known before its effect, if barely
            except subprocess.TimeoutExpired:
                continue
            if status:
                failure = read_failure(rank.rank, rank.read_report(), status)
                return RankError(failure.text())
        return error

    @property
    def has_failed(self) -> bool:
        """Whether any has ended otherwise than well."""
        return any(process.poll() for process in self._processes)

    def write_stacks(self) -> None:
        """Have those that run write their threads' stacks to standard error, and wait a moment
        for it; one that is stopped (SIGSTOP) cannot."""
        for process in self._processes:
            if process.poll() is None:
                os.kill(process.pid, STACKS_SIGNAL)
        self._closing.wait(_STACKS_S)

    def kill(self) -> None:
        """End the followers at once."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Wait for the followers to end, kill those that do not, and clear up. Twice is fine."""
        if self._closing.is_set():
            return
        for process in self._processes:
            try:
                process.wait(CLOSE_GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for rank in self._ranks:
            os.close(rank.report)
        self._closing.set()
        self._thread.join()
        remove_run(self.seat.run_id)

    def _keep(
        self, module: str, argv: Sequence[str], shared: Mapping[str, str], started: threading.Event
    ) -> None:
        """The followers' parent thread: the kernel ends them when it ends."""
        try:
            for rank in range(1, self.seat.world):
                self._start(rank, module, argv, shared)
        except BaseException as error:
            self._failed_start = error
        started.set()
        while not self._closing.wait(_LOOK_S):
            if self.on_end is not None and self.has_failed:
                self.on_end()
                self._closing.wait()

    def _start(
        self, rank: int, module: str, argv: Sequence[str], shared: Mapping[str, str]
    ) -> None:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read_end, False)
        own = {
            **shared,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "TPINFER_ERROR_FILE": f"/dev/fd/{write_end}",
        }
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *argv],
                env=child_environment(own),
                stdin=subprocess.DEVNULL,
                pass_fds=(write_end,),
                process_group=0,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self._processes.append(process)
        self._ranks.append(RankProcess(rank, process.pid, read_end))
