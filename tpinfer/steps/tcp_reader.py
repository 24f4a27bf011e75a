"""The receiving end of the step-plan wire on a host other than rank 0's, over TCP."""

import contextlib
import select
import socket
import time
from collections.abc import Callable

from tpinfer.config.errors import RankError
from tpinfer.steps.attach import attach, rank_0_at
from tpinfer.steps.frames import (
    CLOSE,
    FAILED,
    FAILED_FIELDS,
    LARGEST_PLAN_BYTES,
    LEFT,
    PLAN,
    REPORT,
    REPORT_FIELDS,
    STEP_FAILED,
    STEP_FAILED_FIELDS,
    FrameStream,
    frame,
)
from tpinfer.steps.handshake import WireRun
from tpinfer.steps.interface import (
    LARGEST_MESSAGE_BYTES,
    LARGEST_STEP_MESSAGE_BYTES,
    PlanReader,
    check_code,
    closed_here,
    cut,
)
from tpinfer.steps.sockets import end_sending

_LIMITS = {PLAN: LARGEST_PLAN_BYTES, CLOSE: 0}
_LAST_WORDS_S = 1.0
_POLL_MS, _WAIT_MS = 1, 50
_RECEIVE_BYTES = 1 << 18
_MOST_UNSENT_BYTES = 1 << 16
_MOST_UNREAD = 256


class TcpPlanReader(PlanReader):
    """One per rank that is not on rank 0's host."""

    def __init__(
        self, address: str, port: int, run: WireRun, rank: int, timeout_s: float | None = 60.0
    ) -> None:
        """Connect, waiting up to `timeout_s` for rank 0 to listen.

        Raises RankError on time-out, and at once where rank 0 refuses this rank or cannot prove
        that it is rank 0.
        """
        self._who = rank_0_at(address, port)
        self._connection: socket.socket | None = attach(address, port, run, rank, timeout_s)
        self._connection.setblocking(False)
        self._poller = select.poll()
        self._poller.register(self._connection, select.POLLIN)
        self._stream = FrameStream(_LIMITS, self._who)
        self._unsent = b""
        self._report = b""
        """The latest, while it cannot be sent."""

    def _connected(self) -> socket.socket:
        if self._connection is None:
            raise closed_here()
        return self._connection

    def receive(
        self, timeout_s: float | None = None, poll: Callable[[], None] | None = None
    ) -> bytes:
        """The next frame, in order. `poll` runs every ms of waiting and may raise.

        Raises RankError on time-out, when rank 0 has closed the wire and all was read, or when its
        connection has ended.
        """
        connection = self._connected()
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while (found := self._stream.take()) is None:
            if until_s is not None and time.monotonic() > until_s:
                raise RankError(
                    f"waiting for rank 0's next step plan took longer than {timeout_s:g} s; "
                    "look for a stuck rank or raise the wait time-out"
                )
            if self._poller.poll(_WAIT_MS if poll is None else _POLL_MS):
                self._take_in(connection)
                continue
            self._flush()
            if poll is not None:
                poll()
        kind, payload = found
        if kind == CLOSE:
            raise RankError("rank 0 closed the step-plan wire; its own error says why")
        return payload

    def _take_in(self, connection: socket.socket) -> None:
        try:
            received = connection.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise RankError(f"the connection to {self._who} broke ({error.strerror})") from error
        if not received:
            raise RankError(f"{self._who} has ended; its own error says why")
        self._stream.feed(received)

    def report(self, generation: int, step: int) -> None:
        """Say which step this rank has finished; never waits. Where rank 0 does not listen for
        long, it hears the latest."""
        self._connected()
        self._report = frame(REPORT, REPORT_FIELDS.pack(generation, step))
        self._flush()

    def fail_step(self, step_id: int, code: int, message: str) -> None:
        """Say that this rank could not do a step but lives on; the message is cut to 96 bytes.
        Never waits. Call it before the step's last collective: rank 0 hears of it about when that
        ends, if not before, and the step is named."""
        check_code(code)
        self._connected()
        fields = STEP_FAILED_FIELDS.pack(step_id, code)
        text = frame(STEP_FAILED, fields + cut(message, LARGEST_STEP_MESSAGE_BYTES))
        if len(self._unsent) + len(text) <= _MOST_UNSENT_BYTES:
            self._unsent += text
        self._flush()

    def fail(self, message: str, code: int = 2) -> None:
        """Tell rank 0 that this rank cannot go on; the message is cut to 192 bytes. Waits up to a
        second until that is on its way."""
        check_code(code)
        self._connected()
        text = cut(message, LARGEST_MESSAGE_BYTES)
        self._unsent += frame(FAILED, FAILED_FIELDS.pack(code) + text)
        self._flush_within(_LAST_WORDS_S)

    def _flush(self) -> bool:
        """Send what waits to be sent, as far as the kernel takes it; says whether all is gone."""
        connection = self._connected()
        try:
            if self._unsent:
                self._unsent = self._unsent[connection.send(self._unsent) :]
            if self._report and not self._unsent:
                self._unsent, self._report = self._report, b""
                self._unsent = self._unsent[connection.send(self._unsent) :]
        except BlockingIOError:
            return False
        except OSError:  # `receive` meets the same end of the connection and tells of it
            self._unsent = self._report = b""
        return not self._unsent

    def _flush_within(self, timeout_s: float) -> None:
        until_s = time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self._connected(), select.POLLOUT)
        while not self._flush() and time.monotonic() < until_s:
            poller.poll(_WAIT_MS)

    def close(self) -> None:
        """Tell rank 0 that this rank leaves, and close the connection. May be called twice."""
        connection = self._connection
        if connection is None:
            return
        self._unsent += frame(LEFT)
        self._flush_within(_LAST_WORDS_S)
        self._connection = None
        end_sending(connection)
        with contextlib.suppress(OSError):
            for _ in range(_MOST_UNREAD):  # what stays unread would make the kernel drop LEFT
                if not connection.recv(_RECEIVE_BYTES):
                    break
        connection.close()
