"""One writer, many readers: framed bytes from rank 0 to every rank of a host, through shared
memory.

A segment holds a header, one slot per reader and a ring of bytes; `steps.slots` says what their
words mean. The writer copies a frame into the ring and then moves `head`; every reader copies it
out and then moves its own `tail`. Both count bytes and only grow, so full and empty cannot be
confused. The slots also carry each rank's status back to the writer.

Does not serialise (see `steps.plan`), does not cross hosts (see `steps.tcp_writer`), does not start
or stop processes.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from tpinfer.config.errors import RankError
from tpinfer.steps import slots
from tpinfer.steps.interface import (
    PROCESS_GONE,
    PlanWriter,
    ReaderFailure,
    StepFailure,
    closed_here,
)
from tpinfer.steps.liveness import is_running, process_start_ticks
from tpinfer.steps.plan import FORMAT_VERSION
from tpinfer.steps.segment import Idler, Segment, segment_path
from tpinfer.steps.slots import (
    CONTINUES,
    FRAME_HEADER_BYTES,
    padded,
    read_failure,
    read_step_failures,
    slot_of,
)

_PROCESS_CHECK_NS = 100_000_000


class ShmPlanWriter(PlanWriter):
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
        self._ring_bytes = self._free_until = padded(capacity_bytes)
        self._head = self._processes_checked_ns = 0
        self._path: Path | None = segment_path(name)
        pid = os.getpid()
        header = {
            0: slots.MAGIC,
            slots.RING_BYTES: self._ring_bytes,
            slots.NUM_READERS: num_readers,
            slots.WRITER_PID: pid,
            slots.WRITER_START: process_start_ticks(pid) or 0,
            slots.FORMAT: FORMAT_VERSION,
        }
        self._segment: Segment | None = Segment.create(
            self._path, 8 * slot_of(num_readers), self._ring_bytes, header
        )
        self._errors = self._in_every_slot(slots.ERROR)
        self._num_failed = self._in_every_slot(slots.NUM_FAILED)
        self._num_told = [0] * num_readers

    def _mapped(self) -> Segment:
        if self._segment is None:
            raise closed_here()
        return self._segment

    def _in_every_slot(self, word: int) -> memoryview:
        """One word of each slot, so that all can be read at once."""
        first, end = slot_of(0) + word, slot_of(self.num_readers)
        return self._mapped().words[first : end : slots.SLOT_WORDS]

    def _read_all(self, view: memoryview) -> list[int]:
        segment = self._mapped()
        if not segment.keeps_order:
            segment.load(slots.HEAD)  # whatever was stored before is visible from here on
        return view.tolist()

    def send(self, payload: bytes) -> None:
        """Append one frame; waits while the slowest reader leaves no room.

        A payload beyond half the ring goes in parts, which the reader joins. Raises RankError when
        a reader has failed while the ring is full, or the time-out passes.
        """
        largest = self._ring_bytes // 2 - FRAME_HEADER_BYTES
        if len(payload) <= largest:
            self._send_part(payload, 0)
        else:
            view = memoryview(payload)
            for start in range(0, len(payload), largest):
                part = view[start : start + largest]
                self._send_part(part, CONTINUES if start + largest < len(payload) else 0)
        if self._path is not None and self.all_attached():
            self._unlink()

    def _send_part(self, part: bytes | memoryview, flag: int) -> None:
        segment = self._mapped()
        end = self._head + FRAME_HEADER_BYTES + padded(len(part))
        if end > self._free_until:
            self._wait_for_room(end)
        segment.copy_in(self._head, (len(part) | flag).to_bytes(8, "little"))
        segment.copy_in(self._head + FRAME_HEADER_BYTES, part)
        self._head = end
        segment.store(slots.HEAD, end)

    def _wait_for_room(self, end: int) -> None:
        segment = self._mapped()
        idler = Idler(
            "waiting for a rank to read its step plans", self._timeout_s, self._check_readers
        )
        while True:
            tails = [segment.load(slot_of(i) + slots.TAIL) for i in range(self.num_readers)]
            self._free_until = min(tails) + self._ring_bytes
            if end <= self._free_until:
                return
            idler.pause()

    def _check_readers(self) -> None:
        failures = self.failed_readers(check_processes=True)
        if failures:
            first = failures[0]
            raise RankError(f"rank {first.rank} (process {first.pid}) failed: {first.message}")

    def all_attached(self) -> bool:
        """Whether every reader has opened the segment."""
        words = self._mapped().words
        return all(words[slot_of(i) + slots.ATTACHED] for i in range(self.num_readers))

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
        elif not any(self._read_all(self._errors)):
            return []
        failures = []
        for index in range(self.num_readers):
            failure = read_failure(segment, index)
            if failure is None and check_processes:
                failure = self._gone(index)
            if failure is not None:
                failures.append(failure)
        return failures

    def _gone(self, index: int) -> ReaderFailure | None:
        words, slot = self._mapped().words, slot_of(index)
        pid = words[slot + slots.PID]
        if not pid or is_running(pid, words[slot + slots.START]):
            return None
        return ReaderFailure(index, pid, PROCESS_GONE, "its process has ended")

    def failed_steps(self) -> list[StepFailure]:
        """Steps that readers could not do, in slot order; each is told once."""
        segment, counts = self._mapped(), self._read_all(self._num_failed)
        if counts == self._num_told:
            return []
        told, self._num_told = self._num_told, counts
        return [
            failure
            for index in range(self.num_readers)
            if counts[index] != told[index]
            for failure in read_step_failures(segment, index, told[index], counts[index])
        ]

    def reader_progress(self) -> list[tuple[int, int]]:
        """Last `(generation, step)` each reader reported, in slot order."""
        words = self._mapped().words
        found = [slot_of(index) for index in range(self.num_readers)]
        return [(words[slot + slots.GENERATION], words[slot + slots.STEP]) for slot in found]

    def local_pids(self, ranks: Sequence[int]) -> Sequence[int]:
        words = self._mapped().words
        placed = [slot_of(rank - 1) for rank in ranks]
        known = [(words[slot + slots.PID], words[slot + slots.START]) for slot in placed]
        return [pid for pid, start in known if pid and is_running(pid, start)]

    def _unlink(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    def close(self) -> None:
        """Tell readers that nothing follows, remove the name and unmap. May be called twice."""
        if self._segment is not None:
            self._segment.store(slots.CLOSED, 1)
            self._unlink()
            self._errors.release()
            self._num_failed.release()
            self._segment.close()
            self._segment = None
