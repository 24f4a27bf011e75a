"""The step-plan wire over TCP: what shared memory does, and that nobody without the token gets in,
holds anybody up or breaks anything.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tpinfer.config.errors import ConfigError, RankError
from tpinfer.steps import admission
from tpinfer.steps.frames import frame
from tpinfer.steps.handshake import CLAIM_BYTES, Claim, WireRun
from tpinfer.steps.interface import PROCESS_GONE
from tpinfer.steps.tcp_reader import TcpPlanReader
from tpinfer.steps.tcp_writer import TcpPlanWriter

HERE = "127.0.0.1"
RUN = WireRun("run-g0-plans", 4, b"a token of enough bytes")


@contextlib.contextmanager
def writer_of(*ranks: int, timeout_s: float = 5.0) -> Iterator[TcpPlanWriter]:
    writer = TcpPlanWriter(HERE, 0, RUN, ranks, timeout_s)
    with contextlib.closing(writer):
        yield writer


def attach(writer: TcpPlanWriter, *ranks: int, run: WireRun = RUN) -> list[TcpPlanReader]:
    """Readers of these ranks, while the writer waits for them."""
    readers: dict[int, TcpPlanReader] = {}

    def open_one(rank: int) -> None:
        readers[rank] = TcpPlanReader(HERE, writer.port, run, rank, 5.0)

    threads = [threading.Thread(target=open_one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    writer.wait_attached(5.0)
    for thread in threads:
        thread.join()
    return [readers[rank] for rank in ranks]


@pytest.fixture
def pair() -> Iterator[tuple[TcpPlanWriter, TcpPlanReader]]:
    with writer_of(2, timeout_s=0.5) as writer:
        [reader] = attach(writer, 2)
        yield writer, reader
        reader.close()


def soon(look: Callable[[], object], within_s: float = 2.0) -> bool:
    """Whether `look` gives something true before long."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        if look():
            return True
        time.sleep(0.002)
    return False


def test_every_rank_gets_every_frame_in_order() -> None:
    with writer_of(1, 2, 3) as writer:
        readers = attach(writer, 1, 2, 3)
        chooser = random.Random(1)
        frames = [chooser.randbytes(chooser.randrange(0, 3000)) for _ in range(200)]
        for one in frames:
            writer.send(one)
        for reader in readers:
            assert [reader.receive(1.0) for _ in frames] == frames
            reader.close()


def test_a_payload_larger_than_the_kernels_buffers_goes_through(
    pair: tuple[TcpPlanWriter, TcpPlanReader],
) -> None:
    writer, reader = pair
    payload = random.Random(2).randbytes(20 << 20)
    sender = threading.Thread(target=writer.send, args=(payload,))
    sender.start()
    assert reader.receive(5.0) == payload
    sender.join()
    with pytest.raises(ValueError, match="above 67108864"):
        writer.send(bytes((64 << 20) + 1))


def test_a_stuck_reader_holds_the_writer_back_but_not_for_ever(
    pair: tuple[TcpPlanWriter, TcpPlanReader],
) -> None:
    writer, _ = pair
    began_s = time.monotonic()
    with pytest.raises(RankError, match=r"read its step plans took longer than 0\.5 s"):
        for _ in range(64):
            writer.send(bytes(1 << 20))
    assert time.monotonic() - began_s < 3.0
    [failure] = writer.failed_readers()
    assert "did not read its step plans" in failure.message


def test_waiting_is_bounded_polls_and_says_what_for(
    pair: tuple[TcpPlanWriter, TcpPlanReader],
) -> None:
    polls = []
    with pytest.raises(RankError, match=r"next step plan took longer than 0\.05 s"):
        pair[1].receive(0.05, lambda: polls.append(1))
    assert len(polls) > 5


def test_close_lets_readers_finish_and_then_tells_them() -> None:
    with writer_of(2) as writer:
        [reader] = attach(writer, 2)
        writer.send(b"last")
        closer = threading.Thread(target=writer.close)
        closer.start()
        assert reader.receive(1.0) == b"last"
        with pytest.raises(RankError, match="closed the step-plan wire"):
            reader.receive(1.0)
        reader.close()
        reader.close()
        closer.join()
        writer.close()
        for call in (lambda: writer.send(b""), writer.failed_steps, lambda: reader.receive(0.1)):
            with pytest.raises(RankError, match="closed on this rank"):
                call()


def test_a_rank_that_closes_has_not_failed(pair: tuple[TcpPlanWriter, TcpPlanReader]) -> None:
    writer, reader = pair
    writer.send(b"never read")
    reader.close()
    time.sleep(0.05)
    assert writer.failed_readers() == []
    writer.send(b"nobody is there, and nothing is wrong")


