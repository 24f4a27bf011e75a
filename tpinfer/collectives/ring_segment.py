"""The shared mapping of a ring: made by rank 0, opened by the others, without a name as soon as all have it."""

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

from tpinfer.config.errors import RankError
from tpinfer.steps.segment import find_segment, segment_path

HEADER_BYTES = 4096
SLOT_BYTES = 512 << 10
"""Largest message that goes in one piece. Two slots a rank: one is read while the other is written."""
MAX_RANKS = 48
"""Ranks whose flags fit the header page."""
READY, ABORT, PIDS, FLAGS = 0, 1, 8, 64
"""Word indexes; flags are a cache line (8 words) apart."""
_MAGIC = 0x7470_7269_6E67_0001


def open_mapping(name: str, rank: int, size: int, timeout_s: float) -> mmap.mmap:
    """Map the segment on every rank; returns when all have. Raises RankError when one does not come.

    Nothing can be left in /dev/shm afterwards, however a process ends.
    """
    if size > MAX_RANKS:
        raise RankError(f"{size} ranks exceed the {MAX_RANKS} of a shared-memory group; use gloo or mpi")
    mapping = _create(name, size) if rank == 0 else _attach(name, timeout_s)
    words = memoryview(mapping)[:HEADER_BYTES].cast("Q")
    words[PIDS + rank] = os.getpid()

    def missing() -> list[int]:
        return [r for r in range(size) if not words[PIDS + r]]

    try:
        _wait(lambda: not missing(), timeout_s, lambda: f"ranks {missing()} did not open shared memory")
    finally:
        if rank == 0:
            segment_path(name).unlink(missing_ok=True)
        words.release()
    return mapping


def _create(name: str, size: int) -> mmap.mmap:
    path = segment_path(name)
    fresh = path.with_name(path.name + ".new")
    total = HEADER_BYTES + 2 * size * SLOT_BYTES
    descriptor = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, total)
        mapping = mmap.mmap(descriptor, total)
        mapping[:8] = _MAGIC.to_bytes(8, "little")
        os.rename(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise RankError(
            f"/dev/shm has no room for {total >> 20} MB ({error.strerror}); enlarge it (docker: "
            "--shm-size=1g) or pass --collective gloo"
        ) from error
    finally:
        os.close(descriptor)
    return mapping


def _attach(name: str, timeout_s: float) -> mmap.mmap:
    found: list[Path] = []

    def look() -> bool:
        path = find_segment(name)
        if path is not None:
            found.append(path)
        return path is not None

    _wait(look, timeout_s, lambda: "rank 0 did not make its shared memory")
    try:
        descriptor = os.open(found[0], os.O_RDWR)
    except FileNotFoundError:
        raise RankError("rank 0 ended before this rank could open its shared memory") from None
    try:
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)


def _wait(done: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise RankError(f"{what()} within {timeout_s:g} s; look for the first error of the other ranks")
        time.sleep(0.0005)
