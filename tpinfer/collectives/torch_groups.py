"""gloo and NCCL groups through torch, without a global process group and without a TCP store.

Ranks of one host meet through a file in a private directory, and gloo is bound to loopback. Ranks
of several hosts meet through a `Meeting`, whose ranks have proved that they share a token, and gloo
is bound to the address by which a rank reaches the others. What is between the ranks afterwards is
the backends' own TCP, neither encrypted nor proven: whoever can reach a host's ports and guesses
what was told in the meeting can join. Such hosts belong into a network of their own. NCCL picks its
own links (NCCL_SOCKET_IFNAME and NCCL_IB_HCA say which).
"""

import contextlib
import ctypes
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store

from tpinfer.collectives.gathered import GatheredGroup
from tpinfer.collectives.group import Group
from tpinfer.collectives.meeting import Meeting
from tpinfer.config.errors import RankError

_ABORT_S = 2.0
"""How long the end of a communicator may take; a rank has two, and 10 s behind rank 0's end."""


class TorchGroup(GatheredGroup):
    """A group over one of torch's process groups."""

    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        process_group: dist.ProcessGroup,
        *,
        shuts_down: bool = True,
    ) -> None:
        """`shuts_down`: NCCL is ended when the group is closed; else it ends with the process."""
        super().__init__(rank, size)
        self._shuts_down = shuts_down
        self.name = name
        self.can_record = name == "nccl"
        self._group = process_group
        self._is_closed = False

    @property
    def process_group(self) -> dist.ProcessGroup:
        """torch's own."""
        return self._group

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._wait(self._group.allreduce([tensor]))

    def all_gather(self, out: torch.Tensor, tensor: torch.Tensor) -> None:
        parts = list(out.unbind(0))
        self._wait(self._group.allgather([parts], [tensor.contiguous()]))

    def all_to_all(self, out: torch.Tensor, t: torch.Tensor) -> None:
        self._wait(self._group.alltoall_base(out, t, [], []))

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = src
        self._wait(self._group.broadcast([t], options))

    def barrier(self) -> None:
        self._wait(self._group.barrier())

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self._wait(self._group.send([tensor.contiguous()], to, 0))

    def recv(self, tensor: torch.Tensor, source: int) -> None:
        self._wait(self._group.recv([tensor], source, 0))

    def abort(self) -> None:
        """NCCL ends its kernels, also those that wait for a peer; gloo's peers notice by their
        time-out."""
        if self.name == "nccl" and not self._is_closed:
            self._end(self._group.abort)

    def close(self) -> None:
        if self.name == "nccl" and not self._is_closed:
            # What is left to the interpreter's end hangs there, on some rank, in any order.
            self._is_closed = True
            if self._shuts_down:
                self._end(self._group.shutdown)
            else:  # on a rank whose peers are gone that can hang, in native code
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))

    def _end(self, call: Callable[[], None]) -> None:
        """Where it hangs the group is never destroyed: that would hang too, with everybody."""
        if not _end_within(_ABORT_S, call):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))

    def _wait(self, work: dist.Work | None) -> None:
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise RankError(
                f"{self.name}: a collective failed ({str(error)[:200]}); "
                "another rank has died or hangs - look at its output"
            ) from error


def _end_within(limit_s: float, call: Callable[[], None]) -> bool:
    """Run what ends a communicator, and go on without it where it hangs or fails: NCCL waits for
    kernels and recordings that another rank's death can keep from ending. Whether it is over."""

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            call()

    thread = threading.Thread(target=run, name="tpinfer-nccl-end", daemon=True)
    thread.start()
    thread.join(limit_s)
    return not thread.is_alive()


class MeetingStore(Store):
    """A meeting as torch's backends see it: keys and values, each told once."""

    def __init__(self, meeting: Meeting, name: str) -> None:
        """`name` keeps the keys of one group apart from another's."""
        super().__init__()
        self._meeting = meeting
        self._name = name

    def set(self, key: str, value: str | bytes) -> None:
        """Tell the others."""
        self._meeting.tell(self._name + key, value.encode() if isinstance(value, str) else value)

    def get(self, key: str) -> bytes:
        """Wait for what some rank tells. Raises RankError."""
        return self._meeting.ask(self._name + key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """As `get`, for several keys."""
        limit_s = None if timeout is None else timeout.total_seconds()
        for key in keys:
            self._meeting.ask(self._name + key, limit_s)

    def check(self, keys: list[str]) -> bool:
        """Whether all are known; never waits, also when the meeting is over."""
        return all(self._meeting.knows(self._name + key) for key in keys)

    def clone(self) -> "MeetingStore":
        """One that may be used beside this one."""
        return self


def open_gloo(
    store: Store, rank: int, size: int, timeout_s: float, address: str = "127.0.0.1"
) -> Group:
    """A gloo group whose sockets listen on `address` alone, one of this host as a number."""
    # torch declares neither the options nor that its backends take a group's calls.
    options = cast(Any, dist.ProcessGroupGloo)._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=timeout_s)
    try:
        group = dist.ProcessGroupGloo(store, rank, size, options)
    except RuntimeError as error:
        raise RankError(f"gloo: the ranks did not meet within {timeout_s:g} s ({error})") from error
    return TorchGroup("gloo", rank, size, cast(Any, group))


def open_nccl(
    store: Store, place: tuple[int, int], device: torch.device, timeout_s: float, *,
    shuts_down: bool = True,
) -> Group:  # fmt: skip
    """An NCCL group on this rank's GPU, connected before it returns; place: (rank, size)."""
    rank, size = place
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    try:
        group = dist.ProcessGroupNCCL(store, rank, size, options)
        opened = TorchGroup("nccl", rank, size, cast(Any, group), shuts_down=shuts_down)
        # The first collective makes the connections; a graph capture later must not.
        opened.all_reduce(torch.zeros(1, device=device))
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise RankError(f"nccl: the ranks could not connect ({str(error)[:300]})") from error
    return opened


def directory_store(directory: Path, size: int, timeout_s: float) -> Store:
    """For ranks of one host, which all can enter `directory` and nobody else."""
    store = FileStore(str(directory / "meeting"), size)
    store.set_timeout(timedelta(seconds=timeout_s))
    return store
