"""Where the ranks of several hosts tell each other their addresses before a group opens: a star of
TCP connections around rank 0, each proven with the run's shared token (`steps.handshake`) before
anything is said. It lasts until all groups of a call are open.

    rank -> rank 0    TELL   key and value; rank 0 passes it on to every other rank
                      LEFT   this rank needs nothing more
    rank 0 -> rank    TELL   what another rank told
                      LOST   the ranks cannot meet: why
                      CLOSE  all have left

torch would do this through a TCPStore, and torchrun runs one already; both answer whoever reaches
their port, on every interface. Here a rank of another run, another generation or another token is
refused, and says so. Knows nothing of torch.
"""

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping

from tpinfer.config.environment import Environment, read_environment
from tpinfer.config.errors import RankError
from tpinfer.config.meeting import find_meeting_point
from tpinfer.launching.seat import Seat
from tpinfer.steps.admission import Admission, Attached
from tpinfer.steps.attach import attach, rank_0_at
from tpinfer.steps.frames import FrameStream, frame
from tpinfer.steps.handshake import WireRun
from tpinfer.steps.sockets import end_sending

TELL, LEFT, LOST, CLOSE = 1, 2, 3, 4
_MOST_BYTES = 1 << 20
_TO_RANK_0 = {TELL: _MOST_BYTES, LEFT: 0}
_MOST_WORDS = 4096
_FROM_RANK_0 = {TELL: _MOST_BYTES, LOST: _MOST_WORDS, CLOSE: 0}
_KEY_SIZE = struct.Struct("<H")
_TURN_S, _LAST_WORDS_S, _RECEIVE_BYTES = 0.05, 1.0, 1 << 16

Progress = Callable[[str], None]


