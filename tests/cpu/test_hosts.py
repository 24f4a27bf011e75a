"""Runs over several hosts, pretended on loopback: how ranks meet, who is turned away, the whole
engine, torchrun on each host, and what a killed rank leaves.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.cli_program import quick_generate
from tests.cpu.hosts_program import TOKEN, host_variables
from tests.cpu.ranks import RankOutcome, rank_values, run_ranks
from tests.cpu.running import children_of, files_of
from tests.cpu.tiny_models import write_checkpoint
from tests.cpu.tiny_tokenizers import byte_level
from tests.cpu.tpinfer_command import REPOSITORY, json_lines, user_environment
from tests.ports import free_port
from tpinfer.collectives.meeting import Meeting, meet
from tpinfer.config.environment import read_environment
from tpinfer.config.errors import RankError
from tpinfer.launching.seat import seat_from_environment
from tpinfer.steps.frames import frame

pytestmark = pytest.mark.ranks
LOOPBACK = "0100007F"
PROGRAM = "tests.cpu.hosts_program:"
SHORT = ("--dtype", "float32", "--prompt", "Once upon", "--greedy", "--ignore-eos")


def in_threads(
    world: int, run_id: str, body: Callable[[Meeting], Any], timeout_s: float = 5.0
) -> list[Any]:
    """What `body` gives on each of `world` hosts with a rank each, or the error it ended with."""
    port, found = free_port(), {}

    def be(rank: int) -> None:
        environment = read_environment(host_variables(rank, world, 1, run_id, port))
        seat = seat_from_environment(environment, "cpu")
        try:
            with meet(seat, "test", timeout_s, lambda text: None, environment) as meeting:
                found[rank] = body(meeting)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[rank] for rank in range(world)]


@settings(max_examples=10, deadline=None)
@given(
    world=st.integers(2, 5),
    told=st.lists(
        st.tuples(st.integers(0, 4), st.text(max_size=9), st.binary(max_size=3000)), max_size=12
    ),
)
def test_what_one_tells_all_know(world: int, told: list[tuple[int, str, bytes]]) -> None:
    def body(meeting: Meeting) -> list[bytes]:
        for number, (rank, key, value) in enumerate(told):
            if rank % world == meeting.rank:
                meeting.tell(f"{number}{key}", value)
        return [meeting.ask(f"{number}{key}") for number, (_, key, _) in enumerate(told)]

    assert in_threads(world, "told", body) == [[value for _, _, value in told]] * world


@pytest.mark.parametrize("failing", [0, 2])
def test_one_that_gives_up_ends_the_meeting_for_all(failing: int, run_name: str) -> None:
    def body(meeting: Meeting) -> bytes:
        if meeting.rank == failing:
            raise ZeroDivisionError("no address here")
        return meeting.ask("never told")

    began_s = time.monotonic()
    found = in_threads(4, run_name, body, 20.0)
    assert time.monotonic() - began_s < 5.0
    assert isinstance(found.pop(failing), ZeroDivisionError)
    words = "rank 0 gave up: no address here" if failing == 0 else "rank 2 at 127.0.0.1 port"
    assert all(isinstance(error, RankError) and words in str(error) for error in found), found


def test_a_member_that_says_nonsense_is_named(run_name: str) -> None:
    for nonsense in (frame(77), frame(1, b"\xff\xff"), frame(1, b""), frame(1, b"\1\0\xff")):

        def body(meeting: Meeting, said: bytes = nonsense) -> bytes:
            if meeting.rank == 1:
                meeting._peers[0][1].sendall(said)
            return meeting.ask("never told")

        for error in in_threads(2, run_name, body, 20.0):
            assert isinstance(error, RankError) and "rank 1 at 127.0.0.1" in str(error)


def test_an_answer_that_never_comes_is_waited_for_no_longer(run_name: str) -> None:
    found = in_threads(2, run_name, lambda meeting: meeting.ask("never told", 0.1))
    assert isinstance(found[0], RankError) and "to tell 'never told'" in str(found[0])
    assert "rank 0 gave up" in str(found[1])


def test_collectives_over_hosts(run_name: str) -> None:
    """Sums, exchanges, and sockets: all listen on the meeting's own address."""
    wanted = {"per_host": 1, "port": free_port()}
    found = rank_values(f"{PROGRAM}collectives", 3, run_name, wanted, timeout_s=60)
    for sums, exchanges, listening in found:
        assert sums == [found[0][0][0], []]
        assert exchanges == []
        assert set(listening) == {LOOPBACK}


