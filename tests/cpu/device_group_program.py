"""Cases of `test_device_group`: python -m tests.cpu.device_group_program CASE. Ranks are real
processes on the CPU; torch's symmetric memory is a fake over files that all map, its large sums go
over gloo, and own kernels run in Triton's interpreter."""

import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.cpu.triton_interpreter import interpret

interpret()

import torch  # noqa: E402
import torch.distributed._symmetric_memory as symmetric  # noqa: E402
from torch._C._distributed_c10d import PrefixStore  # noqa: E402

from tpinfer.collectives import device_group  # noqa: E402
from tpinfer.collectives.group import Group  # noqa: E402
from tpinfer.collectives.host_staged import HostStagedGroup  # noqa: E402
from tpinfer.collectives.torch_groups import directory_store, open_gloo  # noqa: E402
from tpinfer.collectives.triton_one_shot import OneShot  # noqa: E402

CPU = torch.device("cpu")


class FakeHandle:
    """What a rendezvous gives."""

    multicast_ptr = 0

    def __init__(self, directory: Path, number: int) -> None:
        self._directory, self._number = directory, number

    def get_buffer(self, rank: int, sizes: tuple[int], dtype: torch.dtype) -> torch.Tensor:
        path = self._directory / f"{self._number}-{rank}"
        until = time.monotonic() + 30
        while not path.is_file() or path.stat().st_size < sizes[0]:
            assert time.monotonic() < until, f"{path} does not come"
            time.sleep(0.005)
        return torch.from_file(str(path), shared=True, size=sizes[0], dtype=dtype)


