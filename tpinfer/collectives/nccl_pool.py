"""Sums by NCCL in a buffer that all ranks have registered as one (a symmetric window, NCCL 2.27):
NCCL then reads and writes the other ranks' parts where they are, by kernels of its own
(`ncclSymkDevKernel_*`). A sum is copied in and out, so it goes that way only from the size on from
which that is faster here.

The buffer is made and registered once, when the group is opened: one that grows registers again,
and ranks that do so at different times wait for each other for ever (sglang#36943). It has not run
on several GPUs yet, so it is used where it is asked for.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tpinfer.collectives.device_group import first_reason
from tpinfer.collectives.gathered import GatheredGroup
from tpinfer.collectives.group import Group
from tpinfer.config.units import format_size

POOL_BYTES = 64 << 20
"""Of the buffer; larger sums go NCCL's usual way."""
_TRIED_BYTES = (256 << 10, 1 << 20, 4 << 20, 16 << 20, POOL_BYTES)
_LEAST_NCCL = (2, 27)
_CALLS, _REPEATS = 8, 5
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Time = Callable[[Callable[[], None]], float]
"""Seconds of one call on the device."""


class PoolGroup(GatheredGroup):
    """Sums of some sizes in the registered buffer, all else over `nccl`, which it owns."""

    name = "nccl"
    can_record = True

    def __init__(self, nccl: Group, backend: Any, pool: Any, buffer: torch.Tensor) -> None:
        """`buffer`: uint8, in `pool`, which `backend` has registered."""
        super().__init__(nccl.rank, nccl.size)
        self.from_bytes = POOL_BYTES + 1  # none, until they are known to be right and faster
        self._nccl, self._backend, self._pool = nccl, backend, pool
        self._buffer: torch.Tensor | None = buffer

    def all_reduce(self, t: torch.Tensor) -> None:
        buffer = self._buffer
        takes = buffer is not None and self.from_bytes <= t.nbytes <= buffer.nbytes
        if buffer is None or not takes or not t.numel() or t.dtype not in _FLOATS:
            self._nccl.all_reduce(t)
            return
        inside = buffer[: t.nbytes].view(t.dtype).view(t.shape)
        inside.copy_(t)
        self._nccl.all_reduce(inside)
        t.copy_(inside)

    def all_gather(self, out: torch.Tensor, t: torch.Tensor) -> None:
        self._nccl.all_gather(out, t)

    def all_to_all(self, out: torch.Tensor, t: torch.Tensor) -> None:
        self._nccl.all_to_all(out, t)

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        self._nccl.broadcast(t, src)

    def send(self, t: torch.Tensor, dst: int) -> None:
        self._nccl.send(t, dst)

    def recv(self, t: torch.Tensor, src: int) -> None:
        self._nccl.recv(t, src)

    def barrier(self) -> None:
        self._nccl.barrier()

    def abort(self) -> None:
        self._nccl.abort()

    def close(self) -> None:
        # The window ends with the communicator: taking it back is a collective call, and a rank
        # that closes may be the last one.
        self._nccl.close()
        self._buffer = None


