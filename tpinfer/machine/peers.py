"""Messages between the processes that discover their hosts, and what their clocks read. No torch.

Under mpirun mpi4py carries them (the extra `mpi`), as bytes: nothing is pickled.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tpinfer.config.errors import RankError

NUM_PINGS = 50
_CLOCK_BYTES = 8


class Peers(Protocol):
    """The processes of one run."""

    rank: int
    size: int

    def send(self, message: bytes, to: int) -> None:
        """Send; may wait until it is received."""
        ...

    def receive(self, source: int) -> bytes:
        """The next message from `source`."""
        ...


class MpiPeers:
    """All ranks that mpirun started."""

    def __init__(self) -> None:
        """Raises RankError without mpi4py or an MPI library."""
        try:
            from mpi4py import MPI  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise RankError(
                f"discovery under mpirun needs mpi4py and an MPI library ({error}); pip install "
                "'tpinfer[mpi]'"
            ) from error
        self._mpi: Any = MPI
        self._world = MPI.COMM_WORLD
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()

    def send(self, message: bytes, to: int) -> None:
        """See `Peers`."""
        self._world.Send([message, self._mpi.BYTE], to)

    def receive(self, source: int) -> bytes:
        """See `Peers`."""
        status = self._mpi.Status()
        self._world.Probe(source, self._mpi.ANY_TAG, status)
        message = bytearray(status.Get_count(self._mpi.BYTE))
        self._world.Recv([message, self._mpi.BYTE], source)
        return bytes(message)


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """Another process's clock minus ours."""

    ns: int
    error_ns: int
    """Half of the shortest way there and back: the true offset is no farther off."""


def gather(peers: Peers, message: bytes) -> list[bytes]:
    """Everybody's message by rank, on rank 0; an empty list on the others."""
    if peers.rank:
        peers.send(message, 0)
        return []
    return [message, *(peers.receive(source) for source in range(1, peers.size))]


def broadcast(peers: Peers, message: bytes) -> bytes:
    """Rank 0's message, on all."""
    if peers.rank:
        return peers.receive(0)
    for to in range(1, peers.size):
        peers.send(message, to)
    return message


def measure_offset(
    peers: Peers, other: int, clock: Callable[[], int] = time.time_ns
) -> ClockOffset:
    """What `other`'s clock shows beyond ours, by ping-pong; `other` must be in `answer_pings`.

    Of all rounds the one with the shortest way there and back counts, and its middle is taken for
    the moment of the answer (Cristian 1989).
    """
    best = ClockOffset(0, 1 << 62)
    for _ in range(NUM_PINGS):
        sent = clock()
        peers.send(b"", other)
        answered = int.from_bytes(peers.receive(other), "little", signed=True)
        received = clock()
        half = (received - sent + 1) // 2
        if half < best.error_ns:
            best = ClockOffset(answered - (sent + received) // 2, half)
    return best


def answer_pings(peers: Peers, clock: Callable[[], int] = time.time_ns) -> None:
    """The other side of `measure_offset`, for rank 0."""
    for _ in range(NUM_PINGS):
        peers.receive(0)
        peers.send(clock().to_bytes(_CLOCK_BYTES, "little", signed=True), 0)
