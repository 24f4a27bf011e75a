"""The shared-memory segment of one group: its layout, who makes it, how ranks meet in it and part.

Rank 0 makes `/dev/shm/tpinfer-<pid>-<run id>-g<generation>-<label>`, the others map it, and its
name is removed once all have: from then on it lives as long as the ranks do. Every rank keeps a
lock on one byte of the file, which the kernel drops when the rank ends however it ends. Does not
move messages; see `native_ring` and `python_ring`.
"""

import fcntl
import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tpinfer.config.errors import ConfigError, RankError
from tpinfer.steps.segment import SHM_DIRECTORY, find_segment, segment_path

MAX_RANKS = 64
"""As in ring.c."""
SEGMENT_BYTES = 8 << 20
"""Most that one group takes of /dev/shm."""
TIMED_OUT, PEER_GONE, ABORTED, INTERRUPTED, CLOSED = 1, 2, 3, 4, 5
"""Why a call failed; as in ring.c."""
LINE_WORDS = 16
"""64-bit words between two counters: 128 bytes, so that no two share a cache line pair."""
MAGIC, SIZE, ABORT, READY = 0, 1, 16, 32
"""Word numbers in the header."""
_MAGIC_VALUE = 0x31676E6972707400
_HEADER_BYTES = 4096
_LARGEST_SLOT_BYTES = 1 << 20
_LARGEST_MAIL_BYTES = 64 << 10
_LEAST_TIMEOUT_S, _LOOK_AGAIN_S = 1e-3, 1e-3


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Where things lie in the segment, in bytes."""

    size: int
    """Ranks."""
    slot_bytes: int
    """One of a rank's two slots."""
    mail_bytes: int
    """The mailbox of one ordered pair of ranks."""

    @property
    def flags_offset(self) -> int:
        """Two lines for each rank: phases published, and whether it has attached."""
        return _HEADER_BYTES

    @property
    def mail_flags_offset(self) -> int:
        """Two lines for each ordered pair: pieces sent, pieces taken."""
        return self.flags_offset + self.size * 16 * LINE_WORDS

    @property
    def mail_offset(self) -> int:
        """Mailboxes, sender by sender."""
        return self.mail_flags_offset + self.size**2 * 16 * LINE_WORDS

    @property
    def slots_offset(self) -> int:
        """Slots, rank by rank, on a page."""
        return -(-(self.mail_offset + self.size**2 * self.mail_bytes) // 4096) * 4096

    @property
    def total_bytes(self) -> int:
        """Of the whole segment."""
        return self.slots_offset + self.size * 2 * self.slot_bytes

    def flag_word(self, rank: int) -> int:
        """Word number of `rank`'s published phase."""
        return self.flags_offset // 8 + rank * LINE_WORDS

    def attached_word(self, rank: int) -> int:
        """Word number that says `rank` has attached."""
        return self.flag_word(rank) + LINE_WORDS // 2

    def mail_words(self, src: int, dst: int) -> tuple[int, int]:
        """Word numbers of (pieces sent, pieces taken) from `src` to `dst`."""
        sent = self.mail_flags_offset // 8 + (src * self.size + dst) * 2 * LINE_WORDS
        return sent, sent + LINE_WORDS

    def slot_offset(self, rank: int, phase: int) -> int:
        """Byte where `rank`'s slot for `phase` starts."""
        return self.slots_offset + (2 * rank + (phase & 1)) * self.slot_bytes


def plan_layout(size: int) -> RingLayout:
    """Slots as large as fit SEGMENT_BYTES, at most 1 MB. Raises ConfigError above 64 ranks."""
    if not 2 <= size <= MAX_RANKS:
        raise ConfigError(
            f"{size} ranks cannot share one segment, which is made for 2 to {MAX_RANKS}; "
            "use --collective gloo or mpi"
        )
    mail_bytes = min(_LARGEST_MAIL_BYTES, SEGMENT_BYTES // 8 // size**2 // 64 * 64)
    fixed = RingLayout(size, 0, mail_bytes).total_bytes
    slot_bytes = (SEGMENT_BYTES - fixed) // (2 * size) // 4096 * 4096
    return RingLayout(size, min(_LARGEST_SLOT_BYTES, slot_bytes), mail_bytes)


class RingSegment:
    """One rank's mapping of the group's segment."""

    def __init__(self, rank: int, layout: RingLayout, descriptor: int, timeout_s: float) -> None:
        """Map the open file and lock this rank's byte of it."""
        self.rank = rank
        self.layout = layout
        self.timeout_s = max(timeout_s, _LEAST_TIMEOUT_S)
        self.descriptor = descriptor
        try:
            # Record locks belong to the process: a child it forks does not keep them alive.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            raise RankError(f"two processes say they are rank {rank}; start ranks once") from None
        self.memory = mmap.mmap(descriptor, layout.total_bytes)
        self.words = memoryview(self.memory).cast("Q")

    def abort(self, code: int = ABORTED, culprit: int | None = None) -> None:
        """Make every rank's calls fail; the first reason stays."""
        if not self.words[ABORT]:
            blamed = self.rank if culprit is None else culprit
            self.words[ABORT] = (self.rank + 1) | (blamed + 1) << 16 | code << 32

    def failure(self, code: int, culprit: int) -> RankError:
        """The error of a call of this rank that ended with `code`, waiting for `culprit`."""
        if code == CLOSED:
            return RankError("the shared_memory group is closed on this rank; open it again")
        who, reported_by = f"rank {culprit}", ""
        if code == ABORTED or (code == PEER_GONE and self.words[ABORT]):
            # A peer that called off the group and left may be missed before its word is seen.
            reason = self.words[ABORT]
            who = f"rank {(reason >> 16 & 0xFFFF) - 1}"
            code, noticed = reason >> 32, (reason & 0xFFFF) - 1
            reported_by = "" if noticed == self.rank else f", says rank {noticed}"
        what = {
            TIMED_OUT: f"did not arrive at a collective within {self.timeout_s:g} s{reported_by}; "
            "look for what holds it up or raise the wait time-out",
            PEER_GONE: f"has ended or left the group{reported_by}; its own error says why",
            INTERRUPTED: "was interrupted in a collective; start all ranks again",
        }.get(code, "called off the group; its own error says why")
        return RankError(f"{who} {what}")

    def is_gone(self, peer: int) -> bool:
        """Whether `peer` has ended or closed its group: nobody holds its byte."""
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, peer)
        except OSError:
            return False
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, peer)
        return True

    def close(self) -> None:
        """Unmap and unlock. Views of the memory must be gone."""
        self.words.release()
        self.memory.close()
        os.close(self.descriptor)


