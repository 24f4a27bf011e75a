"""Collectives over a shared-memory ring, for CPU tensors of ranks on one host.

Carried by the compiled ring, or by the Python one where it cannot be had. Copies what is not
contiguous; never touches the network.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from tpinfer.collectives.build_ring import load_ring
from tpinfer.collectives.group import (
    AllReduceCall,
    Group,
    check_all_to_all,
    check_gather,
    check_peer,
    group_is_closed,
)
from tpinfer.collectives.native_ring import DTYPE_CODES, NativeRing
from tpinfer.collectives.python_ring import NUM_SPINS, PythonRing
from tpinfer.collectives.ring_segment import RingSegment, open_segment
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import ConfigError
from tpinfer.numerics.torch_dtypes import to_torch

ONE_SHOT_BYTES = 256 << 10
"""Up to here every rank sums everything itself: one meeting instead of two."""
SPIN_NS = 2_000
"""How long the compiled ring spins before it yields, where every rank has a core."""


class Ring(Protocol):
    """What both rings do, for contiguous CPU tensors of at least one element."""

    @property
    def last_wait_ns(self) -> int: ...
    def bind_all_reduce(self, dtype: torch.dtype) -> Callable[[torch.Tensor], None]: ...
    def all_gather(self, out: torch.Tensor, t: torch.Tensor) -> None: ...
    def reduce_scatter(self, out: torch.Tensor, t: torch.Tensor) -> None: ...
    def all_to_all_v(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_bytes: Sequence[int],
        in_bytes: Sequence[int],
        num_rounds: int,
    ) -> None: ...
    def broadcast(self, t: torch.Tensor, src: int) -> None: ...
    def send(self, t: torch.Tensor, dst: int) -> None: ...
    def recv(self, t: torch.Tensor, src: int) -> None: ...
    def barrier(self) -> None: ...
    def close(self) -> None: ...


class SharedMemoryGroup(Group):
    """The ranks of one host, meeting in a segment of /dev/shm that has no name any more."""

    name = "shared_memory"

    def __init__(self, segment: RingSegment, ring: Ring) -> None:
        super().__init__(segment.rank, segment.layout.size)
        self._segment = segment
        self._ring: Ring | None = ring
        self._all_reduce = {dtype: ring.bind_all_reduce(dtype) for dtype in DTYPE_CODES}

    @property
    def last_wait_ns(self) -> int | None:
        return self._open_ring().last_wait_ns

    @property
    def is_native(self) -> bool:
        """Whether the compiled ring carries it."""
        return isinstance(self._ring, NativeRing)

    def all_reduce(self, t: torch.Tensor) -> None:
        call = self._all_reduce.get(t.dtype)
        if call is None or not t.is_cpu:
            raise ValueError(
                f"{t.dtype} on {t.device} cannot be summed in shared memory; pass a CPU tensor of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPE_CODES)}"
            )
        if t.is_contiguous():
            call(t)
            return
        dense = t.contiguous()
        call(dense)
        t.copy_(dense)

    def bind_all_reduce(self, max_bytes: int, dtype: DType) -> AllReduceCall:
        call = self._all_reduce.get(to_torch(dtype))
        if call is None:
            raise ValueError(f"{dtype} cannot be summed in shared memory; sum in float32")
        return call

    def all_gather(self, out: torch.Tensor, t: torch.Tensor) -> None:
        check_gather(out, t, self.size)
        if t.numel():
            self._open_ring().all_gather(_on_cpu(out), _on_cpu(t).contiguous())

    def reduce_scatter(self, out: torch.Tensor, t: torch.Tensor) -> None:
        whole = _on_cpu(t).contiguous()
        check_gather(whole, out, self.size)
        if t.dtype not in DTYPE_CODES:
            raise ValueError(f"{t.dtype} cannot be summed in shared memory; sum in float32")
        if not out.numel():
            return
        dense = _on_cpu(out).contiguous()
        self._open_ring().reduce_scatter(dense, whole)
        if dense is not out:
            out.copy_(dense)

    def all_to_all_v(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_rows: Sequence[int],
        in_rows: Sequence[int],
    ) -> None:
        check_all_to_all(_on_cpu(out), _on_cpu(t), out_rows, in_rows, self.size)
        row_bytes = t[:1].nbytes if len(t) else out[:1].nbytes
        in_bytes = [rows * row_bytes for rows in in_rows]
        out_bytes = [rows * row_bytes for rows in out_rows]
        # As many rounds as the largest piece of any rank takes, which no rank knows alone.
        largest = torch.empty(self.size, 1, dtype=torch.int64)
        self.all_gather(largest, torch.tensor([max(in_bytes)]))
        num_rounds = self._num_rounds(int(largest.max()))
        self._open_ring().all_to_all_v(out, t, out_bytes, in_bytes, num_rounds)

    def all_to_all(self, out: torch.Tensor, t: torch.Tensor) -> None:
        rows = [1] * self.size
        check_all_to_all(_on_cpu(out), _on_cpu(t), rows, rows, self.size)
        if t.numel():  # the pieces are equal, so no rank needs to ask for the others' sizes
            pieces = [t[0].nbytes] * self.size
            self._open_ring().all_to_all_v(out, t, pieces, pieces, self._num_rounds(pieces[0]))

    def _num_rounds(self, largest_bytes: int) -> int:
        """Rounds of an all-to-all whose largest piece has so many bytes."""
        piece_bytes = self._segment.layout.slot_bytes // self.size // 64 * 64
        return -(-largest_bytes // piece_bytes)

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        check_peer(src, self.size, None)
        if t.numel():
            self._through_dense(t, lambda dense: self._open_ring().broadcast(dense, src))

    def send(self, t: torch.Tensor, dst: int) -> None:
        check_peer(dst, self.size, self.rank)
        if t.numel():
            self._open_ring().send(_on_cpu(t).contiguous(), dst)

    def recv(self, t: torch.Tensor, src: int) -> None:
        check_peer(src, self.size, self.rank)
        if t.numel():
            self._through_dense(t, lambda dense: self._open_ring().recv(dense, src))

    def barrier(self) -> None:
        self._open_ring().barrier()

    def abort(self) -> None:
        if self._ring is not None:
            self._segment.abort()

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._segment.close()
            self._ring = None

    def _open_ring(self) -> Ring:
        if self._ring is None:
            raise group_is_closed(self.name)
        return self._ring

    def _through_dense(self, t: torch.Tensor, fill: Callable[[torch.Tensor], None]) -> None:
        dense = _on_cpu(t).contiguous()
        fill(dense)
        if dense is not t:
            t.copy_(dense)


def open_shared_memory(
    name: str, rank: int, size: int, timeout_s: float, num_cores: int, native: bool | None = None
) -> SharedMemoryGroup:
    """Meet the other ranks in the segment `name`; all ranks call it.

    `native` true insists on the compiled ring, false on the Python one; None takes the compiled one
    where it can be had. Raises RankError, or ConfigError where neither ring can run here.
    """
    library, reason = load_ring() if native is not False else (None, "not asked for")
    if native and library is None:
        raise ConfigError(f"no compiled shared-memory ring: {reason}")
    has_core_each = size <= num_cores
    segment = open_segment(name, rank, size, timeout_s)
    try:
        ring: Ring
        if library is not None:
            spin_ns = SPIN_NS if has_core_each else 0
            ring = NativeRing(library, segment, ONE_SHOT_BYTES, spin_ns)
        else:
            ring = PythonRing(segment, ONE_SHOT_BYTES, NUM_SPINS if has_core_each else 0)
        return SharedMemoryGroup(segment, ring)
    except BaseException:
        segment.abort()
        segment.close()
        raise


def _on_cpu(t: torch.Tensor) -> torch.Tensor:
    if not t.is_cpu:
        raise ValueError(f"a tensor on {t.device} cannot go through shared memory; move it first")
    return t
