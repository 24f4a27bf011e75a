"""Rank 0's door for ranks of other hosts: accepts connections and lets in who proves to be an
awaited rank.

Nothing here blocks: strangers, slow speakers and half-open connections cost a socket each until
their time is up, and of too many the oldest goes. Who was turned away, and why, is kept for the
message of a wait that ends in vain.
"""

import selectors
import socket
import time
from collections import deque
from dataclasses import dataclass, field

from tpinfer.config.errors import RankError
from tpinfer.steps.handshake import ACCEPTED, CLAIM_BYTES, LOCAL_RANK, TAKEN, Challenge, WireRun
from tpinfer.steps.sockets import listen, shown, tune

HANDSHAKE_S = 5.0
"""Longest time between a connection and its complete claim."""
_MOST_STRANGERS = 64
_MOST_ACCEPTED_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Attached:
    """A rank that has been let in."""

    rank: int
    pid: int
    connection: socket.socket
    place: str
    """Its host and port."""


@dataclass(slots=True)
class _Stranger:
    connection: socket.socket
    place: str
    challenge: Challenge
    until_s: float


@dataclass(slots=True)
class Admission:
    """The listening socket and everybody in front of it."""

    listener: socket.socket
    run: WireRun
    awaited: set[int]
    """Ranks that have not come yet."""
    arrived: set[int] = field(default_factory=set)
    turned_away: deque[str] = field(default_factory=lambda: deque(maxlen=8))
    """The last few, as `place: why`."""
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _strangers: dict[socket.socket, _Stranger] = field(default_factory=dict)

    @classmethod
    def open(cls, address: str, port: int, run: WireRun, ranks: set[int]) -> "Admission":
        """Listen. Raises ConfigError where that cannot be."""
        door = cls(listen(address, port), run, set(ranks))
        door._selector.register(door.listener, selectors.EVENT_READ)
        return door

    def turn(self, timeout_s: float) -> list[Attached]:
        """Do what can be done now, waiting up to `timeout_s` for something to do; returns the ranks
        that were let in. Their sockets do not block."""
        attached = []
        for key, _ in self._selector.select(timeout_s):
            stranger = self._strangers.get(key.fileobj)  # type: ignore[call-overload]
            if key.fileobj is self.listener:
                self._accept()
            elif stranger is not None:
                found = self._hear(stranger)
                if found is not None:
                    attached.append(found)
        now_s = time.monotonic()
        for stranger in [one for one in self._strangers.values() if one.until_s < now_s]:
            self._turn_away(stranger, f"said too little within {HANDSHAKE_S:g} s")
        return attached

    def overdue(self, timeout_s: float) -> RankError:
        """That ranks did not come: which ones, and who was turned away."""
        missing = ", ".join(map(str, sorted(self.awaited)))
        away = "; ".join(self.turned_away)
        port = self.listener.getsockname()[1]
        return RankError(
            f"rank(s) {missing} did not connect to port {port} within {timeout_s:g} s; "
            "look at their own errors and at firewalls between the hosts"
            + (f". Turned away: {away}" if away else "")
        )

    def close(self) -> None:
        """Close the door, and the connections of all who did not get in."""
        for stranger in list(self._strangers.values()):
            self._forget(stranger)
            stranger.connection.close()
        self._selector.close()
        self.listener.close()

    def _accept(self) -> None:
        for _ in range(_MOST_ACCEPTED_AT_ONCE):
            try:
                connection, address = self.listener.accept()
            except OSError:  # none left, gone again already, or no descriptor to be had
                return
            place = shown(address)
            if len(self._strangers) >= _MOST_STRANGERS:
                oldest = next(iter(self._strangers.values()))
                self._turn_away(oldest, "too many connections at once")
            challenge = Challenge(self.run, f"the process at {place}")
            until_s = time.monotonic() + HANDSHAKE_S
            stranger = _Stranger(connection, place, challenge, until_s)
            self._strangers[connection] = stranger
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)
            self._say(stranger, challenge.opening)

    def _hear(self, stranger: _Stranger) -> Attached | None:
        try:
            received = stranger.connection.recv(CLAIM_BYTES + 1)
            if not received:
                self._turn_away(stranger, "hung up before it had said who it is")
                return None
            verdict = stranger.challenge.feed(received, self._place)
        except BlockingIOError:
            return None
        except (OSError, RankError) as error:
            self._turn_away(stranger, str(error))
            return None
        if verdict is None or not self._say(stranger, verdict.answer):
            return None
        if verdict.code != ACCEPTED:
            self._turn_away(stranger, f"rank {verdict.rank}: {verdict.reason}")
            return None
        self._forget(stranger)
        self.awaited.discard(verdict.rank)
        self.arrived.add(verdict.rank)
        tune(stranger.connection)
        return Attached(verdict.rank, verdict.pid, stranger.connection, stranger.place)

    def _place(self, rank: int) -> int:
        if rank in self.awaited:
            return ACCEPTED
        return TAKEN if rank in self.arrived else LOCAL_RANK

    def _say(self, stranger: _Stranger, text: bytes) -> bool:
        """Send so few bytes that an empty socket takes them whole."""
        try:
            sent = stranger.connection.send(text)
        except OSError as error:
            self._turn_away(stranger, str(error))
            return False
        if sent < len(text):
            self._turn_away(stranger, "takes no answer")
        return sent == len(text)

    def _turn_away(self, stranger: _Stranger, why: str) -> None:
        self.turned_away.append(f"{stranger.place}: {why}")
        self._forget(stranger)
        stranger.connection.close()

    def _forget(self, stranger: _Stranger) -> None:
        del self._strangers[stranger.connection]
        self._selector.unregister(stranger.connection)
