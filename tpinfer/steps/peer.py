"""One rank of another host as rank 0 sees it: its connection, and what it has said of itself."""

import socket
from collections import deque

from tpinfer.config.errors import RankError
from tpinfer.steps.admission import Attached
from tpinfer.steps.frames import (
    FAILED,
    FAILED_FIELDS,
    LEFT,
    REPORT,
    REPORT_FIELDS,
    STEP_FAILED,
    STEP_FAILED_FIELDS,
    FrameStream,
)
from tpinfer.steps.interface import (
    LARGEST_MESSAGE_BYTES,
    LARGEST_STEP_MESSAGE_BYTES,
    PROCESS_GONE,
    ReaderFailure,
    StepFailure,
)

_LIMITS = {
    REPORT: REPORT_FIELDS.size,
    STEP_FAILED: STEP_FAILED_FIELDS.size + LARGEST_STEP_MESSAGE_BYTES,
    FAILED: FAILED_FIELDS.size + LARGEST_MESSAGE_BYTES,
    LEFT: 0,
}
_MOST_UNTOLD = 64
_RECEIVE_BYTES = 1 << 16


class Peer:
    """Nothing here blocks."""

    def __init__(self, attached: Attached) -> None:
        self.rank = attached.rank
        self.pid = attached.pid
        self.connection: socket.socket = attached.connection
        self.descriptor = self.connection.fileno()
        self.is_open = True
        self.progress = (0, 0)
        self.failure: ReaderFailure | None = None
        self.failed_steps: deque[StepFailure] = deque(maxlen=_MOST_UNTOLD)
        self._has_left = False
        self._place = attached.place
        self._stream = FrameStream(_LIMITS, f"rank {self.rank} at {attached.place}")

    def push(self, text: memoryview) -> int:
        """Send what the kernel takes of `text`; returns how many bytes. All of it where the rank is
        gone: nobody waits for the rest."""
        try:
            return self.connection.send(text)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.hear()  # its own last words explain more
            self.lose(f"its connection broke ({error.strerror})")
            return len(text)

    def hear(self) -> None:
        """Take in what has come."""
        if not self.is_open:
            return
        try:
            received = self.connection.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(f"its connection broke ({error.strerror})")
            return
        if not received:
            self.lose("its process or its connection has ended")
            return
        self._stream.feed(received)
        try:
            while (found := self._stream.take()) is not None:
                self._note(*found)
        except RankError as error:
            self.lose(str(error))

    def lose(self, why: str) -> None:
        """Be done with the connection; a failure unless the rank said that it leaves, or said
        better itself."""
        if not self.is_open:
            return
        self.is_open = False
        self.connection.close()
        if self.failure is None and not self._has_left:
            words = f"{why} ({self._place})"
            self.failure = ReaderFailure(self.rank - 1, self.pid, PROCESS_GONE, words)

    def _note(self, kind: int, payload: bytes) -> None:
        index = self.rank - 1
        fields = {REPORT: REPORT_FIELDS, STEP_FAILED: STEP_FAILED_FIELDS, FAILED: FAILED_FIELDS}
        size = fields[kind].size if kind in fields else 0
        if len(payload) < size:
            raise RankError(f"a frame of kind {kind} has {len(payload)} bytes and needs {size}")
        message = payload[size:].decode(errors="replace")
        if kind == REPORT:
            generation, step = REPORT_FIELDS.unpack(payload)
            if generation > self.progress[0]:
                self.failed_steps.clear()
            self.progress = (generation, step)
        elif kind == STEP_FAILED:
            step_id, code = STEP_FAILED_FIELDS.unpack_from(payload)
            self.failed_steps.append(StepFailure(index, step_id, code, message))
        elif kind == FAILED:
            (code,) = FAILED_FIELDS.unpack_from(payload)
            self.failure = ReaderFailure(index, self.pid, code, message)
        else:
            self._has_left = True
