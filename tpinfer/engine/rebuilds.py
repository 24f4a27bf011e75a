"""What rank 0 does about ranks that are dead or hang: tell what is known of them, end what waits
for them, and where it started them itself go on with new ones."""

import contextlib
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from tpinfer.config.errors import RankError
from tpinfer.engine.step_watch import StepWatch
from tpinfer.launching.guard import STACKS_SIGNAL
from tpinfer.steps.interface import PlanWriter
from tpinfer.steps.liveness import is_running
from tpinfer.worker.assemble import Assembly

OpenNext = Callable[[RankError], tuple[Assembly, PlanWriter]]
"""Why the ranks are given up -> those of the next generation. Raises RankError."""
_NOTICE_S = 2.0
"""How long a wait may go on after its group was called off."""
_STDERR = 2


class RebuildsOverError(RankError):
    """New ranks were started too often."""


class Rebuilds:
    """Counts generations that ended before any request did."""

    def __init__(self, most: int, open_next: OpenNext, end_ranks: Callable[[str], None]) -> None:
        """`end_ranks` is told why, has the other ranks write their stacks, and kills them."""
        self._most = most
        self._open_next = open_next
        self._num_in_a_row = 0
        self._over: str | None = None
        self.end_ranks = end_ranks

    def next_generation(self, error: RankError) -> tuple[Assembly, PlanWriter]:
        """New ranks in place of those that ended with `error`. Raises RankError when that was tried
        too often."""
        while self._num_in_a_row < self._most:
            self._num_in_a_row += 1
            try:
                return self._open_next(error)
            except RankError as again:
                error = again
        if self._most == 0:
            raise error
        self._over = self._over or (
            f"{error}; the engine was rebuilt {self._num_in_a_row} times in a row and no request "
            f"came to its end (max_rebuilds={self._most}); mend the cause and start a new engine"
        )
        raise RebuildsOverError(self._over) from error

    def progressed(self) -> None:
        """A request has ended."""
        self._num_in_a_row = 0


def silent_ranks(wire: PlanWriter, generation: int, step_id: int) -> list[int]:
    """Ranks behind rank 0 that have not reported a step."""
    progress = wire.reader_progress()
    return [rank for rank, done in enumerate(progress, 1) if done < (generation, step_id)]


def call_off(
    assembly: Assembly,
    watch: StepWatch,
    end_ranks: Callable[[str], None] | None,
    words: str,
    silent: Sequence[int] = (),
) -> None:
    """A step is late: write `words` and every rank's stacks, then end what waits.

    Where a launcher started the ranks, this one ends too, so that the launcher restarts or ends
    them all; when its thread is stuck in native code, by SIGTERM. `silent` are processes of other
    ranks, which then have as long to end, and are killed: launchers ask them first and wait (30 s
    under torchrun).
    """
    print(words, file=sys.stderr, flush=True)
    faulthandler.dump_traceback(_STDERR, all_threads=True)
    for pid in silent:
        _signal(pid, STACKS_SIGNAL)
    if end_ranks is not None:
        end_ranks(words)
    assembly.abort()
    if end_ranks is not None:
        return
    until_s = time.monotonic() + _NOTICE_S
    while time.monotonic() < until_s and (watch.is_waiting or any(map(is_running, silent))):
        time.sleep(0.01)
    for pid in filter(is_running, silent):
        _signal(pid, signal.SIGKILL)
    if watch.is_waiting:
        os.kill(os.getpid(), signal.SIGTERM)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
