"""Shared memory and TCP do the same: any order of calls, compared with what it should come to."""

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpinfer.steps.frames import frame
from tpinfer.steps.handshake import WireRun
from tpinfer.steps.interface import PlanReader, PlanWriter
from tpinfer.steps.shm_reader import ShmPlanReader
from tpinfer.steps.shm_writer import ShmPlanWriter
from tpinfer.steps.tcp_reader import TcpPlanReader
from tpinfer.steps.tcp_writer import TcpPlanWriter
from tpinfer.steps.wire import PlanFanout

HERE = "127.0.0.1"
RUN = WireRun("run-g0-plans", 3, b"a token of enough bytes")
Wire = tuple[PlanWriter, list[PlanReader]]
_counter = itertools.count()

CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.binary(max_size=2000)),
        st.tuples(st.just("receive"), st.integers(0, 1)),
        st.tuples(st.just("report"), st.integers(0, 1), st.integers(0, 3)),
        st.tuples(st.just("fail_step"), st.integers(0, 1), st.integers(1, 9)),
        st.tuples(st.just("look")),
    ),
    max_size=25,
)


def open_tcp(ranks: list[int]) -> tuple[TcpPlanWriter, list[PlanReader]]:
    writer = TcpPlanWriter(HERE, 0, RUN, ranks, 5.0)
    waiting = threading.Thread(target=writer.wait_attached, args=(5.0,))
    waiting.start()
    readers: list[PlanReader] = [TcpPlanReader(HERE, writer.port, RUN, rank, 5) for rank in ranks]
    waiting.join()
    return writer, readers


def open_wire(kind: str, name: str) -> Wire:
    """A writer and the readers of ranks 1 and 2."""
    if kind == "tcp":
        return open_tcp([1, 2])
    name = f"{name}-{next(_counter)}"
    count = 2 if kind == "shm" else 1
    local = ShmPlanWriter(name, count, timeout_s=5.0)
    readers: list[PlanReader] = [ShmPlanReader(name, index, 5.0) for index in range(count)]
    if kind == "shm":
        return local, readers
    remote, others = open_tcp([2])
    return PlanFanout(local, remote), readers + others


@contextlib.contextmanager
def closing_all(wire: Wire) -> Iterator[Wire]:
    try:
        yield wire
    finally:
        for reader in wire[1]:
            reader.close()
        wire[0].close()


def eventually(look: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + 2.0
    while not look():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.0005)
    return True


class Expected:
    """What a wire of two readers comes to."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.received = [0, 0]
        self.progress = [(0, 0), (0, 0)]
        self.untold: list[list[tuple[int, int]]] = [[], []]

    def report(self, index: int, generation: int, step: int) -> None:
        if generation > self.progress[index][0]:
            self.untold[index] = []
        self.progress[index] = (generation, step)


def play(wire: Wire, calls: list[tuple]) -> None:  # type: ignore[type-arg]
    writer, readers = wire
    model, steps = Expected(), itertools.count(1)

    def look() -> None:
        assert eventually(lambda: writer.reader_progress() == model.progress)
        wanted = [(i, *one) for i in range(2) for one in model.untold[i]]
        found: list[tuple[int, int, int]] = []

        def all_told() -> bool:
            found.extend((one.index, one.step_id, one.code) for one in writer.failed_steps())
            return len(found) >= len(wanted)

        assert eventually(all_told)
        assert sorted(found) == sorted(wanted)
        model.untold = [[], []]
        assert writer.failed_readers() == []

    for what, *given_values in calls:
        if what == "send":
            writer.send(given_values[0])
            model.sent.append(given_values[0])
        elif what == "receive":
            index = given_values[0]
            if model.received[index] < len(model.sent):
                assert readers[index].receive(2.0) == model.sent[model.received[index]]
                model.received[index] += 1
        elif what == "report":
            index, later = given_values
            generation = model.progress[index][0] + (later == 3)
            step = next(steps)
            readers[index].report(generation, step)
            model.report(index, generation, step)
        elif what == "fail_step":
            index, code = given_values
            if len(model.untold[index]) == 3:  # as many as a slot is sure to keep
                look()
            step = next(steps)
            readers[index].fail_step(step, code, f"step {step}")
            model.untold[index].append((step, code))
        else:
            look()
    look()


@pytest.mark.parametrize("kind", ["shm", "tcp", "both"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=CALLS)
def test_any_order_of_calls_comes_to_the_same(kind: str, run_name: str, calls: list[tuple]) -> None:  # type: ignore[type-arg]
    with closing_all(open_wire(kind, run_name)) as wire:
        play(wire, calls)


@settings(max_examples=25)
@given(
    st.lists(
        st.binary(max_size=300) | st.just(RUN.greeting()) | st.just(frame(1, b"x")), max_size=6
    )
)
def test_noise_at_the_door_never_disturbs_the_ranks(pieces: list[bytes]) -> None:
    writer = TcpPlanWriter(HERE, 0, RUN, [1, 2], 5.0)
    first: list[PlanReader] = []
    opening = threading.Thread(
        target=lambda: first.append(TcpPlanReader(HERE, writer.port, RUN, 1, 5.0))
    )
    opening.start()
    with socket.create_connection((HERE, writer.port)) as stranger:
        for piece in pieces:
            with contextlib.suppress(OSError):
                stranger.sendall(piece)
            writer._admit(0.0)
        assert eventually(lambda: writer._admit(0.01) or bool(writer._peers))
        opening.join()
        waiting = threading.Thread(target=writer.wait_attached, args=(5.0,))
        waiting.start()
        readers = [*first, TcpPlanReader(HERE, writer.port, RUN, 2, 5.0)]
        waiting.join()
        writer.send(b"plan")
        assert [reader.receive(1.0) for reader in readers] == [b"plan"] * 2
        assert writer.failed_readers() == []
        for end in (*readers, writer):
            end.close()


def test_silent_hosts_are_noticed_by_the_kernel_and_small_frames_are_not_delayed() -> None:
    writer, readers = open_tcp([1])
    [reader] = readers
    assert isinstance(reader, TcpPlanReader)
    [peer] = writer._peers.values()
    tcp = socket.IPPROTO_TCP
    for connection in (reader._connected(), peer.connection):
        assert connection.getsockopt(tcp, socket.TCP_NODELAY)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle_s = connection.getsockopt(tcp, socket.TCP_KEEPIDLE)
        interval_s = connection.getsockopt(tcp, socket.TCP_KEEPINTVL)
        probes = connection.getsockopt(tcp, socket.TCP_KEEPCNT)
        assert idle_s + interval_s * probes <= 15
        assert 0 < connection.getsockopt(tcp, socket.TCP_USER_TIMEOUT) <= 15_000
    reader.close()
    writer.close()


@pytest.mark.parametrize(("kind", "known"), [("shm", [1, 2]), ("tcp", []), ("both", [1])])
def test_processes_of_ranks_on_this_host_are_known(kind: str, known: list[int]) -> None:
    """Readers here are this very process; those on other hosts are nobody's to end."""
    writer, readers = open_wire(kind, f"pids-{kind}")
    try:
        assert list(writer.local_pids([1, 2])) == [os.getpid()] * len(known)
        assert list(writer.local_pids([2])) == [os.getpid()] * (2 in known)
        assert list(writer.local_pids([])) == []
    finally:
        for one in (*readers, writer):
            one.close()
