"""The receiving end of the step-plan wire through shared memory; see `steps.shm_writer`."""

import os
from collections.abc import Callable
from pathlib import Path

from tpinfer.config.errors import RankError
from tpinfer.steps import slots
from tpinfer.steps.interface import PlanReader, check_format_version, closed_here
from tpinfer.steps.liveness import is_running, process_start_ticks
from tpinfer.steps.segment import Idler, Segment, find_segment, segment_path
from tpinfer.steps.slots import (
    CONTINUES,
    FRAME_HEADER_BYTES,
    padded,
    publish_failure,
    publish_step_failure,
    slot_of,
)


class ShmPlanReader(PlanReader):
    """The receiving end, one per rank other than the writer's."""

    def __init__(self, name: str, index: int, timeout_s: float | None = 60.0) -> None:
        """Wait up to `timeout_s` for the writer's segment `name`, then take slot `index` (from 0).

        Raises RankError on time-out, ValueError for a slot that is taken or does not exist.
        """
        self._segment: Segment | None = _open_segment(name, timeout_s)
        words = self._segment.words
        num_readers, self._slot = words[slots.NUM_READERS], slot_of(index)
        if not 0 <= index < num_readers:
            raise ValueError(f"index={index} must be in 0..{num_readers - 1}, one slot per reader")
        if words[self._slot + slots.ATTACHED]:
            raise ValueError(
                f"slot {index} of {name} is taken by process {words[self._slot + slots.PID]}"
            )
        self._tail = self._head = 0
        self._writer = (words[slots.WRITER_PID], words[slots.WRITER_START])
        pid = os.getpid()
        words[self._slot + slots.PID] = pid
        words[self._slot + slots.START] = process_start_ticks(pid) or 0
        self._segment.store(self._slot + slots.ATTACHED, 1)
        if all(words[slot_of(i) + slots.ATTACHED] for i in range(num_readers)):
            segment_path(name, self._writer[0]).unlink(missing_ok=True)

    def _mapped(self) -> Segment:
        if self._segment is None:
            raise closed_here()
        return self._segment

    def receive(
        self, timeout_s: float | None = None, poll: Callable[[], None] | None = None
    ) -> bytes:
        """The next frame, in order. `poll` runs every ms of waiting and may raise.

        Raises RankError on time-out, when the writer has closed the wire and all was read, or when
        its process is gone.
        """
        if self._head == self._tail:
            self._wait_for_frame(timeout_s, poll)
        part, continues = self._take_part()
        if not continues:
            return part
        parts = [part]
        while continues:
            if self._head == self._tail:
                self._wait_for_frame(timeout_s, poll)
            part, continues = self._take_part()
            parts.append(part)
        return b"".join(parts)

    def _take_part(self) -> tuple[bytes, bool]:
        segment = self._mapped()
        header = int.from_bytes(segment.copy_out(self._tail, FRAME_HEADER_BYTES), "little")
        size = header & ~CONTINUES
        part = segment.copy_out(self._tail + FRAME_HEADER_BYTES, size)
        self._tail += FRAME_HEADER_BYTES + padded(size)
        segment.store(self._slot + slots.TAIL, self._tail)
        return part, bool(header & CONTINUES)

    def _wait_for_frame(self, timeout_s: float | None, poll: Callable[[], None] | None) -> None:
        segment, tail = self._mapped(), self._tail
        idler = Idler("waiting for rank 0's next step plan", timeout_s, self._check_writer, poll)
        while True:
            self._head = segment.load(slots.HEAD)
            if self._head != tail:
                return
            # Closed is looked at first and the head once more after it: the last frame precedes the
            # close.
            if segment.load(slots.CLOSED) and segment.load(slots.HEAD) == tail:
                raise RankError("rank 0 closed the step-plan wire; its own error says why")
            idler.pause()

    def _check_writer(self) -> None:
        if not is_running(*self._writer):
            raise RankError(f"rank 0 (process {self._writer[0]}) has ended; its own error says why")

    def report(self, generation: int, step: int) -> None:
        """Say which step this rank has finished; `reader_progress` shows it."""
        words = self._mapped().words
        words[self._slot + slots.GENERATION] = generation
        words[self._slot + slots.STEP] = step

    def fail(self, message: str, code: int = 2) -> None:
        """Tell the writer that this rank cannot go on. `code` must not be 0; the message is cut to
        192 bytes.
        """
        publish_failure(self._mapped(), self._slot, code, message)

    def fail_step(self, step_id: int, code: int, message: str) -> None:
        """Say that this rank could not do a step but lives on; the message is cut to 96 bytes.

        Call it before the step's last collective. Of more than three that rank 0 has not heard, it
        hears the latest three.
        """
        publish_step_failure(self._mapped(), self._slot, step_id, code, message)

    def close(self) -> None:
        """Unmap. May be called twice."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None


def _open_segment(name: str, timeout_s: float | None) -> Segment:
    """Map the writer's segment once it appears. Raises RankError on time-out."""
    idler = Idler(f"waiting for rank 0 to make the segment {name}", timeout_s, lambda: None)
    while True:
        path = find_segment(name)
        descriptor = -1 if path is None else _open_existing(path)
        if descriptor >= 0:
            break
        idler.pause()
    try:
        header = memoryview(os.pread(descriptor, 8 * slots.HEADER_WORDS, 0)).cast("Q")
        if header[0] != slots.MAGIC:
            raise RankError(f"{path} is not a step-plan segment of this version; remove it")
        check_format_version(header[slots.FORMAT], "rank 0")
        return Segment(descriptor, 8 * slot_of(header[slots.NUM_READERS]))
    finally:
        os.close(descriptor)


def _open_existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return -1