def open_segment(name: str, rank: int, size: int, timeout_s: float) -> RingSegment:
    """Make (rank 0) or find the segment `name` and return once all ranks have mapped it.

    Raises RankError naming the ranks that did not come in time, ConfigError where /dev/shm is
    missing or full.
    """
    layout = plan_layout(size)
    if rank == 0:
        return _create(name, layout, timeout_s)
    return _attach(name, rank, layout, timeout_s)


def _create(name: str, layout: RingLayout, timeout_s: float) -> RingSegment:
    path = segment_path(name)
    check_room(layout.total_bytes)
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        # Reserve the pages now: a full /dev/shm is an error here and a SIGBUS later.
        os.posix_fallocate(descriptor, 0, layout.total_bytes)
        segment = RingSegment(0, layout, descriptor, timeout_s)
        segment.words[MAGIC], segment.words[SIZE] = _MAGIC_VALUE, layout.size
        os.link(fresh, path)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(f"cannot make {path} of {layout.total_bytes} bytes: {error}") from error
    finally:
        os.unlink(fresh)
    try:
        words, others = segment.words, range(1, layout.size)
        _await_ranks(others, lambda peer: bool(words[layout.attached_word(peer)]), timeout_s)
        words[READY] = 1
    except BaseException:
        segment.close()
        raise
    finally:
        os.unlink(path)
    return segment


def _attach(name: str, rank: int, layout: RingLayout, timeout_s: float) -> RingSegment:
    deadline_s = time.monotonic() + timeout_s
    descriptor = _open_existing(name)
    while descriptor is None:
        if time.monotonic() > deadline_s:
            raise RankError(f"rank 0 did not open the group within {timeout_s:g} s; see its error")
        time.sleep(_LOOK_AGAIN_S)
        descriptor = _open_existing(name)
    try:
        header = memoryview(os.pread(descriptor, 16, 0)).cast("Q")
        if list(header) != [_MAGIC_VALUE, layout.size]:
            raise RankError(f"segment {name} has another size or version; start all ranks again")
        segment = RingSegment(rank, layout, descriptor, timeout_s)
    except BaseException:
        os.close(descriptor)
        raise
    try:
        segment.words[layout.attached_word(rank)] = 1
        left_s = deadline_s - time.monotonic()
        _await_ranks([0], lambda _: bool(segment.words[READY]), left_s, segment.is_gone)
    except BaseException:
        segment.close()
        raise
    return segment


def _open_existing(name: str) -> int | None:
    path = find_segment(name)
    try:
        return None if path is None else os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None


def check_room(num_bytes: int) -> None:
    """Raise ConfigError unless /dev/shm can take `num_bytes` more."""
    try:
        found = os.statvfs(SHM_DIRECTORY)
    except OSError as error:
        raise ConfigError(
            f"{SHM_DIRECTORY} is missing ({error.strerror}); mount a tmpfs there or use "
            "--collective gloo"
        ) from error
    free = found.f_bavail * found.f_frsize
    if free < num_bytes:
        raise ConfigError(
            f"{SHM_DIRECTORY} has {free / 1e6:.1f} MB free and the group needs "
            f"{num_bytes / 1e6:.1f} MB; free some, give the container more (--shm-size=64m) or "
            "use --collective gloo"
        )


def _await_ranks(
    ranks: Sequence[int],
    has_come: Callable[[int], bool],
    timeout_s: float,
    is_gone: Callable[[int], bool] = lambda _: False,
) -> None:
    """Look every ms until `has_come` for all. Raises RankError naming those that did not."""
    deadline_s = time.monotonic() + timeout_s
    while missing := [rank for rank in ranks if not has_come(rank)]:
        gone = [rank for rank in missing if is_gone(rank) and not has_come(rank)]
        if gone or time.monotonic() > deadline_s:
            names = ", ".join(map(str, gone or missing))
            why = "ended" if gone else f"did not come within {timeout_s:g} s"
            raise RankError(f"rank {names} {why} while the group was opened; see its own error")
        time.sleep(_LOOK_AGAIN_S)