def joined(run_name: str, world: int, **wanted: Any) -> list[str]:
    arguments = {"per_host": 1, "port": free_port(), "changed": {}, "timeout_s": 2.0, **wanted}
    return rank_values(f"{PROGRAM}joins", world, run_name, arguments, timeout_s=60)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"TPINFER_TOKEN": "fedcba9876543210"}, "the tokens differ; export the same TPINFER_TOKEN"),
        ({"TORCHELASTIC_RUN_ID": "another"}, "it belongs to another run"),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, "it belongs to another run"),
        ({"WORLD_SIZE": "4"}, "it counts another number of ranks"),
    ],
)
def test_who_does_not_belong_is_refused(changed: dict[str, str], told: str, run_name: str) -> None:
    found = joined(run_name, 3, changed={"1": changed})
    assert found[1].startswith("RankError: rank 0 at 127.0.0.1 port")
    assert f"refused rank 1: {told}" in found[1]
    assert found[0].startswith("RankError: rank(s) 1 did not connect")
    assert f"rank 1: {told}" in found[0]
    assert found[2].startswith("RankError: rank 0 gave up: rank(s) 1 did not connect")


def test_a_missing_token_is_said_by_every_rank(run_name: str) -> None:
    missing = {str(rank): {"TPINFER_TOKEN": ""} for rank in range(2)}
    for told in joined(run_name, 2, changed=missing):
        assert told.startswith("ConfigError") and "export it as TPINFER_TOKEN" in told


@pytest.mark.parametrize("wanted", ["shared_memory", "deepspeed"])
def test_what_stays_on_one_host_is_refused(wanted: str, run_name: str) -> None:
    for told in joined(run_name, 2, wanted=wanted):
        assert told == (
            f"ConfigError: --collective {wanted} stays on one host, but only 1 of 2 ranks are "
            "here; use gloo"
        )


@contextmanager
def strangers(port: int) -> Iterator[list[int]]:
    """Who connect without end, say something else or nothing, and count their connections."""
    done, count = threading.Event(), [0]

    def knock() -> None:
        while not done.is_set():
            try:
                with socket.create_connection(("127.0.0.1", port), 1.0) as connection:
                    count[0] += 1
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n" * (count[0] % 3))
                    connection.settimeout(0.05)
                    connection.recv(100)
            except OSError:
                done.wait(0.002)

    thread = threading.Thread(target=knock)
    thread.start()
    try:
        yield count
    finally:
        done.set()
        thread.join()


def test_strangers_do_not_disturb(run_name: str) -> None:
    port = free_port()
    with strangers(port) as count:
        late = {"1": {"MASTER_ADDR": "127.0.0.1"}}
        assert joined(run_name, 3, port=port, changed=late, timeout_s=20.0) == ["gloo"] * 3
    assert count[0] > 0


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """What one rank writes."""
    wanted = {"per_host": 1, "port": 1}
    return rank_values(f"{PROGRAM}tokens", 1, "test-hosts-alone", wanted)[0]["tokens"]


@pytest.mark.parametrize(("world", "per_host"), [(2, 1), (4, 2)])
def test_the_engine_over_two_hosts(
    world: int, per_host: int, alone: list[list[int]], run_name: str
) -> None:
    wanted = {"per_host": per_host, "port": free_port()}
    found = rank_values(f"{PROGRAM}tokens", world, run_name, wanted, timeout_s=90)
    assert found[0]["tokens"] == alone
    (line,) = [line for line in found[0]["choices"] if "collective" in line]
    assert "gloo" in line and f"ranks on several hosts, {per_host} of {world} here" in line


def test_ranks_of_two_hosts_share_the_blocks_of_a_head(run_name: str, tmp_path: Path) -> None:
    model = write_checkpoint("llama-tied-gqa", tmp_path / "model")
    wanted = {"per_host": 1, "port": free_port(), "model": str(model)}
    (single,) = rank_values(f"{PROGRAM}tokens", 1, f"{run_name}-one", wanted)
    found = rank_values(f"{PROGRAM}tokens", 4, run_name, wanted, timeout_s=90)
    assert found[0]["tokens"] == single["tokens"]
    assert any("blocks shared out over 2 ranks a head" in line for line in found[0]["choices"])


