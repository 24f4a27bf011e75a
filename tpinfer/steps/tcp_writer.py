"""The sending end of the step-plan wire to ranks of other hosts, over TCP.

`send` returns when the kernel has every byte: from then on it delivers without this process, which
may go on into a collective that the readers must join. A reader that falls behind by more than the
kernel's buffers holds the writer back, as it does in shared memory.
"""

import select
import time
from collections.abc import Iterable

from tpinfer.config.errors import RankError
from tpinfer.steps.admission import Admission
from tpinfer.steps.frames import CLOSE, LARGEST_PLAN_BYTES, PLAN, frame
from tpinfer.steps.handshake import WireRun
from tpinfer.steps.interface import PlanWriter, ReaderFailure, StepFailure, closed_here
from tpinfer.steps.peer import Peer
from tpinfer.steps.sockets import end_sending

_WAIT_MS = 50
_CLOSE_S = 1.0


class TcpPlanWriter(PlanWriter):
    """Listens until every rank has attached, and not a moment longer."""

    def __init__(
        self,
        address: str,
        port: int,
        run: WireRun,
        ranks: Iterable[int],
        timeout_s: float | None = 300.0,
    ) -> None:
        """`ranks` are those of other hosts; `timeout_s` bounds every wait for slow readers.

        Raises ConfigError where `address` cannot be listened on.
        """
        self._ranks = sorted(ranks)
        self._timeout_s = timeout_s
        self._is_closed = False
        self._peers: dict[int, Peer] = {}
        """By rank, lost ones too."""
        self._at: dict[int, Peer] = {}
        """By descriptor, those that are listened to."""
        self._poller = select.poll()
        self._admission: Admission | None = Admission.open(address, port, run, set(self._ranks))
        self.port: int = self._admission.listener.getsockname()[1]
        """The port that is listened on."""

    def wait_attached(self, timeout_s: float | None) -> None:
        """Return once every rank is there, and stop listening. Raises RankError on time-out; it
        says which are missing and who was turned away."""
        self._require_open()
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while self._admission is not None:
            self._admit(_WAIT_MS / 1e3)
            if self._admission is None or timeout_s is None or until_s is None:
                continue
            if time.monotonic() > until_s:
                raise self._admission.overdue(timeout_s)

    def _admit(self, timeout_s: float) -> None:
        """Let in who stands at the door. A rank that is lost again has failed like any other."""
        admission = self._admission
        if admission is None:
            return
        for attached in admission.turn(timeout_s):
            peer = Peer(attached)
            self._peers[peer.rank] = self._at[peer.descriptor] = peer
            self._poller.register(peer.descriptor, select.POLLIN)
        if not admission.awaited:
            admission.close()
            self._admission = None

    def send(self, payload: bytes) -> None:
        """Hand one frame to every rank that is still there; waits for ranks that are not yet.

        Raises RankError when a rank fails while another is waited for, or the time-out passes;
        ValueError for a payload above 64 MiB.
        """
        self._require_open()
        if len(payload) > LARGEST_PLAN_BYTES:
            raise ValueError(f"a payload of {len(payload)} bytes is above {LARGEST_PLAN_BYTES}")
        if self._admission is not None:
            self.wait_attached(self._timeout_s)
        behind = self._push_to_all(memoryview(frame(PLAN, payload)))
        if behind:
            self._push_rest(behind)

    def _push_to_all(self, text: memoryview) -> dict[int, memoryview]:
        """What the kernel did not take at once, by descriptor."""
        behind = {}
        for peer in self._peers.values():
            if peer.is_open and (sent := peer.push(text)) < len(text):
                behind[peer.descriptor] = text[sent:]
        return behind

    def _push_rest(self, behind: dict[int, memoryview]) -> None:
        until_s = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        try:
            while self._push_more(behind):
                failures = self._failures()
                if failures:
                    first = failures[0]
                    raise RankError(
                        f"rank {first.rank} (process {first.pid}) failed: {first.message}"
                    )
                if until_s is not None and time.monotonic() > until_s:
                    raise RankError(
                        f"waiting for a rank to read its step plans took longer than "
                        f"{self._timeout_s:g} s; look for a stuck rank or raise the wait time-out"
                    )
        finally:
            for descriptor in behind:  # half a frame is there: nothing sensible can follow
                self._at[descriptor].lose("it did not read its step plans")

    def _push_more(self, behind: dict[int, memoryview]) -> bool:
        """Wait a moment for room and use it; says whether anything is left."""
        poller = select.poll()
        for descriptor in behind:
            poller.register(descriptor, select.POLLIN | select.POLLOUT)
        for descriptor, events in poller.poll(_WAIT_MS):
            peer = self._at[descriptor]
            if events & ~select.POLLOUT:
                peer.hear()
            if events & select.POLLOUT and peer.is_open:
                behind[descriptor] = behind[descriptor][peer.push(behind[descriptor]) :]
            if not peer.is_open or not behind[descriptor]:
                del behind[descriptor]
        return bool(behind)

    def _listen(self, wait_ms: int = 0) -> None:
        """Take in what ranks have said."""
        for descriptor, _ in self._poller.poll(wait_ms):
            peer = self._at[descriptor]
            peer.hear()
            if not peer.is_open:
                self._poller.unregister(descriptor)

    def _failures(self) -> list[ReaderFailure]:
        return [one.failure for one in self._by_rank() if one.failure is not None]

    def _by_rank(self) -> list[Peer]:
        return [self._peers[rank] for rank in sorted(self._peers)]

    def failed_readers(self, check_processes: bool | None = None) -> list[ReaderFailure]:
        """Ranks that called `fail`, and ranks whose connection has ended, by rank. A host that
        vanished without a word is one after 11 s."""
        self._require_open()
        self._admit(0.0)
        self._listen()
        return self._failures()

    def failed_steps(self) -> list[StepFailure]:
        """Steps that ranks could not do, by rank; each is told once."""
        self._require_open()
        self._listen()
        found = []
        for peer in self._by_rank():
            found += peer.failed_steps
            peer.failed_steps.clear()
        return found

    def reader_progress(self) -> list[tuple[int, int]]:
        """Last `(generation, step)` that each rank reported, in rank order."""
        self._require_open()
        self._listen()
        said = {peer.rank: peer.progress for peer in self._peers.values()}
        return [said.get(rank, (0, 0)) for rank in self._ranks]

    def close(self) -> None:
        """Tell ranks that nothing follows, wait up to a second until they have left, and let go of
        the sockets. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._admission is not None:
            self._admission.close()
            self._admission = None
        text, until_s = memoryview(frame(CLOSE)), time.monotonic() + _CLOSE_S
        behind = self._push_to_all(text)
        while behind and time.monotonic() < until_s:
            self._push_more(behind)
        for peer in self._peers.values():
            if peer.is_open:
                end_sending(peer.connection)
        while any(one.is_open for one in self._peers.values()) and time.monotonic() < until_s:
            # Closing with something unread would make the kernel drop what it has not delivered.
            self._listen(_WAIT_MS)
        for peer in self._peers.values():
            peer.lose("rank 0 closed the wire")

    def _require_open(self) -> None:
        if self._is_closed:
            raise closed_here()
