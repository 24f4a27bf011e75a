"""NCCL's symmetric pool, over ranks that are threads and a torch that is made up: who uses it, from
which size on, and that one rank's trouble is every rank's reason."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.cpu.thread_ranks import ThreadExchange
from tpinfer.collectives.gathered import GatheredGroup
from tpinfer.collectives.group import Group
from tpinfer.collectives.nccl_pool import POOL_BYTES, PoolGroup, faster_from, open_pool_group

CPU = torch.device("cpu")


class ThreadGroup(GatheredGroup):
    """Stands for NCCL's. Keeps where the sums it made lay."""

    name, can_record = "nccl", True

    def __init__(self, rank: int, exchange: ThreadExchange) -> None:
        super().__init__(rank, 2)
        self._exchange = exchange
        self.summed: list[int] = []
        self.off = 0.0
        self.is_closed = False

    def all_reduce(self, t: torch.Tensor) -> None:
        self.summed.append(t.data_ptr())
        parts = self._exchange.swap(self.rank, t)
        t.copy_(torch.stack(parts).sum(0) + self.off)

    def all_gather(self, out: torch.Tensor, t: torch.Tensor) -> None:
        out.copy_(torch.stack(self._exchange.swap(self.rank, t)))

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        t.copy_(self._exchange.swap(self.rank, t)[src])

    def send(self, t: torch.Tensor, dst: int) -> None:
        self._exchange.swap(self.rank, t)

    def recv(self, t: torch.Tensor, src: int) -> None:
        t.copy_(self._exchange.swap(self.rank, t)[src])

    def barrier(self) -> None:
        self._exchange.swap(self.rank, torch.empty(0))

    def abort(self) -> None:
        self._exchange.abort()

    def close(self) -> None:
        self.is_closed = True


class FakeTorch:
    """torch.cuda and NCCL's process group in one, as far as pools go."""

    mem_allocator = "NCCL's"

    def __init__(self, version: tuple[int, ...] = (2, 28, 9), refuses: Exception | None = None):
        self.nccl = SimpleNamespace(version=lambda: version)
        self.refuses = refuses
        self.registered: list[Any] = []

    def MemPool(self, allocator: str) -> dict[str, Any]:
        assert allocator == self.mem_allocator
        return {"open": False}

    @contextmanager
    def use_mem_pool(self, pool: dict[str, Any]) -> Iterator[None]:
        yield
        pool["was used"] = True

    def register_mem_pool(self, pool: dict[str, Any], symm: bool = False) -> None:
        assert pool["was used"] and symm, "what it holds is registered, as one over all ranks"
        if self.refuses is not None:
            raise self.refuses
        self.registered.append(pool)


def on_two_ranks(call: Callable[[ThreadGroup], Any]) -> list[Any]:
    exchange = ThreadExchange(2)
    found: list[Any] = [None, None]

    def run(rank: int) -> None:
        try:
            found[rank] = call(ThreadGroup(rank, exchange))
        except BaseException as error:
            found[rank] = error
            exchange.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


def opened(group: ThreadGroup, fake: FakeTorch, gain: float = 0.5) -> tuple[Group, str, str]:
    """`gain`: time with the pool over that without, from 4 MiB on; below it is half as fast."""
    sizes = iter([(s, w) for s in (0, 0, 1, 1, 1) for w in (False, True)])

    def time(call: Callable[[], None]) -> float:
        call()
        is_large, is_pooled = next(sizes)
        return (gain if is_large else 2.0) * 1e-3 if is_pooled else 1e-3

    return open_pool_group(group, fake, CPU, fake, time)


def test_sums_from_where_it_gains_lie_in_the_pool() -> None:
    def call(nccl: ThreadGroup) -> Any:
        group, words, why = opened(nccl, FakeTorch())
        assert isinstance(group, PoolGroup) and group.can_record and group.name == "nccl"
        assert words == "(symmetric pool from 4.19 MB to 67.1 MB)"
        assert "1000 us without and 500 with" in why
        buffer = group._buffer
        assert buffer is not None and buffer.nbytes == POOL_BYTES
        where = []
        for count in (1000, (4 << 20) // 2, POOL_BYTES // 2, POOL_BYTES // 2 + 1):
            t = torch.full((count,), float(nccl.rank + 1), dtype=torch.bfloat16)
            group.all_reduce(t)
            assert bool((t == 3).all())
            where.append(nccl.summed[-1] == buffer.data_ptr())
        assert where == [False, True, True, False]
        whole = torch.full((1 << 20,), nccl.rank, dtype=torch.int64)
        group.all_reduce(whole)
        assert int(whole[0]) == 1 and nccl.summed[-1] == whole.data_ptr(), "floats alone"
        out, mine = torch.empty(2, 3), torch.full((3,), float(nccl.rank))
        group.all_gather(out, mine)
        assert out[:, 0].tolist() == [0, 1]
        group.close()
        assert nccl.is_closed
        return True

    assert on_two_ranks(call) == [True, True]


REFUSED = {
    "an old NCCL": ({"version": (2, 26, 5)}, 0.5, "NCCL 2.26.5 has no symmetric windows"),
    "one that registers no such pools": (
        {"refuses": TypeError("register_mem_pool(): incompatible function arguments")}, 0.5,
        "incompatible function arguments",
    ),
    "one that fails": ({"refuses": RuntimeError("NCCL error: x\nmore")}, 0.5, "NCCL error: x"),
    "no gain": ({}, 1.5, "not faster: "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_stands_against_it_is_told(name: str) -> None:
    settings, gain, told = REFUSED[name]

    def call(nccl: ThreadGroup) -> Any:
        group, words, why = opened(nccl, FakeTorch(**settings), gain)
        assert words == ""
        t = torch.full((POOL_BYTES // 4,), 1.0)
        group.all_reduce(t)
        assert nccl.summed[-1] == t.data_ptr(), "what is not used sums nothing"
        return why

    first, second = on_two_ranks(call)
    assert told in first and told in second and "\n" not in first


def test_one_rank_that_cannot_keeps_all_from_it() -> None:
    def call(nccl: ThreadGroup) -> Any:
        refuses = RuntimeError("out of windows") if nccl.rank else None
        group, _, why = opened(nccl, FakeTorch(refuses=refuses))
        t = torch.full((POOL_BYTES // 4,), 1.0)
        group.all_reduce(t)
        return nccl.summed[-1] == t.data_ptr(), why

    (first, why), (second, own) = on_two_ranks(call)
    assert first and second
    assert why == "no symmetric pool: rank 1: out of windows"
    assert own == "no symmetric pool: out of windows"


def test_wrong_sums_are_not_used() -> None:
    """Also where only one rank's are: it makes the same calls as the other one."""

    def call(nccl: ThreadGroup) -> Any:
        nccl.off = float(nccl.rank)
        _, words, why = opened(nccl, FakeTorch())
        assert words == ""
        return why

    first, second = on_two_ranks(call)
    assert first == "the symmetric pool is not used: rank 1: its sum of torch.float32 is wrong"
    assert second == "the symmetric pool is not used: its sum of torch.float32 is wrong"


def test_it_is_used_from_where_all_larger_sums_gain() -> None:
    slow, fast = (1.0, 2.0), (2.0, 1.0)
    assert faster_from([slow, fast, slow, fast, fast]) == 16 << 20
    assert faster_from([fast] * 5) == 256 << 10
    assert faster_from([fast, fast, fast, fast, slow]) is None
