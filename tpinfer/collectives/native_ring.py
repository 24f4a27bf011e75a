"""The compiled ring of ring.c, called through ctypes. Takes contiguous CPU tensors, checks nothing.

The library is loaded so that calls keep Python's lock: a short wait then costs no hand-over. Long
waits give it back (see RELEASE_AFTER_NS in ring.c) and let signal handlers run.
"""

import ctypes
from collections.abc import Callable, Sequence

import torch

from tpinfer.collectives.ring_segment import ABORT, INTERRUPTED, RingSegment
from tpinfer.config.errors import ConfigError

DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int32: 4,
    torch.int64: 5,
}
"""The enum in ring.c: dtypes that can be summed."""


class _Ring(ctypes.Structure):
    """struct ring of ring.c."""

    _fields_ = (
        ("segment", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rank", "size")),
        *(
            (f"{name}_offset", ctypes.c_int64)
            for name in ("abort", "flags", "mail_flags", "mail", "slots")
        ),
        *((f"{name}_bytes", ctypes.c_int64) for name in ("slot", "mail", "one_shot")),
        *((name, ctypes.c_int64) for name in ("timeout_ns", "spin_ns", "descriptor")),
        *((name, ctypes.c_void_p) for name in ("save_thread", "restore_thread", "check_signals")),
        ("phase", ctypes.c_uint64),
        ("last_wait_ns", ctypes.c_int64),
        ("culprit", ctypes.c_int64),
    )


class NativeRing:
    """One rank's end of the compiled ring."""

    def __init__(
        self, library: ctypes.PyDLL, segment: RingSegment, one_shot_bytes: int, spin_ns: int
    ) -> None:
        if library.ring_struct_bytes() != ctypes.sizeof(_Ring):
            raise ConfigError("the compiled ring is of another version; delete it and compile anew")
        layout = segment.layout
        self._segment = segment
        self._exported: ctypes.c_char | None = ctypes.c_char.from_buffer(segment.memory)
        self._ring = _Ring(
            segment=ctypes.addressof(self._exported),
            rank=segment.rank,
            size=layout.size,
            abort_offset=ABORT * 8,
            flags_offset=layout.flags_offset,
            mail_flags_offset=layout.mail_flags_offset,
            mail_offset=layout.mail_offset,
            slots_offset=layout.slots_offset,
            slot_bytes=layout.slot_bytes,
            mail_bytes=layout.mail_bytes,
            one_shot_bytes=min(one_shot_bytes, layout.slot_bytes),
            timeout_ns=int(segment.timeout_s * 1e9),
            spin_ns=spin_ns,
            descriptor=segment.descriptor,
            save_thread=_address(ctypes.pythonapi.PyEval_SaveThread),
            restore_thread=_address(ctypes.pythonapi.PyEval_RestoreThread),
            check_signals=_address(ctypes.pythonapi.PyErr_CheckSignals),
        )
        self._address = ctypes.addressof(self._ring)
        self._calls = {name: _function(library, name, count) for name, count in _ARGUMENTS.items()}

    @property
    def last_wait_ns(self) -> int:
        return self._ring.last_wait_ns

    def bind_all_reduce(self, dtype: torch.dtype) -> Callable[[torch.Tensor], None]:
        """All-reduce of contiguous CPU tensors of one dtype."""
        call, fail = self._calls["all_reduce"], self._fail
        ring, code = self._address, DTYPE_CODES[dtype]

        def all_reduce(t: torch.Tensor) -> None:
            result = call(ring, t.data_ptr(), t.numel(), code)
            if result:
                fail(result)

        return all_reduce

    def all_gather(self, out: torch.Tensor, t: torch.Tensor) -> None:
        self._run("all_gather", out.data_ptr(), t.data_ptr(), t.nbytes)

    def reduce_scatter(self, out: torch.Tensor, t: torch.Tensor) -> None:
        code = DTYPE_CODES[t.dtype]
        self._run("reduce_scatter", out.data_ptr(), t.data_ptr(), out.numel(), code)

    def all_to_all_v(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_bytes: Sequence[int],
        in_bytes: Sequence[int],
        num_rounds: int,
    ) -> None:
        counts = ctypes.c_int64 * len(out_bytes)
        received, sent = counts(*out_bytes), counts(*in_bytes)
        places = ctypes.addressof(received), ctypes.addressof(sent)
        self._run("all_to_all_v", out.data_ptr(), t.data_ptr(), *places, num_rounds)

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        self._run("broadcast", t.data_ptr(), t.nbytes, src)

    def barrier(self) -> None:
        self._run("barrier")

    def send(self, t: torch.Tensor, dst: int) -> None:
        self._run("mail", t.data_ptr(), t.nbytes, dst, 1)

    def recv(self, t: torch.Tensor, src: int) -> None:
        self._run("mail", t.data_ptr(), t.nbytes, src, 0)

    def close(self) -> None:
        """Let go of the segment's memory; it can then be unmapped."""
        self._ring.segment = None
        self._exported = None

    def _run(self, name: str, *arguments: int) -> None:
        result = self._calls[name](self._address, *arguments)
        if result:
            self._fail(result)

    def _fail(self, code: int) -> None:
        # A signal handler's own exception (KeyboardInterrupt) has been raised by ctypes already.
        assert code != INTERRUPTED, "an interrupted call raises what the signal handler raised"
        raise self._segment.failure(code, self._ring.culprit)


_ARGUMENTS = {
    "all_reduce": 3,
    "all_gather": 3,
    "reduce_scatter": 4,
    "all_to_all_v": 5,
    "broadcast": 3,
    "barrier": 0,
    "mail": 4,
}
"""Arguments of each function behind the ring itself: addresses and counts, all 64 bits wide."""


def _function(library: ctypes.PyDLL, name: str, num_arguments: int) -> Callable[..., int]:
    function = library[f"ring_{name}"]  # a new object each time: argtypes are this group's own
    function.argtypes = [ctypes.c_int64] * (num_arguments + 1)
    function.restype = ctypes.c_int
    return function


def _address(function: object) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value  # pyright: ignore[reportArgumentType]