def open_pool_group(
    nccl: Group,
    backend: Any,
    device: torch.device,
    cuda: Any = torch.cuda,
    time: Time | None = None,
) -> tuple[Group, str, str]:
    """(group, what it uses, why): a PoolGroup around `nccl`, which uses its pool where every rank
    has one and gains by it, or `nccl` itself. A collective call. backend: torch's NCCL process
    group.
    """
    failed = first_reason(nccl, _why_not(backend, cuda), device)
    if failed:
        return nccl, "", f"no symmetric pool: {failed}"
    pool, buffer, why = None, None, ""
    try:
        pool = cuda.MemPool(backend.mem_allocator)
        with cuda.use_mem_pool(pool):
            buffer = torch.empty(POOL_BYTES, dtype=torch.uint8, device=device)
    except (RuntimeError, AttributeError) as error:
        why = _first_line(error)
    failed = first_reason(nccl, why, device)  # before anybody waits for all to register
    if failed or buffer is None:
        return nccl, "", f"no symmetric pool: {failed}"
    why = ""
    try:
        backend.register_mem_pool(pool, symm=True)
    except (RuntimeError, TypeError) as error:  # some versions register no symmetric ones
        why = _first_line(error)
    failed = first_reason(nccl, why, device)
    # From here on the group keeps the pool, used or not: what is registered is not freed before the
    # communicator's end, which takes all ranks.
    group = PoolGroup(nccl, backend, pool, buffer)
    if failed:
        return group, "", f"no symmetric pool: {failed}"
    group.from_bytes = 0
    failed = first_reason(nccl, _why_wrong(group, device), device)
    if failed:
        group.from_bytes = POOL_BYTES + 1
        return group, "", f"the symmetric pool is not used: {failed}"
    tried = _times(nccl, group, device, time or _device_time(device))
    from_bytes = faster_from(tried)
    told = ", ".join(
        f"{format_size(size)} {plain * 1e6:.0f} us without and {pooled * 1e6:.0f} with"
        for size, (plain, pooled) in zip(_TRIED_BYTES, tried, strict=True)
    )
    if from_bytes is None:
        group.from_bytes = POOL_BYTES + 1
        return group, "", f"the symmetric pool is not used, for it is not faster: {told}"
    group.from_bytes = from_bytes
    most = format_size(POOL_BYTES)
    return group, f"(symmetric pool from {format_size(from_bytes)} to {most})", told


def faster_from(times: Sequence[tuple[float, float]]) -> int | None:
    """Least of `_TRIED_BYTES` from which on the second time of each pair is the lesser; None where
    not even the largest gains."""
    found = None
    for size, (plain, pooled) in reversed(list(zip(_TRIED_BYTES, times, strict=True))):
        if pooled >= plain:
            break
        found = size
    return found


def _why_not(backend: Any, cuda: Any) -> str:
    """What this rank knows without asking the others."""
    register = getattr(backend, "register_mem_pool", None)
    if register is None or not hasattr(cuda, "MemPool"):
        return "this torch registers no memory pools"
    version = cuda.nccl.version()
    if tuple(version[:2]) < _LEAST_NCCL:
        least = ".".join(map(str, _LEAST_NCCL))
        return f"NCCL {'.'.join(map(str, version))} has no symmetric windows; {least} has"
    return ""


def _why_wrong(group: PoolGroup, device: torch.device) -> str:
    """Small whole numbers have exact sums in every dtype."""
    total = group.size * (group.size + 1) // 2
    why = ""
    for dtype in _FLOATS:  # all of them, whatever comes out: others wait in the next one
        t = torch.full((3, 1000), float(group.rank + 1), dtype=dtype, device=device)
        try:
            group.all_reduce(t)
            if not bool((t == total).all()):
                why = why or f"its sum of {dtype} is wrong"
        except Exception as failure:  # NCCL's own: a kernel that does not run here
            why = why or _first_line(failure)
    return why


def _times(
    nccl: Group, pooled: Group, device: torch.device, time: Time
) -> list[tuple[float, float]]:
    """Seconds by either way at each of `_TRIED_BYTES`, the mean over ranks: the same on all."""
    found = []
    for size in _TRIED_BYTES:
        t = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        for group in (nccl, pooled):
            group.all_reduce(t)
            found.append(time(lambda group=group, t=t: group.all_reduce(t)))
    told = torch.tensor(found, dtype=torch.float32, device=device)
    nccl.all_reduce(told)
    means = (told / nccl.size).view(-1, 2).tolist()
    return [(plain, pool) for plain, pool in means]


def _device_time(device: torch.device) -> Time:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def time(call: Callable[[], None]) -> float:
        found = []
        for _ in range(_REPEATS):
            events[0].record()
            for _ in range(_CALLS):
                call()
            events[1].record()
            events[1].synchronize()
            found.append(events[0].elapsed_time(events[1]) * 1e-3 / _CALLS)
        return statistics.median(found)

    return time


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
