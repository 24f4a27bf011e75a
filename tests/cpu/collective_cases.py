"""What ranks do in test_collectives: each function runs on every rank and returns what to
compare."""

import hashlib
import itertools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tpinfer.collectives.group import Group
from tpinfer.collectives.opening import open_group
from tpinfer.collectives.shared_memory import open_shared_memory
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import RankError
from tpinfer.config.measured import CollectiveFit
from tpinfer.costs.collective_sizes import CollectiveCurves
from tpinfer.launching.seat import Seat
from tpinfer.machine.discover import discover_machine

NUM_CORES = 2
SUM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)
SUM_SIZES = (0, 1, 7, 2048, 65_537)
"""Nothing, one, odd, one decode step, more than one shot in float32."""
SUM_CASES = (
    *itertools.product(SUM_DTYPES, SUM_SIZES),
    *((dtype, 600_001) for dtype in SUM_DTYPES[:3]),  # more than one slot, or one and a bit
)


def open_backend(seat: Seat, backend: str, timeout_s: float = 20.0) -> Group:
    """`native`, `python`, `mixed` rings, or a backend by the name a user would give."""
    if backend not in ("native", "python", "mixed"):
        machine = discover_machine()
        facts = machine.cpu_flags, machine.num_cores, machine.shared_memory_free_bytes
        return open_group(backend, seat, torch.device("cpu"), timeout_s, facts)[0]
    native = seat.rank % 2 == 0 if backend == "mixed" else backend == "native"
    name = f"{seat.run_id}-{backend}"
    return open_shared_memory(name, seat.rank, seat.world, timeout_s, NUM_CORES, native)


