"""Opening the step-plan wire of a run: through shared memory to ranks of rank 0's host, over TCP to
ranks of other hosts, both behind the interface of `steps.interface`.

Ranks are numbered host by host, as launchers do unless told otherwise, so rank 0's host has ranks
0 .. local_world - 1: a rank knows it is there when its rank is its local rank.
"""

import contextlib
import time
from collections.abc import Sequence
from typing import Protocol

from tpinfer.config.environment import Environment, read_environment
from tpinfer.config.errors import ConfigError
from tpinfer.config.meeting import find_meeting_point
from tpinfer.steps.handshake import WireRun
from tpinfer.steps.interface import PlanReader, PlanWriter, ReaderFailure, StepFailure
from tpinfer.steps.shm_reader import ShmPlanReader
from tpinfer.steps.shm_writer import ShmPlanWriter
from tpinfer.steps.tcp_reader import TcpPlanReader
from tpinfer.steps.tcp_writer import TcpPlanWriter


class Place(Protocol):
    """What of a seat the wire depends on."""

    @property
    def rank(self) -> int:
        """Index in the run."""
        ...

    @property
    def world(self) -> int:
        """Ranks in the run."""
        ...

    @property
    def local_rank(self) -> int:
        """Index among the ranks of this host."""
        ...

    @property
    def local_world(self) -> int:
        """Ranks on this host."""
        ...

    @property
    def run_id(self) -> str:
        """Name of the run."""
        ...

    @property
    def generation(self) -> int:
        """How often the group was built again."""
        ...


class PlanFanout(PlanWriter):
    """One writer to the ranks of this host and one to those of others, as if they were one."""

    def __init__(self, local: PlanWriter, remote: PlanWriter) -> None:
        """`local` has the readers with the lower numbers."""
        self._local = local
        self._remote = remote

    def send(self, payload: bytes) -> None:
        """The longer way first."""
        self._remote.send(payload)
        self._local.send(payload)

    def local_pids(self, ranks: Sequence[int]) -> Sequence[int]:
        """Of the ranks of this host, which have the lower numbers."""
        num_local = len(self._local.reader_progress())
        return self._local.local_pids([rank for rank in ranks if rank <= num_local])

    def wait_attached(self, timeout_s: float) -> None:
        """Return once every reader is there. Raises RankError on time-out."""
        until_s = time.monotonic() + timeout_s
        self._remote.wait_attached(timeout_s)
        self._local.wait_attached(max(0.0, until_s - time.monotonic()))

    def failed_readers(self, check_processes: bool | None = None) -> list[ReaderFailure]:
        """Failures of both, by rank."""
        local = self._local.failed_readers(check_processes)
        return local + self._remote.failed_readers(check_processes)

    def failed_steps(self) -> list[StepFailure]:
        """Failed steps of both, by rank; each is told once."""
        return self._local.failed_steps() + self._remote.failed_steps()

    def reader_progress(self) -> list[tuple[int, int]]:
        """Progress of both, by rank."""
        return self._local.reader_progress() + self._remote.reader_progress()

    def close(self) -> None:
        """Close both. May be called twice."""
        self._local.close()
        self._remote.close()


def open_plan_writer(
    place: Place, timeout_s: float = 300.0, environment: Environment | None = None
) -> PlanWriter | None:
    """Rank 0's end; None for a lone rank. Returns once all ranks of other hosts are there.

    `timeout_s` bounds that wait and later ones; `environment` (by default this process's) says
    where several hosts meet. Raises ConfigError for what is missing, RankError for ranks that do
    not come.
    """
    if place.world == 1:
        return None
    with contextlib.ExitStack() as opened:
        writers: list[PlanWriter] = []
        if place.local_world > 1:
            local = _open_segment(wire_name(place), place.local_world - 1, timeout_s)
            opened.callback(local.close)
            writers.append(local)
        if place.world > place.local_world:
            point = find_meeting_point(environment or read_environment())
            run = WireRun(wire_name(place), place.world, point.token)
            ranks = range(place.local_world, place.world)
            remote = TcpPlanWriter(point.address, point.port, run, ranks, timeout_s)
            opened.callback(remote.close)
            remote.wait_attached(timeout_s)
            writers.append(remote)
        opened.pop_all()
    return writers[0] if len(writers) == 1 else PlanFanout(*writers)


def open_plan_reader(
    place: Place, timeout_s: float = 60.0, environment: Environment | None = None
) -> PlanReader:
    """The end of a rank other than 0. `timeout_s` bounds the wait for rank 0 to open its own.

    Raises ConfigError for what is missing, RankError when rank 0 does not come or refuses.
    """
    name = wire_name(place)
    if place.rank == place.local_rank:
        return ShmPlanReader(name, place.rank - 1, timeout_s)
    point = find_meeting_point(environment or read_environment())
    run = WireRun(name, place.world, point.token)
    return TcpPlanReader(point.address, point.port, run, place.rank, timeout_s)


def wire_name(place: Place) -> str:
    """Name of a run's wire, the same on all its ranks and of no other generation."""
    return f"{place.run_id}-g{place.generation}-plans"


def _open_segment(name: str, num_readers: int, timeout_s: float) -> ShmPlanWriter:
    try:
        return ShmPlanWriter(name, num_readers, timeout_s=timeout_s)
    except OSError as error:
        raise ConfigError(
            f"the step plans need about 1 MB of /dev/shm ({error.strerror}); free some there or "
            "give the container more (--shm-size=64m)"
        ) from error
