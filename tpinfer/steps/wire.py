"""One writer, many readers: framed bytes from rank 0 to every rank of a host, through shared
memory.

A segment holds a header, one slot per reader and a ring of bytes. The writer copies a frame into
the ring and then moves `head`; every reader copies it out and then moves its own `tail`. Both count
bytes and only grow, so full and empty cannot be confused. The slots also carry each rank's
`(generation, step, error)` back to the writer.

Does not serialise (see `steps.plan`), does not cross hosts, does not start or stop processes.

    header  0 magic, 1 ring bytes, 2 readers, 3 writer's pid, 4 its start, 5 closed, 16 head
    slot    0 pid, 1 start, 2 attached, 3 generation, 4 step, 5 error, 6 message bytes,
            7..30 message, 32 tail

in 64-bit words. `head` and each `tail` have 128 bytes to themselves: two sides never write the same
cache line.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tpinfer.config.errors import RankError
from tpinfer.steps.liveness import is_running, process_start_ticks
from tpinfer.steps.segment import Idler, Segment, find_segment, segment_path

_MAGIC = 0x7470_7769_7265_0001
_RING_BYTES, _NUM_READERS, _WRITER_PID, _WRITER_START, _CLOSED, _HEAD = 1, 2, 3, 4, 5, 16
_PID, _START, _ATTACHED, _GENERATION, _STEP, _ERROR, _MESSAGE_BYTES, _MESSAGE = range(8)
_TAIL = 32
_HEADER_WORDS, _SLOT_WORDS = 32, 48
_LARGEST_MESSAGE_BYTES = 8 * 24
_FRAME_HEADER_BYTES = 8
_CONTINUES = 1 << 63
_PROCESS_CHECK_NS = 100_000_000
PROCESS_GONE = 1
"""Code of a failure nobody reported: the reader's process has ended."""


@dataclass(frozen=True, slots=True)
class ReaderFailure:
    """A reader that reported an error, or whose process is gone."""

    index: int
    """Slot of the reader: its rank less one where rank 0 writes."""
    pid: int
    """Process of the reader."""
    code: int
    """What the reader passed to `fail`, or PROCESS_GONE."""
    message: str
    """The reader's own words, cut to 192 bytes."""


def _slot(index: int) -> int:
    return _HEADER_WORDS + _SLOT_WORDS * index


def _padded(size: int) -> int:
    return (size + 7) & ~7