def parts_of(
    size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> list[torch.Tensor]:
    """Every rank's tensor, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, *shape, generator=generator) * 8
    return list(values.to(dtype))


def summed(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum in rank order, 16-bit floats in float32 and rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(dtype)


def digest(tensors: list[torch.Tensor]) -> str:
    seen = hashlib.blake2b(digest_size=8)
    for t in tensors:
        seen.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def sums(seat: Seat, backends: list[str]) -> list[Any]:
    """[digest of all results, cases in which they are not the exact sum in rank order]."""
    results, wrong = [], []
    for backend in backends:
        with open_backend(seat, backend) as group:
            for dtype, count in SUM_CASES:
                parts = parts_of(seat.world, (count,), dtype, count)
                t = parts[seat.rank].clone()
                group.all_reduce(t)
                results.append(t)
                if not torch.equal(t, summed(parts)):
                    wrong.append([backend, str(dtype), count])
            wrong += [[backend, name] for name in _odd_shapes(group)]
            group.barrier()
    return [digest(results), wrong]


def _odd_shapes(group: Group) -> list[str]:
    """Shapes and layouts that a sum gets wrong."""
    wrong = []
    scalar = torch.tensor(2.0)
    group.all_reduce(scalar)
    if scalar.item() != 2.0 * group.size:
        wrong.append("scalar")
    square = torch.arange(24.0).view(4, 6).clone()
    group.all_reduce(square.t())
    if not torch.equal(square, group.size * torch.arange(24.0).view(4, 6)):
        wrong.append("transposed")
    bound = group.bind_all_reduce(4096, DType.BFLOAT16)
    row = torch.ones(1, 33, dtype=torch.bfloat16)
    for _ in range(5):
        bound(row)
    if row[0, 32].item() != float(group.size**5):
        wrong.append("bound call")
    return wrong


def close_sums(seat: Seat, backend: str) -> list[Any]:
    """As `sums` for backends that add in an order of their own: within 2 ulps of the exact sum."""
    results, wrong = [], []
    with open_backend(seat, backend) as group:
        for dtype, count in itertools.product(SUM_DTYPES[:3], SUM_SIZES[1:5]):
            parts = parts_of(seat.world, (count,), dtype, count)
            t = parts[seat.rank].clone()
            group.all_reduce(t)
            results.append(t)
            error = (t.double() - sum(part.double() for part in parts)).abs().max().item()
            if error > 4 * torch.finfo(dtype).eps * 32 * seat.world:
                wrong.append([str(dtype), count, error])
        wrong += [[name] for name in _odd_shapes(group)]
        group.barrier()
    return [digest(results), wrong]


def exchanges(seat: Seat, backends: list[str]) -> list[Any]:
    """Names of the other operations that gave a wrong result."""
    wrong = []
    for backend in backends:
        with open_backend(seat, backend) as group:
            wrong += [[backend, name] for name in _wrong_exchanges(group)]
            group.barrier()
    return wrong


def _wrong_exchanges(group: Group) -> Iterator[str]:
    yield from _wrong_gathers(group)
    rank, size = group.rank, group.size
    for shape in ((3, 5), (100_003,)):
        wholes = parts_of(size, (size, *shape), torch.float32, 5)
        out = torch.empty(shape)
        group.reduce_scatter(out, wholes[rank].clone())
        exact = sum(whole[rank].double() for whole in wholes)
        if not torch.allclose(out.double(), torch.as_tensor(exact), atol=1e-4):
            yield f"reduce_scatter {shape}"
    for src, count in itertools.product(range(size), (1, 700_001)):
        parts = parts_of(size, (count,), torch.bfloat16, src)
        mine = parts[rank].clone()
        group.broadcast(mine, src)
        if not torch.equal(mine, parts[src]):
            yield f"broadcast from {src}"
    for scale in (1, 30_000):
        if not _all_to_all_is_right(group, scale):
            yield f"all_to_all_v {scale}"
    group.barrier()
    if not _ring_of_mail_is_right(group):
        yield "send and recv"


def _wrong_gathers(group: Group) -> Iterator[str]:
    dtypes = (torch.float32, torch.bool, torch.int64, torch.uint8)
    for dtype, shape in itertools.product(dtypes, ((0, 2), (), (1,), (3, 7), (330_001,))):
        parts = parts_of(group.size, shape, dtype, 3)
        out = torch.empty(group.size, *shape, dtype=dtype)
        group.all_gather(out, parts[group.rank].clone())
        if not torch.equal(out, torch.stack(parts)):
            yield f"all_gather {dtype} {shape}"
    columns = parts_of(group.size, (5, 4), torch.float32, 4)
    out = torch.empty(group.size, 4, 5)
    group.all_gather(out, columns[group.rank].t())
    if not torch.equal(out, torch.stack([part.t() for part in columns])):
        yield "all_gather transposed"


def _all_to_all_is_right(group: Group, scale: int) -> bool:
    """Rank s sends (s + 2d) % 3 rows, times `scale`, to rank d: some send nothing."""
    rank, size = group.rank, group.size
    rows = [[(s + 2 * d) % 3 * scale for d in range(size)] for s in range(size)]
    sent = [torch.arange(sum(row) * 2.0).view(-1, 2) + 1e6 * s for s, row in enumerate(rows)]
    received = [row[rank] for row in rows]
    out = torch.empty(sum(received), 2)
    group.all_to_all_v(out, sent[rank], received, rows[rank])
    pieces = [sent[s].split(rows[s])[rank] for s in range(size)]
    return torch.equal(out, torch.cat(pieces))


def _ring_of_mail_is_right(group: Group) -> bool:
    """Every rank sends to the next one, even ranks first."""
    rank, size = group.rank, group.size
    before, after = (rank - 1) % size, (rank + 1) % size
    right = True
    for count in (1, 50_001):
        parts = parts_of(size, (count,), torch.float32, count)
        got = torch.empty(count)
        if rank % 2 == 0:
            group.send(parts[rank], after)
            group.recv(got, before)
        else:
            group.recv(got, before)
            group.send(parts[rank], after)
        right = right and torch.equal(got, parts[before])
    return right


def waits(seat: Seat, backend: str) -> list[int | None]:
    """[wait when rank 1 comes 40 ms late, wait when nobody is late], in ns."""
    found: list[int | None] = []
    with open_backend(seat, backend) as group:
        t = torch.zeros(2048)
        group.all_reduce(t)
        for late_s in (0.04, 0.0):
            group.barrier()
            if seat.rank == 1:
                time.sleep(late_s)
            group.all_reduce(t)
            found.append(group.last_wait_ns)
    return found


def outcome_of(seat: Seat, backend: str, case: str, timeout_s: float = 20.0) -> list[Any]:
    """What a collective ends with where another rank fails: [error, seconds it took]."""
    group = open_backend(seat, backend, timeout_s)
    if case == "raises":
        return _leaves_by_exception(seat, group)
    t = torch.ones(2048)
    group.all_reduce(t)
    if seat.rank == 1 and case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if seat.rank == 1 and case == "left":
        group.close()
        return ["", 0.0]
    if seat.rank == 1 and case == "late":
        time.sleep(timeout_s + 0.7)
    if seat.rank == 1 and case == "aborts":
        time.sleep(0.1)
        group.abort()
    began_s = time.monotonic()
    try:
        group.all_reduce(t)
    except RankError as error:
        return [str(error), time.monotonic() - began_s]
    finally:
        group.close()
    return ["", time.monotonic() - began_s]


def _leaves_by_exception(seat: Seat, group: Group) -> list[Any]:
    began_s = time.monotonic()
    try:
        with group:
            if seat.rank == 1:
                raise ZeroDivisionError("rank 1's own error")
            group.barrier()
    except (RankError, ZeroDivisionError) as error:
        return [str(error), time.monotonic() - began_s]
    return ["", 0.0]


def interrupted(seat: Seat, backend: str) -> list[Any]:
    """Rank 0 waits for rank 1 and gets a signal whose handler raises, as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    group = open_backend(seat, backend)
    group.barrier()
    began_s = time.monotonic()
    try:
        if seat.rank == 0:
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
        else:
            time.sleep(0.6)
        group.barrier()
    except (KeyboardInterrupt, RankError) as error:
        return [type(error).__name__, str(error), time.monotonic() - began_s]
    finally:
        group.close()
    return ["", "", 0.0]


def joins_unless_last(seat: Seat, timeout_s: float) -> str:
    """The last rank never comes to the opening of the group."""
    if seat.rank == seat.world - 1:
        return ""
    try:
        open_backend(seat, "native", timeout_s)
    except RankError as error:
        return str(error)
    return "opened"


def killed_while_opening(seat: Seat) -> None:
    """Rank 0 has made the segment, rank 1 never comes, and rank 0 is killed."""
    if seat.rank == 1:
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    open_backend(seat, "native")


def refusals(seat: Seat) -> list[str]:
    """What wrong calls are told; the group still works afterwards."""
    told = []
    with open_backend(seat, "native") as group:
        t = torch.ones(4)
        calls = (
            lambda: group.all_reduce(torch.ones(4, dtype=torch.bool)),
            lambda: group.all_gather(torch.empty(3, 5), t),
            lambda: group.all_gather(torch.empty(4, seat.world).t(), t),
            lambda: group.broadcast(t, seat.world),
            lambda: group.send(t, seat.rank),
            lambda: group.all_to_all_v(t, t, [4] * seat.world, [4, 0]),
            lambda: group.bind_all_reduce(16, DType.FLOAT8_E4M3),
        )
        for call in calls:
            try:
                call()
                told.append("no error")
            except ValueError as error:
                told.append(str(error))
        group.all_reduce(t)
        told.append(str(t[0].item()))
        bound = group.bind_all_reduce(16, DType.FLOAT32)
    for call in (lambda: bound(t), lambda: group.all_reduce(t), group.barrier):
        try:
            call()
            told.append("no error")
        except RankError as error:
            told.append(str(error))
    group.close()
    return told


def listening(seat: Seat, backend: str) -> list[str]:
    """Local addresses, as /proc/net has them, of this process's listening sockets."""
    with open_backend(seat, backend) as group:
        group.all_reduce(torch.ones(2))
        inodes = set()
        for link in Path("/proc/self/fd").iterdir():
            try:
                inodes.add(os.readlink(link))
            except OSError:
                continue
        found = []
        for table in ("tcp", "tcp6"):
            for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    found.append(fields[1].partition(":")[0])
        group.barrier()
    return found


def sized_sums(seat: Seat, from_bytes: int, pair: list[str]) -> list[Any]:
    """[backends, sums that are wrong, whether bound and plain calls agree, whether waits are
    measured] of small and large sums over two backends side by side."""
    group = open_sized(seat, from_bytes, *pair)
    wrong, same = [], True
    with group:
        bound = group.bind_all_reduce(1 << 20, DType.FLOAT32)
        for count in (1, from_bytes // 4 - 1, from_bytes // 4, 60_001, 3):
            parts = parts_of(seat.world, (count,), torch.float32, count)
            for call in (group.all_reduce, bound):
                t = parts[seat.rank].clone()
                call(t)
                if not torch.allclose(t, summed(parts), rtol=1e-6, atol=1e-5):
                    wrong.append(count)
                same = same and t.shape == parts[0].shape
        out = torch.empty(seat.world, 2)
        group.all_gather(out, torch.full((2,), float(seat.rank)))
        same = same and out[:, 0].tolist() == list(range(seat.world))
        measures = group.last_wait_ns is not None
    return [group.name, wrong, same, measures]


def die_in_a_large_sum(seat: Seat, from_bytes: int) -> str:
    """What rank 0 says when the other one dies before a sum that goes over the second backend."""
    with open_sized(seat, from_bytes) as group:
        group.all_reduce(torch.ones(4))
        group.all_reduce(torch.ones(from_bytes))
        if seat.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            group.all_reduce(torch.ones(from_bytes))
        except RankError as error:
            return str(error)
    return "nothing happened"


def open_sized(
    seat: Seat, from_bytes: int, small: str = "shared_memory", large: str = "gloo"
) -> Group:
    """Two backends, the second from `from_bytes` on, by curves that cross there."""
    ring = CollectiveFit("all_reduce", small, False, 1e-5, 0, 1e7, 1e-5, 0, 1e7, 512, 1 << 20, 0.0)
    gap_s = (from_bytes - 0.5) / 1e7 * 2 * (seat.world - 1) / seat.world
    gloo = replace(
        ring, by=large, a_s=1e-5 + gap_s, c_s=1e-5 + gap_s, b1_bytes_per_s=1e15,
        b2_bytes_per_s=1e15,
    )  # fmt: skip
    curves = CollectiveCurves(seat.world, 4, 1 << 22, (ring, gloo), "made up")
    machine = discover_machine()
    facts = machine.cpu_flags, machine.num_cores, machine.shared_memory_free_bytes
    group, choice = open_group("auto", seat, torch.device("cpu"), 20.0, facts, curves=curves)
    assert choice.from_bytes == from_bytes, choice
    return group
