"""Ranks on the GPUs of one host: small sums by the own kernel over symmetric memory, larger ones by
torch's ops over it, the rest by another group (NCCL, or gloo through the host). `sum_routes` says
which size goes where.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tpinfer.collectives.group import Group, NormedReduceCall, check_gather
from tpinfer.collectives.sum_routes import (
    LARGE_BYTES,
    Route,
    RouteName,
    SumFacts,
    describe_routes,
    one_shot_bytes,
    route_of,
    sum_routes,
)
from tpinfer.collectives.symmetric_memory import (
    SymmetricSegments,
    allocate_segments,
    share_segments,
    sum_large,
    unregister_name,
)
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import RankError
from tpinfer.numerics.torch_dtypes import to_torch

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from tpinfer.collectives.triton_one_shot import OneShot

MAX_STAMPS = 4096
"""Collectives of a step whose waits are kept; the last place takes what is beyond."""
_FLOATS = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16)
_REASON_BYTES = 160
_DOES_NOT_RUN = "the own kernel does not run here"
_GIVEN_UP = "another rank gave the own kernel up"
T = TypeVar("T")


class DeviceGroup(Group):
    """Owns `rest`. Its calls run in stream order."""

    name = "symmetric_memory"
    can_record = True

    def __init__(
        self,
        rest: Group,
        segments: SymmetricSegments,
        one_shot: "OneShot | None",
        facts: SumFacts,
    ) -> None:
        super().__init__(rest.rank, rest.size)
        self.rest = rest
        self.one_shot = one_shot
        self.routes = {to_torch(dtype): sum_routes(facts, dtype) for dtype in _FLOATS}
        self._segments: SymmetricSegments | None = segments
        self._waits = torch.zeros(MAX_STAMPS, dtype=torch.int64, device=segments.large.device)
        self.num_stamped = 0

    @property
    def stamps(self) -> torch.Tensor | None:
        return None if self.one_shot is None else self._waits

    def all_reduce(self, t: torch.Tensor) -> None:
        route = self._route(t)
        if route == "one_shot" and self.one_shot is not None:
            self.one_shot.sum(t, self._next_stamp())
            return
        self._leave_no_stamp()
        if route == "rest" or self._segments is None:
            self.rest.all_reduce(t)
        else:
            sum_large(self._segments, route, t, self.size)

    def bind_normed_reduce(self, weight: torch.Tensor, eps: float) -> NormedReduceCall | None:
        if self.one_shot is None:
            return None
        from tpinfer.collectives.triton_one_shot import MAX_FUSED_ROWS

        one_shot = self.one_shot
        most = min(one_shot.half_bytes, one_shot_bytes(self.size))

        def normed(delta: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
            if delta.shape[0] > MAX_FUSED_ROWS or delta.nbytes > most:
                return None
            return one_shot.sum_and_norm(delta, residual, weight, eps, self._next_stamp())

        return normed

    def all_gather(self, out: torch.Tensor, t: torch.Tensor) -> None:
        check_gather(out, t, self.size)
        one_shot = self.one_shot
        if one_shot is None or t.nbytes % 4 or not 0 < t.nbytes <= one_shot.half_bytes:
            self._leave_no_stamp()
            self.rest.all_gather(out, t)
        else:
            one_shot.gather(out, t, self._next_stamp())

    def all_to_all(self, out: torch.Tensor, t: torch.Tensor) -> None:
        self._leave_no_stamp()
        self.rest.all_to_all(out, t)

    def reduce_scatter(self, out: torch.Tensor, t: torch.Tensor) -> None:
        self._leave_no_stamp()
        self.rest.reduce_scatter(out, t)

    def all_to_all_v(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_rows: Sequence[int],
        in_rows: Sequence[int],
    ) -> None:
        self._leave_no_stamp()
        self.rest.all_to_all_v(out, t, out_rows, in_rows)

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        self._leave_no_stamp()
        self.rest.broadcast(t, src)

    def send(self, t: torch.Tensor, dst: int) -> None:
        self.rest.send(t, dst)

    def recv(self, t: torch.Tensor, src: int) -> None:
        self.rest.recv(t, src)

    def barrier(self) -> None:
        self.rest.barrier()

    def abort(self) -> None:
        if self._segments is not None and self.one_shot is not None:
            # A device that has failed takes no copy: its peers' watchers end them.
            with contextlib.suppress(RuntimeError):
                _give_up(self._segments, self.one_shot.half_bytes)
        self.rest.abort()

    def close(self) -> None:
        if self._segments is not None:
            unregister_name(self._segments.group_name)
        self._segments = self.one_shot = None
        self.rest.close()

    def _route(self, t: torch.Tensor) -> RouteName:
        routes = self.routes.get(t.dtype)
        if routes is None or not t.is_contiguous() or not t.numel():
            return "rest"
        return route_of(routes, t.nbytes).name

    def _next_stamp(self) -> torch.Tensor:
        place = min(self.num_stamped, MAX_STAMPS - 1)
        self.num_stamped += 1
        return self._waits[place : place + 1]

    def _leave_no_stamp(self) -> None:
        """What an earlier step left in this call's place is not this call's wait."""
        if self.one_shot is not None:
            self._next_stamp().zero_()


def open_device_group(
    rest: Group, store: "Store", group_name: str, device: torch.device
) -> tuple[Group, str, str]:
    """(group, what it uses, why): a DeviceGroup around `rest`, or `rest` itself where a rank cannot
    have one. A collective call; on failure of this call itself the caller closes `rest`."""
    from tpinfer.collectives.triton_one_shot import aligned_half, segment_bytes

    half_bytes = aligned_half(one_shot_bytes(rest.size))
    num_bytes, place = segment_bytes(half_bytes, rest.size), (rest.rank, rest.size)
    own, why_not = _unless_refused(lambda: allocate_segments(device, num_bytes, LARGE_BYTES))
    failed = first_reason(rest, why_not, device)
    if own is None or failed:
        return rest, rest.name, f"no symmetric memory: {failed}"
    segments, why_not = _unless_refused(lambda: share_segments(store, place, group_name, own))
    failed = first_reason(rest, why_not, device)
    if segments is None or failed:
        return rest, rest.name, f"no symmetric memory: {failed}"
    one_shot, failed = _try_one_shot(rest, segments, half_bytes, device)
    facts = SumFacts(rest.size, rest.name, segments.has_multicast, failed)
    group = DeviceGroup(rest, segments, one_shot, facts)
    failed = first_reason(rest, _why_wrong(group, device), device)
    if failed:
        return rest, rest.name, f"sums over symmetric memory are not used: {failed}"
    words, why = describe_routes(group.routes[torch.bfloat16])
    return group, words, why


def _unless_refused(call: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return call(), ""
    except RankError as error:
        return None, str(error)


def first_reason(rest: Group, own: str, device: torch.device) -> str:
    """The first rank's reason that is not empty, or an empty one; one that only follows from
    another rank's where there is no other. A collective call."""
    told = own.encode()[:_REASON_BYTES].ljust(_REASON_BYTES, b"\0")
    mine = torch.frombuffer(bytearray(told), dtype=torch.uint8).to(device)
    everyone = torch.empty(rest.size, _REASON_BYTES, dtype=torch.uint8, device=device)
    rest.all_gather(everyone, mine)
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in everyone.cpu().tolist()]
    given = sorted((text == _GIVEN_UP, rank, text) for rank, text in enumerate(texts) if text)
    if not given:
        return ""
    _, rank, text = given[0]
    return text if rank == rest.rank else f"rank {rank}: {text}"