def test_a_rank_reports_its_step_and_its_failure(
    pair: tuple[TcpPlanWriter, TcpPlanReader],
) -> None:
    writer, reader = pair
    assert writer.reader_progress() == [(0, 0)]
    reader.report(generation=1, step=41)
    assert soon(lambda: writer.reader_progress() == [(1, 41)])
    assert writer.failed_readers() == []
    reader.fail("CUDA out of memory: größer als gedacht " + "ß" * 300, code=7)
    assert soon(writer.failed_readers)
    [failure] = writer.failed_readers()
    assert (failure.rank, failure.pid, failure.code) == (2, os.getpid(), 7)
    assert failure.message.startswith("CUDA out of memory: größer als gedacht ß")
    assert len(failure.message.encode()) <= 192
    reader.close()
    assert writer.failed_readers() == [failure], "its own words stay"
    with pytest.raises(ValueError, match="must be positive"):
        reader.fail("", 0)


def test_a_failed_step_is_told_once_and_nothing_else_ends(
    pair: tuple[TcpPlanWriter, TcpPlanReader],
) -> None:
    writer, reader = pair
    assert writer.failed_steps() == []
    reader.fail_step(5, 3, "NaN in row 7")
    reader.fail_step(6, 3, "NaN in row 8")
    found = []
    assert soon(lambda: found.extend(writer.failed_steps()) or len(found) == 2)
    assert [(one.rank, one.step_id, one.code, one.message) for one in found] == [
        (2, 5, 3, "NaN in row 7"),
        (2, 6, 3, "NaN in row 8"),
    ]
    assert writer.failed_steps() == [] and writer.failed_readers() == []
    reader.fail_step(7, 3, "of a group that is gone")
    reader.report(generation=1, step=0)
    assert soon(lambda: writer.reader_progress() == [(1, 0)])
    assert writer.failed_steps() == []


def test_reports_that_nobody_hears_cost_nothing_and_the_last_one_arrives(
    pair: tuple[TcpPlanWriter, TcpPlanReader],
) -> None:
    writer, reader = pair
    began_s = time.monotonic()
    reader._connected().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    for step in range(100_000):
        reader.report(0, step)
    assert time.monotonic() - began_s < 10.0
    assert len(reader._unsent) + len(reader._report) < 100
    receiving = threading.Thread(target=reader.receive, args=(5.0,))
    receiving.start()
    assert soon(lambda: writer.reader_progress() == [(0, 99_999)], 5.0)
    writer.send(b"done")
    receiving.join()


# Who gets in, and what happens to everybody else.


def refused(writer: TcpPlanWriter, rank: int, run: WireRun) -> str:
    """What a rank is told that cannot get in, while rank 0 waits on."""
    told: list[str] = []

    def try_it() -> None:
        try:
            TcpPlanReader(HERE, writer.port, run, rank, 3.0).close()
        except RankError as error:
            told.append(str(error))

    thread = threading.Thread(target=try_it)
    thread.start()
    until_s = time.monotonic() + 5.0
    while thread.is_alive() and time.monotonic() < until_s:
        writer._admit(0.01)
    thread.join()
    return told[0]


@pytest.mark.parametrize(
    ("rank", "run", "told"),
    [
        (3, replace(RUN, token=b"another token of enough bytes"), "tokens differ"),
        (3, replace(RUN, name="other-g0-plans"), "another run"),
        (3, replace(RUN, world=8), "another number of ranks"),
        (1, RUN, "number ranks host by host"),
        (2, RUN, "has taken its place"),
        (3, replace(RUN, format_version=99), "format 2 and this rank reads format 99"),
    ],
)
def test_a_stranger_is_told_why_and_disturbs_nobody(rank: int, run: WireRun, told: str) -> None:
    with writer_of(2, 3) as writer:
        first: list[TcpPlanReader] = []
        opening = threading.Thread(
            target=lambda: first.append(TcpPlanReader(HERE, writer.port, RUN, 2, 5.0))
        )
        opening.start()
        assert soon(lambda: writer._admit(0.01) or writer._peers)
        opening.join()
        assert told in refused(writer, rank, run)
        [third] = attach(writer, 3)
        writer.send(b"x")
        assert first[0].receive(1.0) == third.receive(1.0) == b"x"
        assert writer.failed_readers() == []
        first[0].close()
        third.close()


def test_the_token_never_crosses_and_an_impostor_is_not_believed() -> None:
    """A rank 0 without the token cannot answer, whatever code it sends."""
    heard = bytearray()
    with socket.create_server((HERE, 0)) as server:

        def impostor() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(RUN.greeting() + bytes(32))
                while len(heard) < CLAIM_BYTES:
                    heard.extend(connection.recv(4096))
                connection.sendall(bytes(33))  # accepted, with a proof of zeros

        thread = threading.Thread(target=impostor)
        thread.start()
        with pytest.raises(RankError, match="tokens differ"):
            TcpPlanReader(HERE, server.getsockname()[1], RUN, 3, 2.0)
        thread.join()
    assert RUN.token not in heard and len(heard) == CLAIM_BYTES


