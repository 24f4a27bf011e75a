"""Groups of one host over shared memory: the native ring where it could be compiled, else the Python one.

Both speak the protocol drawn in `ring.c`. Only CPU tensors.
"""

import ctypes
import mmap
import os
import platform
from collections.abc import Callable
from pathlib import Path
from time import monotonic_ns

import torch

from tpinfer.collectives.build_ring import build_ring
from tpinfer.collectives.gathered import GatheredGroup
from tpinfer.collectives.group import Group
from tpinfer.collectives.ring_segment import ABORT, FLAGS, HEADER_BYTES, SLOT_BYTES, open_mapping
from tpinfer.config.errors import RankError

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ABORTED = -1_000_000
_NATIVE_SPINS, _PYTHON_SPINS = 4000, 200


class _RingGroup(GatheredGroup):
    """What the two rings share: the mapping and what failures mean."""

    name = "shared_memory"

    def __init__(self, rank: int, size: int, mapping: mmap.mmap, timeout_s: float) -> None:
        super().__init__(rank, size)
        self._mapping: mmap.mmap | None = mapping
        self._timeout_s = timeout_s
        self._words = memoryview(mapping)[:HEADER_BYTES].cast("Q")

    def abort(self) -> None:
        if self._mapping is not None:
            self._words[ABORT] = 1

    def close(self) -> None:
        if self._mapping is not None:
            self._words.release()
            self._release()
            self._mapping = None

    def _release(self) -> None:
        """Let go of what points into the mapping; the process's end or the garbage collector unmaps it."""

    def _failed(self, code: int) -> RankError:
        if code == _ABORTED:
            return RankError("another rank gave up; its own error says why")
        return RankError(
            f"rank {-1 - code} did not come to a collective within {self._timeout_s:g} s; "
            "it hangs or has died - look at its output, or raise --wait-timeout"
        )