class FakeSymmetricMemory:
    """Allocations are files; `breaks` says that this rank has none."""

    def __init__(self, directory: Path, rank: int, breaks: bool) -> None:
        self._directory, self._rank, self._breaks = directory, rank, breaks
        self._number = 0

    def empty(self, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if self._breaks:
            raise RuntimeError("no room for symmetric memory\nand more")
        self._number += 1
        path = self._directory / f"{self._number}-{self._rank}"
        with path.with_suffix(".new").open("wb") as made:
            made.truncate(size)
        path.with_suffix(".new").rename(path)
        t = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        NUMBERS[t.data_ptr()] = self._number
        return t

    def rendezvous(self, t: torch.Tensor, group: str) -> FakeHandle:
        return FakeHandle(self._directory, NUMBERS[t.data_ptr()])


NUMBERS: dict[int, int] = {}
LARGE_SUMS: list[int] = []
"""Bytes of each large sum."""


def open_rank(
    directory: Path, rank: int, size: int, *, breaks: bool = False
) -> tuple[Group, str, str]:
    fake = FakeSymmetricMemory(directory, rank, breaks)
    named: Any = symmetric
    named.empty, named.rendezvous = fake.empty, fake.rendezvous
    store = directory_store(directory, size, 30.0)
    gloo = open_gloo(store, rank, size, 30.0)
    library = torch.library.Library("symm_mem", "IMPL", "CPU")

    def two_shot(t: torch.Tensor, op: str, group_name: str) -> torch.Tensor:
        assert op == "sum" and t.nbytes % (16 * size) == 0
        LARGE_SUMS.append(t.nbytes)
        gloo.all_reduce(t)
        return t

    library.impl("two_shot_all_reduce_", two_shot)
    LIBRARIES.append(library)
    rest = HostStagedGroup(gloo, CPU)
    return device_group.open_device_group(rest, PrefixStore("symmetric", store), "of-test", CPU)


LIBRARIES: list[torch.library.Library] = []


def rank_routes(directory: Path, rank: int, size: int) -> None:
    """Each size its way, with its stamp; gathers, the fused norm, and what goes to the rest."""
    device_group.LARGE_BYTES = 4 << 20
    group, words, _why = open_rank(directory, rank, size)
    assert group.name == "symmetric_memory" and group.can_record
    assert words.startswith("own one-shot") and "gloo through the host" in words, words
    assert group.stamps is not None and group.num_stamped == 0
    LARGE_SUMS.clear()
    group.stamps.fill_(-1)
    total = size * (size + 1) // 2
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for num_bytes in (4, (1 << 20) + 40):
            t = torch.full((num_bytes // dtype.itemsize,), float(rank + 1), dtype=dtype)
            group.all_reduce(t)
            assert bool((t == total).all()), (dtype, num_bytes)
    assert LARGE_SUMS == [(1 << 20) + 64] * 2, "float32 and bfloat16, padded"
    whole = torch.full((4,), rank + 1)
    group.all_reduce(whole)
    assert whole.tolist() == [total] * 4
    stamps = group.stamps[:8].tolist()
    assert stamps[1::2] == [0, 0, 0, -1] and stamps[6] == 0, stamps
    assert min(stamps[:6:2]) >= 0, stamps
    for t in (torch.tensor([rank, 7]), torch.tensor([rank], dtype=torch.uint8)):
        out = torch.empty(size, *t.shape, dtype=t.dtype)
        group.all_gather(out, t)
        assert out[:, 0].tolist() == list(range(size))
    normed = group.bind_normed_reduce(torch.full((16,), 2.0), 0.0)
    assert normed is not None
    residual = torch.ones(3, 16)
    hidden = normed(torch.full((3, 16), float(rank + 1)), residual)
    assert hidden is not None and bool((residual == total + 1).all())
    torch.testing.assert_close(hidden, torch.full((3, 16), 2.0))
    assert normed(torch.ones(65, 16), torch.ones(65, 16)) is None
    sent = torch.full((3,), float(rank))
    group.broadcast(sent, size - 1)
    assert sent.tolist() == [size - 1.0] * 3
    group.barrier()
    group.close()
    group.close()


def rank_without(directory: Path, rank: int, size: int) -> None:
    """One rank has no symmetric memory: none uses it, and all say whose fault it is."""
    group, _words, why = open_rank(directory, rank, size, breaks=rank == size - 1)
    assert group.name == "gloo through the host", group.name
    assert "no room for symmetric memory" in why and "and more" not in why, why
    assert (f"rank {size - 1}:" in why) == (rank != size - 1), why
    t = torch.ones(3)
    group.all_reduce(t)
    assert t.tolist() == [size] * 3
    assert group.bind_normed_reduce(torch.ones(3), 0.0) is None and group.stamps is None


def rank_kernelless(directory: Path, rank: int, size: int) -> None:
    """One rank's own kernel fails once all ranks take part, another's sums come out wrong: the
    others leave their wait, and all sum by torch's ops."""
    device_group.LARGE_BYTES = 4 << 20
    real = OneShot.sum

    def fails(self: OneShot, t: torch.Tensor, stamp: torch.Tensor) -> None:
        if self.size > 1:
            raise RuntimeError("ptxas is missing")
        real(self, t, stamp)

    if rank == size - 1:
        OneShot.sum = fails
    group, words, why = open_rank(directory, rank, size)
    assert "ptxas is missing" in why and "own one-shot" not in words, (words, why)
    assert group.name == "symmetric_memory" and group.stamps is None
    LARGE_SUMS.clear()
    t = torch.ones(3)
    group.all_reduce(t)
    assert t.tolist() == [size] * 3 and len(LARGE_SUMS) == 1
    out = torch.empty(size, 3)
    group.all_gather(out, t)
    assert out.tolist() == [[size] * 3] * size


def rank_wrong(directory: Path, rank: int, size: int) -> None:
    """A kernel that computes something else is not used on any rank."""
    device_group.LARGE_BYTES = 4 << 20
    real = OneShot.sum

    def wrong(self: OneShot, t: torch.Tensor, stamp: torch.Tensor) -> None:
        real(self, t, stamp)
        t += 1

    if rank == 0:
        OneShot.sum = wrong
    _, words, why = open_rank(directory, rank, size)
    assert "off by 1" in why and ("rank 0" in why) == (rank != 0) and "own one-shot" not in words, (
        words,
        why,
    )


def rank_aborted(directory: Path, rank: int, size: int) -> None:
    """A rank that gives up frees those that wait in the kernel."""
    device_group.LARGE_BYTES = 4 << 20
    group, _, _ = open_rank(directory, rank, size)
    if rank == size - 1:
        time.sleep(0.3)
        group.abort()
        return
    group.all_reduce(torch.ones(3))


def several(case: str, size: int) -> None:
    """Run a case in `size` processes."""
    with TemporaryDirectory() as name:
        command = [sys.executable, "-m", "tests.cpu.device_group_program", case, name]
        ranks = [subprocess.Popen([*command, str(r), str(size)]) for r in range(size)]
        try:
            codes = [rank.wait(timeout=60) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert codes == [0] * size, codes


if __name__ == "__main__":
    if len(sys.argv) > 2:
        torch.set_num_threads(1)
        try:
            globals()[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # gloo's threads do not outlive an ordinary exit
    else:
        several(f"rank_{sys.argv[1]}", 2)
        print(f"{sys.argv[1]} agrees")