def _try_one_shot(
    rest: Group, segments: SymmetricSegments, half_bytes: int, device: torch.device
) -> tuple["OneShot | None", str]:
    """The own kernel once it has summed, normed and gathered right on every rank; or None and why
    not. Every rank compiles for itself alone first, so that none waits in a kernel for one that has
    no kernel."""
    from tpinfer.collectives.triton_one_shot import MAX_BLOCKS, OneShot

    is_timed = device.type == "cuda"

    def launches() -> torch.Tensor:
        return torch.zeros(MAX_BLOCKS, dtype=torch.int32, device=device)

    own = segments.addresses()[rest.rank : rest.rank + 1]
    alone = OneShot(0, 1, own, launches(), half_bytes, is_timed)
    failed = first_reason(rest, _why_not_right(alone, device), device)
    if failed:
        return None, failed
    segments.everyone[rest.rank].zero_()  # the flags of the trial alone
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    rest.barrier()
    together = OneShot(rest.rank, rest.size, segments.addresses(), launches(), half_bytes, is_timed)
    why = _why_not_right(together, device, lambda: _give_up(segments, half_bytes))
    if why and bool(segments.everyone[rest.rank][2 * half_bytes : 2 * half_bytes + 4].any()):
        why = why if why.startswith(_DOES_NOT_RUN) else _GIVEN_UP
    failed = first_reason(rest, why, device)
    return (None, failed) if failed else (together, "")