class PlanWriter:
    """The sending end. Makes the segment; unlinks its name as soon as every reader has attached."""

    def __init__(
        self,
        name: str,
        num_readers: int,
        capacity_bytes: int = 1 << 20,
        timeout_s: float | None = 300.0,
    ) -> None:
        """`name` is `<run id>-<what>`, unique on the host; `timeout_s` bounds the wait for slow
        readers.

        Raises ValueError for no readers or a ring under 64 bytes, OSError when /dev/shm is full.
        """
        if num_readers < 1:
            raise ValueError(
                f"num_readers={num_readers} must be at least 1; a lone rank needs no wire"
            )
        if capacity_bytes < 64:
            raise ValueError(f"capacity_bytes={capacity_bytes} must be at least 64")
        self.num_readers = num_readers
        self._timeout_s = timeout_s
        self._ring_bytes = self._free_until = _padded(capacity_bytes)
        self._head = self._processes_checked_ns = 0
        self._path: Path | None = segment_path(name)
        pid = os.getpid()
        header = {
            0: _MAGIC,
            _RING_BYTES: self._ring_bytes,
            _NUM_READERS: num_readers,
            _WRITER_PID: pid,
            _WRITER_START: process_start_ticks(pid) or 0,
        }
        self._segment: Segment | None = Segment.create(
            self._path, 8 * _slot(num_readers), self._ring_bytes, header
        )

    def _mapped(self) -> Segment:
        if self._segment is None:
            raise RankError("the step-plan wire was closed on this rank; open a new engine")
        return self._segment

    def send(self, payload: bytes) -> None:
        """Append one frame; waits while the slowest reader leaves no room.

        A payload beyond half the ring goes in parts, which the reader joins. Raises RankError when
        a reader has failed while the ring is full, or the time-out passes.
        """
        largest = self._ring_bytes // 2 - _FRAME_HEADER_BYTES
        if len(payload) <= largest:
            self._send_part(payload, 0)
        else:
            view = memoryview(payload)
            for start in range(0, len(payload), largest):
                part = view[start : start + largest]
                self._send_part(part, _CONTINUES if start + largest < len(payload) else 0)
        if self._path is not None and self.all_attached():
            self._unlink()

    def _send_part(self, part: bytes | memoryview, flag: int) -> None:
        segment = self._mapped()
        end = self._head + _FRAME_HEADER_BYTES + _padded(len(part))
        if end > self._free_until:
            self._wait_for_room(end)
        segment.copy_in(self._head, (len(part) | flag).to_bytes(8, "little"))
        segment.copy_in(self._head + _FRAME_HEADER_BYTES, part)
        self._head = end
        segment.store(_HEAD, end)

    def _wait_for_room(self, end: int) -> None:
        segment = self._mapped()
        idler = Idler(
            "waiting for a rank to read its step plans", self._timeout_s, self._check_readers
        )
        while True:
            tails = [segment.load(_slot(i) + _TAIL) for i in range(self.num_readers)]
            self._free_until = min(tails) + self._ring_bytes
            if end <= self._free_until:
                return
            idler.pause()

    def _check_readers(self) -> None:
        failures = self.failed_readers(check_processes=True)
        if failures:
            first = failures[0]
            raise RankError(
                f"rank behind slot {first.index} (process {first.pid}) failed: {first.message}"
            )

    def all_attached(self) -> bool:
        """Whether every reader has opened the segment."""
        words = self._mapped().words
        return all(words[_slot(i) + _ATTACHED] for i in range(self.num_readers))

    def wait_attached(self, timeout_s: float) -> None:
        """Block until every reader has opened the segment, then unlink its name. Raises RankError
        on time-out.
        """
        what = f"waiting for {self.num_readers} rank(s) to open the step-plan segment"
        idler = Idler(what, timeout_s, self._check_readers)
        while not self.all_attached():
            idler.pause()
        self._unlink()

    def failed_readers(self, check_processes: bool | None = None) -> list[ReaderFailure]:
        """Readers that called `fail`, and readers whose process has ended, in slot order.

        Cheap enough for every step: error words are always read; processes are looked up at most
        every 100 ms unless `check_processes` says otherwise.
        """
        segment, now_ns = self._mapped(), time.monotonic_ns()
        if check_processes is None:
            check_processes = now_ns - self._processes_checked_ns > _PROCESS_CHECK_NS
        if check_processes:
            self._processes_checked_ns = now_ns
        failures = []
        for index in range(self.num_readers):
            slot = _slot(index)
            code, pid = segment.load(slot + _ERROR), segment.words[slot + _PID]
            if code:
                failures.append(ReaderFailure(index, pid, code, _read_message(segment, slot)))
            elif check_processes and pid and not is_running(pid, segment.words[slot + _START]):
                failures.append(ReaderFailure(index, pid, PROCESS_GONE, "its process has ended"))
        return failures

    def reader_progress(self) -> list[tuple[int, int]]:
        """Last `(generation, step)` each reader reported, in slot order."""
        words = self._mapped().words
        slots = [_slot(index) for index in range(self.num_readers)]
        return [(words[slot + _GENERATION], words[slot + _STEP]) for slot in slots]

    def _unlink(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    def close(self) -> None:
        """Tell readers that nothing follows, remove the name and unmap. May be called twice."""
        if self._segment is not None:
            self._segment.store(_CLOSED, 1)
            self._unlink()
            self._segment.close()
            self._segment = None


def _read_message(segment: Segment, slot: int) -> str:
    size = min(segment.words[slot + _MESSAGE_BYTES], _LARGEST_MESSAGE_BYTES)
    padded = segment.words[slot + _MESSAGE : slot + _MESSAGE + _padded(size) // 8].tobytes()
    return padded[:size].decode(errors="replace")


class PlanReader:
    """The receiving end, one per rank other than the writer's."""

    def __init__(self, name: str, index: int, timeout_s: float | None = 60.0) -> None:
        """Wait up to `timeout_s` for the writer's segment `name`, then take slot `index` (from 0).

        Raises RankError on time-out, ValueError for a slot that is taken or does not exist.
        """
        self._segment: Segment | None = _open_segment(name, timeout_s)
        words = self._segment.words
        num_readers, self._slot = words[_NUM_READERS], _slot(index)
        if not 0 <= index < num_readers:
            raise ValueError(f"index={index} must be in 0..{num_readers - 1}, one slot per reader")
        if words[self._slot + _ATTACHED]:
            raise ValueError(
                f"slot {index} of {name} is taken by process {words[self._slot + _PID]}"
            )
        self._tail = self._head = 0
        self._writer = (words[_WRITER_PID], words[_WRITER_START])
        pid = os.getpid()
        words[self._slot + _PID] = pid
        words[self._slot + _START] = process_start_ticks(pid) or 0
        self._segment.store(self._slot + _ATTACHED, 1)
        if all(words[_slot(i) + _ATTACHED] for i in range(num_readers)):
            segment_path(name, self._writer[0]).unlink(missing_ok=True)

    def _mapped(self) -> Segment:
        if self._segment is None:
            raise RankError("the step-plan wire was closed on this rank; open a new engine")
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
        header = int.from_bytes(segment.copy_out(self._tail, _FRAME_HEADER_BYTES), "little")
        size = header & ~_CONTINUES
        part = segment.copy_out(self._tail + _FRAME_HEADER_BYTES, size)
        self._tail += _FRAME_HEADER_BYTES + _padded(size)
        segment.store(self._slot + _TAIL, self._tail)
        return part, bool(header & _CONTINUES)

    def _wait_for_frame(self, timeout_s: float | None, poll: Callable[[], None] | None) -> None:
        segment, tail = self._mapped(), self._tail
        idler = Idler("waiting for rank 0's next step plan", timeout_s, self._check_writer, poll)
        while True:
            self._head = segment.load(_HEAD)
            if self._head != tail:
                return
            # Closed is looked at first and the head once more after it: the last frame precedes the
            # close.
            if segment.load(_CLOSED) and segment.load(_HEAD) == tail:
                raise RankError("rank 0 closed the step-plan wire; its own error says why")
            idler.pause()

    def _check_writer(self) -> None:
        if not is_running(*self._writer):
            raise RankError(f"rank 0 (process {self._writer[0]}) has ended; its own error says why")

    def report(self, generation: int, step: int) -> None:
        """Say which step this rank has finished; `PlanWriter.reader_progress` shows it."""
        words = self._mapped().words
        words[self._slot + _GENERATION] = generation
        words[self._slot + _STEP] = step

    def fail(self, message: str, code: int = 2) -> None:
        """Tell the writer that this rank cannot go on. `code` must not be 0; the message is cut to
        192 bytes.
        """
        if code <= 0:
            raise ValueError(f"code={code} must be positive; 0 means no error")
        segment = self._mapped()
        text = message.encode()[:_LARGEST_MESSAGE_BYTES]
        for offset in range(0, len(text), 8):
            word = int.from_bytes(text[offset : offset + 8], "little")
            segment.words[self._slot + _MESSAGE + offset // 8] = word
        segment.words[self._slot + _MESSAGE_BYTES] = len(text)
        segment.store(self._slot + _ERROR, code)

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
        header = memoryview(os.pread(descriptor, 8 * _HEADER_WORDS, 0)).cast("Q")
        if header[0] != _MAGIC:
            raise RankError(f"{path} is not a step-plan segment of this version; remove it")
        return Segment(descriptor, 8 * _slot(header[_NUM_READERS]))
    finally:
        os.close(descriptor)


def _open_existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return -1
