"""Follow started ranks to their end: pass signals on, end all when one fails, say which failed
first and why.

Does not start ranks and does not start them again.
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence

from tpinfer.launching.child import RankProcess
from tpinfer.launching.failure import Failure, read_failure

INTERRUPT_GRACE_S = 3.0
"""From a passed-on Ctrl-C to SIGKILL."""
FAILURE_GRACE_S = 2.0
"""From the first failure to SIGKILL of the ranks that are left."""
FINISH_GRACE_S = 10.0
"""How long ranks may outlive a rank 0 that ended well."""
QUIET_EXIT = 128 + signal.SIGPIPE
"""Exit code of a rank whose reader went away (`| head`): an end, not a failure."""
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def caught_signals() -> Iterator[int]:
    """Turn SIGINT, SIGTERM, SIGHUP and SIGCHLD into bytes on the descriptor it gives, one per
    signal.

    Only the main thread may do this. Previous handlers come back at the end.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    former_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    former = {n: signal.signal(n, lambda *_: None) for n in (*_STOPPING, signal.SIGCHLD)}
    try:
        yield read_end
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(former_fd)
        os.close(read_end)
        os.close(write_end)


class Watch:
    """The state of one run from the start of its ranks to the end of the last."""

    def __init__(
        self, ranks: Sequence[RankProcess], signals: int, keyboard: "Keyboard | None"
    ) -> None:
        """`signals` comes from `caught_signals`; `keyboard` feeds rank 0 from a terminal."""
        self._ranks = ranks
        self._signals = signals
        self._keyboard = keyboard
        self._failure: Failure | None = None
        self._failure_status = 0
        self._stop_signal = 0
        self._quiet_code = 0
        self._kill_at_s: float | None = None
        self._rank_0_ended_s: float | None = None

    def follow(self) -> int:
        """Return once every rank has ended: 0, the first failing rank's code, or 128 + n when
        stopped by signal n.
        """
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        while self._running():
            # Typing is looked for by time alone: a line that cannot be passed on yet must not spin.
            if poll.poll(100 if self._keyboard is None else 20):
                self._take_signals()
            if self._keyboard is not None and not self._keyboard.pump():
                self._keyboard = None
            self._reap()
            self._keep_deadlines()
        if self._stop_signal == signal.SIGINT and self._ranks[0].exit_status == -signal.SIGKILL:
            # It sat in native code, where a signal cannot reach it, and could not say so itself.
            print("stopped", file=sys.stderr, flush=True)
        return self._exit_code()

    def _running(self) -> list[RankProcess]:
        return [rank for rank in self._ranks if rank.exit_status is None]

    def _exit_code(self) -> int:
        if self._stop_signal:
            return 128 + self._stop_signal
        if self._failure is None:
            return self._quiet_code
        status = self._failure_status or self._ranks[self._failure.rank].exit_status or 1
        return 128 - status if status < 0 else status

    def _take_signals(self) -> None:
        for number in os.read(self._signals, 4096):
            if number not in _STOPPING:
                continue
            if self._stop_signal:
                self._signal_all(signal.SIGKILL)  # asked twice: do not wait
            self._stop_signal = self._stop_signal or number
            self._stop_all(number, INTERRUPT_GRACE_S)

    def _stop_all(self, number: int, grace_s: float) -> None:
        if self._kill_at_s is None:
            self._kill_at_s = time.monotonic() + grace_s
            self._signal_all(number)

    def _signal_all(self, number: int) -> None:
        for rank in self._running():
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(rank.pid, number)  # helpers of the rank too
                else:
                    os.kill(rank.pid, number)

    def _reap(self) -> None:
        failed = []
        for rank in self._running():
            pid, status = os.waitpid(rank.pid, os.WNOHANG)
            if pid == 0:
                continue
            rank.exit_status = os.waitstatus_to_exitcode(status)
            rank.read_report()
            if rank.rank == 0:
                self._rank_0_ended_s = time.monotonic()
            if rank.exit_status == QUIET_EXIT and not rank.report_text:
                self._quiet_code = QUIET_EXIT
                self._stop_all(signal.SIGTERM, FAILURE_GRACE_S)
            elif rank.exit_status != 0:
                failed.append(rank)
        if failed and self._kill_at_s is None:
            self._failure = self._first_failure()
            # A rank that has told why but still winds up may end by our signal instead of its code.
            first = self._ranks[self._failure.rank].exit_status
            self._failure_status = first or failed[0].exit_status or 1
            print(self._failure.text(), file=sys.stderr, flush=True)
            self._stop_all(signal.SIGTERM, FAILURE_GRACE_S)

    def _first_failure(self) -> Failure:
        """The cause among all failures known so far.

        A killed rank had no time to report and everything else follows from its end. Otherwise the
        earliest report counts, also that of a rank still winding up: one that suffered from its
        failure may be gone before it.
        """
        ended = [rank for rank in self._ranks if rank.exit_status]
        for rank in ended:
            if (rank.exit_status or 0) < 0:
                return read_failure(rank.rank, rank.report_text, rank.exit_status or 0)
        told = [rank for rank in self._ranks if rank in ended or rank.read_report()]
        failures = [
            read_failure(rank.rank, rank.report_text, rank.exit_status or 1) for rank in told
        ]
        return min(failures, key=lambda failure: failure.at_ns)

    def _keep_deadlines(self) -> None:
        now_s = time.monotonic()
        if self._kill_at_s is not None and now_s > self._kill_at_s:
            self._signal_all(signal.SIGKILL)
        late = self._running()
        if self._kill_at_s is None and late and self._rank_0_ended_s is not None:
            if now_s < self._rank_0_ended_s + FINISH_GRACE_S:
                return
            what = f"still runs {FINISH_GRACE_S:g} s after rank 0 ended; it was stopped"
            self._failure = Failure(late[0].rank, time.monotonic_ns(), what, "")
            print(self._failure.text(), file=sys.stderr, flush=True)
            self._stop_all(signal.SIGTERM, FAILURE_GRACE_S)


class Keyboard:
    """Carries what is typed at a terminal to rank 0, which as a background group may not read there
    itself.
    """

    def __init__(self) -> None:
        self.source = 0
        self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.write_end, False)
        self._waiting = b""

    def pump(self) -> bool:
        """Move what has been typed, if anything; false once there is nothing left to carry or
        nobody to read it.
        """
        try:
            if not self._waiting and select.select([self.source], [], [], 0)[0]:
                if os.tcgetpgrp(self.source) != os.getpgrp():
                    return True  # in the background the terminal is not ours to read
                self._waiting = os.read(self.source, 4096)
                if not self._waiting:
                    return self._end()
            if self._waiting:
                self._waiting = self._waiting[os.write(self.write_end, self._waiting) :]
        except BlockingIOError:
            return True  # rank 0 has not read the last lines yet
        except OSError:
            return self._end()
        return True

    def _end(self) -> bool:
        os.close(self.write_end)
        return False