class _RingState(ctypes.Structure):
    """`struct ring` of ring.c."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_uint64),
        ("seq", ctypes.c_uint64),
        ("timeout_ns", ctypes.c_int64),
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("spins", ctypes.c_int32),
        ("pad", ctypes.c_int32),
    )


class NativeRing(_RingGroup):
    """The compiled ring. It measures its own wait for the last peer."""

    def __init__(
        self, rank: int, size: int, mapping: mmap.mmap, timeout_s: float, library: Path
    ) -> None:
        super().__init__(rank, size, mapping, timeout_s)
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        spins = _NATIVE_SPINS if size <= len(os.sched_getaffinity(0)) else 0
        self._state = _RingState(
            start, start + HEADER_BYTES, SLOT_BYTES, 0, int(timeout_s * 1e9), rank, size, spins, 0
        )
        self._address = ctypes.addressof(self._state)
        loaded = ctypes.CDLL(str(library))
        self._reduce: Callable[..., int] = _typed(loaded.ring_all_reduce, (ctypes.c_uint64, ctypes.c_int32))
        self._gather: Callable[..., int] = _typed(loaded.ring_all_gather, (ctypes.c_void_p, ctypes.c_uint64))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        code = _CODES.get(tensor.dtype)
        if code is None or not tensor.is_contiguous():
            _reduce_by_copy(self, tensor)
            return
        waited = self._reduce(self._address, tensor.data_ptr(), tensor.numel(), code)
        if waited < 0:
            raise self._failed(waited)
        self.last_wait_ns = waited

    def all_gather(self, out: torch.Tensor, tensor: torch.Tensor) -> None:
        tensor = tensor.contiguous()
        _check_gather(self.size, out, tensor)
        waited = self._gather(self._address, out.data_ptr(), tensor.data_ptr(), tensor.nbytes)
        if waited < 0:
            raise self._failed(waited)


class PythonRing(_RingGroup):
    """The ring without a compiler: the fallback, and the oracle of the native one.

    Plain loads and stores order memory as they stand on x86 alone.
    """

    def __init__(self, rank: int, size: int, mapping: mmap.mmap, timeout_s: float) -> None:
        if platform.machine() not in ("x86_64", "AMD64", "i686"):
            raise RankError(
                f"{platform.machine()} needs the compiled ring: install a C compiler or pass --collective gloo"
            )
        super().__init__(rank, size, mapping, timeout_s)
        slots = torch.frombuffer(mapping, dtype=torch.uint8, offset=HEADER_BYTES)
        self._slots = slots.view(size, 2, SLOT_BYTES)
        self._seq = 0
        self._spins = _PYTHON_SPINS if size <= len(os.sched_getaffinity(0)) else 0
        self._peers = [FLAGS + 8 * peer for peer in range(size) if peer != rank]

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if tensor.dtype not in _CODES or not tensor.is_contiguous():
            _reduce_by_copy(self, tensor)
            return
        flat = tensor.view(-1)
        most = SLOT_BYTES // tensor.element_size()
        waited = 0
        for start in range(0, max(flat.numel(), 1), most):
            part = flat[start : start + most]
            theirs, took = self._exchange(part)
            total = theirs[0].float()
            if total.data_ptr() == theirs[0].data_ptr():
                total = total.clone()
            for other in theirs[1:]:
                total += other
            part.copy_(total)
            waited += took
        self.last_wait_ns = waited

    def all_gather(self, out: torch.Tensor, tensor: torch.Tensor) -> None:
        tensor = tensor.contiguous()
        _check_gather(self.size, out, tensor)
        source = tensor.view(-1).view(torch.uint8)
        target = out.view(-1).view(torch.uint8).view(self.size, -1)
        for start in range(0, max(source.numel(), 1), SLOT_BYTES):
            theirs, _ = self._exchange(source[start : start + SLOT_BYTES])
            for rank, part in enumerate(theirs):
                target[rank, start : start + SLOT_BYTES].copy_(part)

    def _exchange(self, part: torch.Tensor) -> tuple[list[torch.Tensor], int]:
        """Publish `part`; every rank's, as views of its slot, and the ns waited."""
        self._seq = seq = self._seq + 1
        width = part.numel() * part.element_size()
        views = [slot[:width].view(part.dtype) for slot in self._slots[:, seq & 1]]
        views[self.rank].copy_(part)
        words = self._words
        words[FLAGS + 8 * self.rank] = seq
        began = monotonic_ns()
        for word in self._peers:
            polls = 0
            while words[word] < seq:
                polls += 1
                if polls > self._spins:
                    os.sched_yield()
                    if polls & 63 == 0:
                        self._look_around(word, began)
        return views, monotonic_ns() - began

    def _look_around(self, word: int, began_ns: int) -> None:
        if self._words[ABORT]:
            raise self._failed(_ABORTED)
        if monotonic_ns() - began_ns > self._timeout_s * 1e9:
            raise self._failed(-1 - (word - FLAGS) // 8)

    def _release(self) -> None:
        self._slots = torch.empty(0)


def open_ring(name: str, rank: int, size: int, timeout_s: float, native: bool = True) -> Group:
    """The ring group called `name`; native where the library is or can be built."""
    library = build_ring()[0] if native else None
    mapping = open_mapping(name, rank, size, min(timeout_s, 120.0))
    if library is not None:
        return NativeRing(rank, size, mapping, timeout_s, library)
    return PythonRing(rank, size, mapping, timeout_s)


def _typed(function: Callable[..., int], last: tuple[type, type]) -> Callable[..., int]:
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *last)  # type: ignore[attr-defined]
    function.restype = ctypes.c_int64  # type: ignore[attr-defined]
    return function


def _reduce_by_copy(group: Group, tensor: torch.Tensor) -> None:
    """Dtypes the ring does not add, and views that are not contiguous: float64 through a gather, exact for ints."""
    everyone = torch.empty(group.size, *tensor.shape, dtype=tensor.dtype)
    group.all_gather(everyone, tensor.contiguous())
    tensor.copy_(everyone.sum(0, dtype=tensor.dtype))


def _check_gather(size: int, out: torch.Tensor, tensor: torch.Tensor) -> None:
    if out.shape != (size, *tensor.shape) or out.dtype != tensor.dtype or not out.is_contiguous():
        raise ValueError(
            f"all_gather of {tuple(tensor.shape)} {tensor.dtype} over {size} ranks needs a contiguous output of "
            f"{(size, *tensor.shape)}, got {tuple(out.shape)} {out.dtype}"
        )
