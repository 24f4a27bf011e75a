"""A mapped piece of /dev/shm with 64-bit words and a ring of bytes, and the way to wait for a word
to change.

Names say who made a segment (`tpinfer-<pid>-<name>`), so that a later run can sweep what a killed
one left. Does not know what the words mean; see `steps.wire`.

Memory order: words are aligned, loaded and stored whole. x86 keeps stores in order and loads in
order (total store order), so whoever sees a new counter sees what was written before it. Other
machines promise less: there every look at a counter is taken under a file lock (`flock`), which
orders memory as any lock does and costs a few us.
"""

import fcntl
import mmap
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tpinfer.config.errors import RankError
from tpinfer.steps.liveness import is_running

SHM_DIRECTORY = Path("/dev/shm")
"""Where segments live; a tmpfs on every Linux."""
KEEPS_STORE_ORDER = platform.machine() in ("x86_64", "AMD64", "i686")
"""Whether this machine's stores become visible in program order without help."""
PREFIX = "tpinfer-"
"""What every file of this project in /dev/shm starts with."""
DEEPSPEED_PREFIX = "deepspeed_allreduce_buffer_"
"""What DeepSpeed's library puts in front, with a user id, of names that go on with PREFIX."""

_SPIN_NS, _YIELD_NS = 5_000, 20_000_000
_SLEEP_S, _POLL_NS, _LIVENESS_NS = 100e-6, 1_000_000, 50_000_000


def segment_path(name: str, pid: int | None = None) -> Path:
    """Path of the segment `name` made by process `pid` (default: this one)."""
    return SHM_DIRECTORY / f"{PREFIX}{os.getpid() if pid is None else pid}-{name}"


def find_segment(name: str) -> Path | None:
    """The segment called `name` whose creator still runs, whichever process that is, or None."""
    for path in SHM_DIRECTORY.glob(f"{PREFIX}*-{name}"):
        pid = path.name.removeprefix(PREFIX).removesuffix(f"-{name}")
        if pid.isdecimal() and is_running(int(pid)):
            return path
    return None


class Segment:
    """A mapped segment: 64-bit words at the front, the ring of bytes behind them."""

    def __init__(self, descriptor: int, ring_start: int, ordered: bool | None = None) -> None:
        """Map all of the open file; words end and the ring starts at byte `ring_start`.

        `ordered` false takes the file lock around every load and store of a counter; None asks what
        the machine needs.
        """
        self._map = mmap.mmap(descriptor, 0)
        self._bytes = memoryview(self._map)
        self.words = self._bytes[:ring_start].cast("Q")
        self.ring = self._bytes[ring_start:]
        ordered = KEEPS_STORE_ORDER if ordered is None else ordered
        self._lock = None if ordered else os.dup(descriptor)

    @classmethod
    def create(
        cls, path: Path, ring_start: int, ring_bytes: int, words: Mapping[int, int]
    ) -> "Segment":
        """Make the file, set the given words, and only then let it appear under `path`.

        Raises OSError when /dev/shm is full or the name is taken.
        """
        fresh = path.with_name(path.name + ".new")
        descriptor = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Reserve the pages now: a full /dev/shm is an error here and a SIGBUS later.
            os.posix_fallocate(descriptor, 0, ring_start + ring_bytes)
            segment = cls(descriptor, ring_start)
            for index, value in words.items():
                segment.words[index] = value
            os.link(fresh, path)
        finally:
            os.unlink(fresh)
            os.close(descriptor)
        return segment

    @property
    def keeps_order(self) -> bool:
        """Whether plain loads of words see what was stored before them; otherwise `load` does."""
        return self._lock is None

    def load(self, index: int) -> int:
        """Word `index`; everything written before it was stored is visible afterwards."""
        if self._lock is None:
            return self.words[index]
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        value = self.words[index]
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        return value

    def store(self, index: int, value: int) -> None:
        """Set word `index` after everything this process wrote before."""
        if self._lock is None:
            self.words[index] = value
            return
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.words[index] = value
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    def copy_in(self, position: int, payload: bytes | memoryview) -> None:
        """Write `payload` at byte `position` (a growing counter), around the end of the ring if
        need be.
        """
        start, size = position % len(self.ring), len(payload)
        first = min(size, len(self.ring) - start)
        self.ring[start : start + first] = payload[:first]
        if first < size:
            self.ring[: size - first] = payload[first:]

    def copy_out(self, position: int, size: int) -> bytes:
        """Read `size` bytes at byte `position`."""
        start = position % len(self.ring)
        first = min(size, len(self.ring) - start)
        head = bytes(self.ring[start : start + first])
        return head if first == size else head + bytes(self.ring[: size - first])

    def close(self) -> None:
        """Unmap. The words and the ring must not be touched afterwards."""
        self.words.release()
        self.ring.release()
        self._bytes.release()
        self._map.close()
        if self._lock is not None:
            os.close(self._lock)


class Idler:
    """How to wait for another process: spin for a moment, then yield the core, then sleep.

    Yielding comes early: it costs a us where a core is free for the other side, and where both
    share a core it is what lets the other side answer at all (measured: 20 us a message, not 110).
    """

    def __init__(
        self,
        what: str,
        timeout_s: float | None,
        check_alive: Callable[[], None],
        poll: Callable[[], None] | None = None,
    ) -> None:
        """`check_alive` runs every 50 ms and `poll` every ms of waiting; either may raise to end
        it.
        """
        self._what = what
        self._timeout_ns = None if timeout_s is None else int(timeout_s * 1e9)
        self._check_alive = check_alive
        self._poll = poll
        self._start_ns = self._checked_ns = self._polled_ns = time.monotonic_ns()

    def pause(self) -> None:
        """Wait a little, longer the longer it has lasted. Raises RankError past the time-out."""
        now_ns = time.monotonic_ns()
        waited_ns = now_ns - self._start_ns
        if self._timeout_ns is not None and waited_ns > self._timeout_ns:
            raise RankError(
                f"{self._what} took longer than {self._timeout_ns / 1e9:g} s; "
                "look for a stuck rank or raise the wait time-out"
            )
        if waited_ns < _SPIN_NS:
            return
        if waited_ns < _YIELD_NS:
            os.sched_yield()
        else:
            time.sleep(_SLEEP_S)
        if self._poll is not None and now_ns - self._polled_ns > _POLL_NS:
            self._polled_ns = now_ns
            self._poll()
        if now_ns - self._checked_ns > _LIVENESS_NS:
            self._checked_ns = now_ns
            self._check_alive()