def test_a_replayed_claim_is_refused() -> None:
    with writer_of(3) as writer:
        claim = Claim(RUN, 3, "rank 0")
        said = RUN.greeting() + claim.reply(RUN.greeting() + bytes(32))
        with socket.create_connection((HERE, writer.port)) as old:
            old.sendall(said)
            assert soon(lambda: writer._admit(0.01) or writer._admission.turned_away)  # type: ignore[union-attr]
        assert "tokens differ" in writer._admission.turned_away[0]  # type: ignore[union-attr]


HOSTILE = {
    "random bytes": random.Random(3).randbytes(5000),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 8,
    "a huge frame": RUN.greeting() + frame(1, b"x" * 1000),
    "nothing": b"",
    "half a greeting": RUN.greeting()[:5],
    "half a claim": RUN.greeting() + bytes(40),
}


def test_hostile_connections_do_not_keep_ranks_out_or_the_writer_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "HANDSHAKE_S", 0.3)
    with writer_of(2, 3) as writer, contextlib.ExitStack() as opened:
        for text in [*HOSTILE.values()] * 20:
            connection = opened.enter_context(socket.create_connection((HERE, writer.port)))
            connection.sendall(text)
        slow = opened.enter_context(socket.create_connection((HERE, writer.port)))
        began_s = time.monotonic()
        readers = attach(writer, 2, 3)
        assert time.monotonic() - began_s < 2.0
        for _ in range(50):
            writer.send(b"plan")
        assert [reader.receive(1.0) for reader in readers] == [b"plan"] * 2
        with pytest.raises(OSError):  # the door is shut, and whoever stood there was sent away
            for _ in range(100):
                slow.sendall(b"x")
                time.sleep(0.01)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HERE, writer.port))
        for reader in readers:
            reader.close()


def test_a_wait_in_vain_says_who_is_missing_and_who_was_turned_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "HANDSHAKE_S", 0.1)
    with writer_of(2, 3) as writer, contextlib.ExitStack() as opened:
        for text in (b"", RUN.greeting(), b"GET / HTTP/1.1\r\n\r\n"):
            opened.enter_context(socket.create_connection((HERE, writer.port))).sendall(text)
        with pytest.raises(RankError) as caught:
            writer.wait_attached(0.4)
    assert "rank(s) 2, 3 did not connect" in str(caught.value)
    assert "said too little within 0.1 s" in str(caught.value)
    assert "no tpinfer rank" in str(caught.value)


def test_addresses_that_cannot_be_listened_on() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR must be an address of its host"):
        TcpPlanWriter("192.0.2.1", 0, RUN, [1])
    with pytest.raises(ConfigError, match="unknown on rank 0's host"):
        TcpPlanWriter("no.such.host.invalid", 0, RUN, [1])
    with writer_of(3) as writer, pytest.raises(ConfigError, match="a free port"):
        TcpPlanWriter(HERE, writer.port, RUN, [1])


def test_a_name_that_is_the_loopback_at_home_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some systems give their own name 127.0.1.1: rank 0 would listen where nobody comes."""

    def resolve(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]

    monkeypatch.setattr("tpinfer.steps.sockets.socket.getaddrinfo", resolve)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=node7 is the loopback 127\.0\.1\.1 on"):
        TcpPlanWriter("node7", 0, RUN, [1])
    for name in ("localhost", "127.0.1.1", "::1"):
        TcpPlanWriter(name, 0, RUN, [1]).close()


def test_the_writer_listens_on_the_address_asked_for_alone() -> None:
    with writer_of(3) as writer:
        assert writer._admission is not None
        assert writer._admission.listener.getsockname()[0] == HERE


def test_a_rank_0_that_never_comes_is_given_up() -> None:
    with socket.create_server((HERE, 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(RankError, match=r"could not be reached within 0\.3 s"):
            TcpPlanReader(HERE, port, RUN, 3, 0.3)
    with pytest.raises(RankError, match=r"could not be reached within 0\.2 s"):
        TcpPlanReader(HERE, port, RUN, 3, 0.2)


# Processes that die.

READER = """
import sys, time
from tests.pure.test_wire_tcp import HERE, RUN
from tpinfer.steps.tcp_reader import TcpPlanReader
reader = TcpPlanReader(HERE, int(sys.argv[1]), RUN, 3, 20.0)
print("attached", flush=True)
time.sleep(60)
"""


@pytest.mark.ranks
def test_a_killed_rank_is_noticed_at_once(python_path: str) -> None:
    with writer_of(3, timeout_s=20.0) as writer:
        command = [sys.executable, "-c", READER, str(writer.port)]
        child = subprocess.Popen(command, env={"PYTHONPATH": python_path})
        writer.wait_attached(20.0)
        child.send_signal(signal.SIGKILL)
        child.wait()
        began_s = time.monotonic()
        assert soon(writer.failed_readers)
        assert time.monotonic() - began_s < 1.0
        [failure] = writer.failed_readers()
        assert (failure.rank, failure.pid, failure.code) == (3, child.pid, PROCESS_GONE)
        writer.send(b"goes nowhere and raises nothing")