class Meeting:
    """This rank's end. Use as a context manager on every rank: leaving it waits for the others, and
    leaving it by an exception ends it for all of them."""

    def __init__(
        self, rank: int, address: str, peers: Mapping[int, tuple[str, socket.socket]],
        timeout_s: float,
    ) -> None:  # fmt: skip
        """`peers` are who this rank is connected to, by rank: a name for messages, and the socket.
        For rank 0 everybody else, for others rank 0."""
        self.rank = rank
        self.address = address
        """This host's address on the way to the others, as a number."""
        self.timeout_s = timeout_s
        self._peers = dict(peers)
        self._told: dict[str, bytes] = {}
        self._present = set(peers)  # have not left; for ranks other than 0: has not closed
        self._failure = ""
        self._is_over = False
        self._changed = threading.Condition(threading.RLock())
        self._streams = {
            peer: FrameStream(_FROM_RANK_0 if rank else _TO_RANK_0, name)
            for peer, (name, _) in peers.items()
        }
        # A thread, because what opens a group waits in native code while others ask for what was
        # told here.
        self._thread = threading.Thread(target=self._listen, name="tpinfer-meeting", daemon=True)
        self._thread.start()

    def tell(self, key: str, value: bytes) -> None:
        """Let every rank know."""
        name = key.encode()
        with self._changed:
            self._told[key] = value
            self._changed.notify_all()
            if not self._is_over:
                self._send(TELL, _KEY_SIZE.pack(len(name)) + name + value, None)

    def ask(self, key: str, timeout_s: float | None = None) -> bytes:
        """Wait for what some rank tells under `key`. Raises RankError on time-out, by default the
        meeting's, and as soon as a rank is gone."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        if self.rank:
            limit_s += _LAST_WORDS_S  # rank 0 knows who is missing, and its time runs out first
        self._wait(lambda: key in self._told, limit_s, f"to tell {key!r}")
        return self._told[key]

    def knows(self, key: str) -> bool:
        """Whether it has been told; never waits."""
        return key in self._told

    def leave(self) -> None:
        """Wait until every rank leaves. Raises RankError on time-out or where one is gone."""
        if self.rank:
            self._send(LEFT, b"", None)
        self._wait(lambda: not self._present, self.timeout_s, "to have connected")
        if self.rank == 0:
            self._send(CLOSE, b"", None)

    def close(self, why: str = "") -> None:
        """Let go of the connections; `why` is told to the others where they still wait."""
        if self.rank == 0 and self._present:
            self._send(LOST, why.encode()[:_MOST_WORDS], None)
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join()
        for _, connection in self._peers.values():
            connection.close()

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, *_: object) -> None:
        try:
            if kind is None:
                self.leave()
        finally:
            self.close("" if kind is None else f"rank {self.rank} gave up: {error}")

    def _wait(self, is_done: Callable[[], bool], timeout_s: float, what: str) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: is_done() or self._failure or self._is_over, max(0.0, timeout_s)
            )
            if is_done():
                return
            if self._failure:
                raise RankError(self._failure)
            if self._is_over:
                raise RankError("the ranks' meeting is over; open a new group")
            raise RankError(
                f"rank {self.rank} waited {timeout_s:g} s for other ranks {what}; look at their "
                "own output and at firewalls between the hosts"
            )

    def _send(self, kind: int, payload: bytes, source: int | None) -> None:
        """To all peers but the one it came from."""
        text = frame(kind, payload)
        with self._changed:
            for peer, (_, connection) in self._peers.items():
                if peer != source:
                    with contextlib.suppress(OSError):  # the thread meets the same end
                        connection.sendall(text)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer, (_, connection) in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, peer)
            while not self._is_over and selector.get_map():
                for key, _ in selector.select(_TURN_S):
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)

    def _hear(self, peer: int) -> bool:
        """Take in what a peer has said; False once nothing follows."""
        name, connection = self._peers[peer]
        stream = self._streams[peer]
        try:
            received = connection.recv(_RECEIVE_BYTES)
            stream.feed(received)
            while (found := stream.take()) is not None:
                self._note(peer, *found)
        except TimeoutError:
            return True
        except OSError as error:
            self._lose(peer, f"the connection to {name} broke ({error.strerror})")
            return False
        except (RankError, ValueError, struct.error) as error:
            self._lose(peer, f"{name} said what no rank says ({error})")
            return False
        if not received:
            self._lose(peer, f"{name} ended while the ranks met; its own error says why")
        return bool(received)

    def _note(self, peer: int, kind: int, payload: bytes) -> None:
        with self._changed:
            if kind == TELL:
                (size,) = _KEY_SIZE.unpack_from(payload)
                end = _KEY_SIZE.size + size
                if end > len(payload):
                    raise ValueError(f"a key of {size} bytes in {len(payload)}")
                self._told[payload[_KEY_SIZE.size : end].decode()] = payload[end:]
                if self.rank == 0:
                    self._send(TELL, payload, peer)
            elif kind == LOST:
                self._failure = self._failure or payload.decode(errors="replace")
            else:
                self._present.discard(peer)
            self._changed.notify_all()

    def _lose(self, peer: int, why: str) -> None:
        """A peer is gone: no failure where it had left."""
        with self._changed:
            if peer in self._present and not self._is_over:
                self._failure = self._failure or why
                if self.rank == 0:
                    self._send(LOST, why.encode()[:_MOST_WORDS], peer)
            self._changed.notify_all()


def meet(
    seat: Seat, purpose: str, timeout_s: float, progress: Progress,
    environment: Environment | None = None,
) -> Meeting:  # fmt: skip
    """Bring all ranks of a run over several hosts together. Every rank calls it, for one `purpose`
    after the other; rank 0 listens on MASTER_ADDR until all are there, on the port of the step
    plans, which are not sent yet.

    `progress` is told of whoever is turned away; `environment` is by default this process's. Raises
    ConfigError for what is missing there, RankError where a rank does not come, is refused, or
    cannot prove that it has the token.
    """
    point = find_meeting_point(environment or read_environment())
    run = WireRun(f"{seat.run_id}-g{seat.generation}-{purpose}", seat.world, point.token)
    if seat.rank:
        connection = attach(point.address, point.port, run, seat.rank, timeout_s)
        name = rank_0_at(point.address, point.port)
        return _seated(seat.rank, {0: (name, connection)}, timeout_s)
    door = Admission.open(point.address, point.port, run, set(range(1, seat.world)))
    arrived: list[Attached] = []
    try:
        _await_all(door, arrived, timeout_s, progress)
    except BaseException as error:
        for one in arrived:
            _send_away(one.connection, str(error))
        raise
    finally:
        door.close()
    peers = {one.rank: (f"rank {one.rank} at {one.place}", one.connection) for one in arrived}
    return _seated(0, peers, timeout_s)


def _await_all(
    door: Admission, arrived: list[Attached], timeout_s: float, progress: Progress
) -> None:
    until_s, last = time.monotonic() + timeout_s, ""
    while door.awaited:
        arrived += door.turn(_TURN_S)
        if door.turned_away and door.turned_away[-1] != last:
            last = door.turned_away[-1]
            progress(f"turned away {last}")
        if door.awaited and time.monotonic() > until_s:
            raise door.overdue(timeout_s)


def _send_away(connection: socket.socket, why: str) -> None:
    """Tell a rank that came in vain. What it has said is read first, else the kernel would drop the
    answer."""
    with contextlib.suppress(OSError):
        connection.settimeout(_LAST_WORDS_S)
        connection.sendall(frame(LOST, f"rank 0 gave up: {why}".encode()[:_MOST_WORDS]))
        end_sending(connection)
        while connection.recv(_RECEIVE_BYTES):
            continue
    connection.close()


def _seated(rank: int, peers: dict[int, tuple[str, socket.socket]], timeout_s: float) -> Meeting:
    for _, connection in peers.values():
        connection.settimeout(min(timeout_s, 60.0))
    address = next(iter(peers.values()))[1].getsockname()[0]
    return Meeting(rank, address, peers, timeout_s)