def _why_not_right(
    one_shot: "OneShot", device: torch.device, give_up: Callable[[], None] | None = None
) -> str:
    """Small whole numbers have exact sums in every dtype; empty where all came out right."""
    stamp = torch.zeros(1, dtype=torch.int64, device=device)
    rank, size = one_shot.rank, one_shot.size
    total = size * (size + 1) // 2
    try:
        for dtype in map(to_torch, _FLOATS):
            t = torch.full((3, 80), float(rank + 1), dtype=dtype, device=device)
            residual = torch.full_like(t, float(total))
            hidden = one_shot.sum_and_norm(t, residual, torch.ones_like(t[0]), 0.0, stamp)
            one_shot.sum(t, stamp)
            exact = (t - total, residual - 2 * total, hidden - 1)
            error = max(float(part.float().abs().max()) for part in exact)
            if not error < 1e-2:
                return f"the own kernel's sum of {dtype} is off by {error:.2g}"
        mine = torch.full((5,), rank, dtype=torch.int64, device=device)
        out = torch.empty(size, 5, dtype=torch.int64, device=device)
        one_shot.gather(out, mine, stamp)
        if out[:, 0].tolist() != list(range(size)):
            return "the own kernel's gather mixes ranks up"
    except Exception as failure:  # the compiler's own, the driver's, whatever ptxas says
        if give_up is not None:
            give_up()
        first = (str(failure).splitlines() or [type(failure).__name__])[0]
        return f"{_DOES_NOT_RUN}: {first[:100]}"
    return ""


def _why_wrong(group: DeviceGroup, device: torch.device) -> str:
    """One sum by every route, which also connects what connects at a first call."""
    try:
        for dtype, routes in group.routes.items():
            total = group.size * (group.size + 1) // 2
            for num_bytes in _one_of_each(routes):
                count = num_bytes // dtype.itemsize
                t = torch.full((count,), float(group.rank + 1), dtype=dtype, device=device)
                group.all_reduce(t)
                if not bool((t == total).all()):
                    return f"the sum of {num_bytes} bytes of {dtype} is wrong"
    except Exception as failure:  # torch's alpha ops: whatever they refuse
        return (str(failure).splitlines() or [type(failure).__name__])[0]
    finally:
        group.num_stamped = 0
    return ""


def _one_of_each(routes: tuple[Route, ...]) -> list[int]:
    """A size in bytes for each route that is not the rest: a little above the limit before."""
    sizes, last = [], 0
    for route in routes:
        if route.up_to_bytes is not None:
            sizes.append(last + 64)
            last = route.up_to_bytes
    return sizes


def _give_up(segments: SymmetricSegments, half_bytes: int) -> None:
    """Free every rank that waits in the own kernel, on a stream of its own: this rank's may be
    waiting too."""
    from tpinfer.collectives.triton_one_shot import give_up

    stream: Any = None
    if segments.large.device.type == "cuda":
        stream = torch.cuda.Stream(segments.large.device)
    with torch.cuda.stream(stream):
        for segment in segments.everyone:
            give_up(segment, half_bytes)