@pytest.mark.parametrize("victim", [2, 3])
def test_a_killed_rank_of_the_other_host_is_named(victim: int, run_name: str) -> None:
    wanted = {"per_host": 2, "port": free_port(), "dies": [victim, 3]}
    outcomes: list[RankOutcome] = run_ranks(f"{PROGRAM}tokens", 4, run_name, wanted, timeout_s=90)
    died = outcomes[victim]
    assert died.exit_status == -signal.SIGKILL
    assert f"RankError: rank {victim} is gone: " in outcomes[0].error
    for outcome in outcomes:
        assert not outcome.timed_out and outcome.seconds - died.seconds < 5.0, outcome


class TwoHosts:
    """`torchrun ... -m tpinfer generate` once for each host. Use as a context manager: it kills
    what still runs."""

    def __init__(self, per_host: int, directory: Path, *flags: str, token: str = TOKEN) -> None:
        """`token` is host 1's."""
        port = free_port()
        self._errors = [directory / f"errors.{host}" for host in range(2)]
        self.hosts: list[subprocess.Popen[bytes]] = []
        for host, errors in enumerate(self._errors):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
            command += ["--node-rank", str(host), "--nproc-per-node", str(per_host)]
            command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
            variables = {"TPINFER_TOKEN": token if host else TOKEN, "OMP_NUM_THREADS": "1"}
            with errors.open("wb") as err:
                self.hosts.append(subprocess.Popen(
                    [*command, "-m", "tpinfer", "generate", *flags],
                    cwd=REPOSITORY, env=user_environment(variables),
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err,
                ))  # fmt: skip

    def __enter__(self) -> "TwoHosts":
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill()  # its ranks die with it
            host.wait()
            assert host.stdout is not None
            host.stdout.close()

    def told(self, host: int) -> str:
        """A host's standard error so far."""
        return self._errors[host].read_text(errors="replace")

    def wait(self, host: int, timeout_s: float) -> int:
        """A host's exit code; what its ranks print is read meanwhile."""
        try:
            self.hosts[host].communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"host {host} still runs:\n{self.told(host)}") from None
        return self.hosts[host].returncode


def test_torchrun_on_two_hosts(tmp_path: Path, run_name: str) -> None:
    """Two ranks each; rank 0 alone writes, the same as one rank does."""
    flags = [*SHORT, "--max-tokens", "8", "--json"]
    single = quick_generate(run_name, *flags, tmp_path / "one.jsonl")
    assert single.value == 0, single.output
    with TwoHosts(2, tmp_path, *flags, str(tmp_path / "two.jsonl")) as run:
        assert [run.wait(host, 100) for host in range(2)] == [0, 0], run.told(0) + run.told(1)
        assert files_of([host.pid for host in run.hosts]) == []
    (expected,), (found,) = json_lines(tmp_path / "one.jsonl"), json_lines(tmp_path / "two.jsonl")
    assert found["token_ids"] == expected["token_ids"]


def test_a_host_with_another_token_is_told_so(tmp_path: Path) -> None:
    flags = [*SHORT, "--max-tokens", "8", "--wait-timeout", "5"]
    with TwoHosts(1, tmp_path, *flags, token="fedcba9876543210") as run:
        assert run.wait(1, 60) != 0
        assert "rank 1 failed: rank 0 at 127.0.0.1 port" in run.told(1)
        assert "the tokens differ; export the same TPINFER_TOKEN on every host" in run.told(1)
        assert run.wait(0, 60) != 0
        assert "Turned away: 127.0.0.1 port" in run.told(0)


def test_a_rank_killed_under_torchrun_is_named_on_rank_0s_host(tmp_path: Path) -> None:
    model = byte_level(write_checkpoint("llama-tied-gqa", tmp_path / "model"))
    config = tmp_path / "model" / "config.json"
    endless = json.loads(config.read_text()) | {"max_position_embeddings": 200_000}
    config.write_text(json.dumps(endless))
    flags = [*SHORT, "--model", str(model), "--max-tokens", "190000", "--max-num-seqs", "1"]
    with TwoHosts(1, tmp_path, *flags) as run:
        shown = run.hosts[0].stdout
        assert shown is not None and shown.read(12), run.told(0)
        (rank_1,) = children_of(run.hosts[1].pid)
        os.kill(rank_1, signal.SIGKILL)
        killed_s = time.monotonic()
        while "rank 0 failed: " not in run.told(0):
            assert time.monotonic() - killed_s < 10.0, run.told(0)
            os.read(shown.fileno(), 1 << 16)
        assert "rank 0 failed: rank 1 is gone: " in run.told(0)
        assert [run.wait(host, 30) for host in range(2)] == [1, 1]
