"""One wire for ranks of several hosts: two pretended hosts of two ranks each, real processes with
the environment that a launcher gives them.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from tpinfer.config.environment import read_environment
from tpinfer.config.errors import ConfigError
from tpinfer.config.meeting import find_meeting_point
from tpinfer.launching.seat import seat_from_environment
from tpinfer.steps.shm_reader import ShmPlanReader
from tpinfer.steps.wire import PlanFanout, open_plan_reader, open_plan_writer

TOKEN = "0123456789abcdef"
NUM_PLANS = 200

RANK = """
import json, sys, time
from tpinfer.config.environment import read_environment
from tpinfer.config.errors import RankError
from tpinfer.launching.seat import seat_from_environment
from tpinfer.steps.plan import Command, StepPlan, decode, encode
from tpinfer.steps.wire import open_plan_reader, open_plan_writer

environment = read_environment()
seat = seat_from_environment(environment, "cpu")
mode, num_plans = sys.argv[1], int(sys.argv[2])

def say(**fields):
    print(json.dumps(fields), flush=True)

def rank_0():
    wire = open_plan_writer(seat, 20.0, environment)
    say(kind=type(wire).__name__)
    if mode == "killed-0":
        time.sleep(60)
    for step in range(num_plans):
        rows = tuple(range(step % 7))
        wire.send(encode(StepPlan(step, rows, (1,) * len(rows), (1,) * len(rows))))
    steps = []
    until = time.monotonic() + 20
    while mode == "whole" and time.monotonic() < until:
        steps += [(one.rank, one.step_id, one.message) for one in wire.failed_steps()]
        if wire.reader_progress() == [(0, num_plans)] * 3 and len(steps) == 3:
            break
        time.sleep(0.001)
    failed = wire.failed_readers()
    while mode == "killed-3" and time.monotonic() < until and not failed:
        time.sleep(0.001)
        failed = wire.failed_readers()
    said = [(one.rank, one.pid, one.message) for one in failed]
    say(failed=said, at=time.monotonic(), steps=sorted(steps), progress=wire.reader_progress())
    wire.send(encode(Command("close")))
    wire.close()

def other_rank():
    wire = open_plan_reader(seat, 20.0, environment)
    say(kind=type(wire).__name__)
    received = []
    try:
        while not isinstance(message := decode(wire.receive(20.0)), Command):
            received.append(message.step_id)
            if message.step_id == 5:
                wire.fail_step(5, 3, f"rank {seat.rank} met a NaN")
            wire.report(0, message.step_id + 1)
    except RankError as error:
        say(error=str(error), at=time.monotonic())
    else:
        say(in_order=received == list(range(num_plans)))
    wire.close()

rank_0() if seat.rank == 0 else other_rank()
"""


def seat_variables(rank: int, run_name: str, port: int, **changed: str) -> dict[str, str]:
    """What torchrun gives rank `rank` of two hosts with two ranks each, and our token."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % 2),
        "GROUP_RANK": str(rank // 2),
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": run_name,
        "TPINFER_LAUNCHER": "tpinfer",
        "TPINFER_PLAN_PORT": str(port),
        "TPINFER_TOKEN": TOKEN,
    }
    return {**variables, **changed}


class Rank:
    """A rank's process and what it prints, line by line."""

    def __init__(self, rank: int, run_name: str, port: int, python_path: str, mode: str) -> None:
        variables = seat_variables(rank, run_name, port, PYTHONPATH=python_path)
        command = [sys.executable, "-c", RANK, mode, str(NUM_PLANS)]
        self.process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)

    def says(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


Start = Callable[[str], list[Rank]]


@pytest.fixture
def start(run_name: str, python_path: str) -> Iterator[Start]:
    """Starts all four ranks in a mode."""
    started: list[Rank] = []

    def start_all(mode: str) -> list[Rank]:
        port = free_port()
        started.extend(Rank(rank, run_name, port, python_path, mode) for rank in range(4))
        return started

    yield start_all
    for rank in started:
        rank.process.kill()
        rank.process.wait()


@pytest.mark.ranks
def test_two_hosts_get_the_same_plans_and_answer(start: Start) -> None:
    ranks = start("whole")
    kinds = [rank.says()["kind"] for rank in ranks]
    assert kinds == ["PlanFanout", "ShmPlanReader", "TcpPlanReader", "TcpPlanReader"]
    told = ranks[0].says()
    assert told["failed"] == []
    assert told["steps"] == [[rank, 5, f"rank {rank} met a NaN"] for rank in (1, 2, 3)]
    assert told["progress"] == [[0, NUM_PLANS]] * 3
    assert [rank.says() for rank in ranks[1:]] == [{"in_order": True}] * 3
    assert [rank.process.wait(10) for rank in ranks] == [0] * 4


@pytest.mark.ranks
def test_a_killed_rank_of_the_other_host_is_named_within_a_second(start: Start) -> None:
    ranks = start("killed-3")
    for rank in ranks:
        rank.says()
    time.sleep(0.1)  # until the plans have been sent
    killed_s = time.monotonic()
    ranks[3].process.send_signal(signal.SIGKILL)
    told = ranks[0].says()
    [[rank, pid, message]] = told["failed"]
    assert (rank, pid) == (3, ranks[3].process.pid)
    assert "its process or its connection has ended" in message or "broke" in message
    assert told["at"] - killed_s < 1.0
    assert [rank.says() for rank in ranks[1:3]] == [{"in_order": True}] * 2


@pytest.mark.ranks
def test_a_killed_rank_0_is_noticed_on_both_hosts_within_a_second(start: Start) -> None:
    ranks = start("killed-0")
    for rank in ranks:
        rank.says()
    killed_s = time.monotonic()
    ranks[0].process.send_signal(signal.SIGKILL)
    for told in [rank.says() for rank in ranks[1:]]:
        assert "its own error says why" in told["error"] or "broke" in told["error"]
        assert told["at"] - killed_s < 1.0


def test_a_lone_rank_and_a_single_host_need_no_meeting_point(run_name: str) -> None:
    assert open_plan_writer(seat_from_environment(read_environment({}), "cpu")) is None
    both = {"WORLD_SIZE": "2", "TPINFER_TOKEN": ""}
    environments = [
        read_environment(seat_variables(rank, run_name, 1, **both)) for rank in range(2)
    ]
    first, second = (seat_from_environment(one, "cpu") for one in environments)
    writer = open_plan_writer(first, 1.0, environments[0])
    reader = open_plan_reader(second, 1.0, environments[1])
    assert writer is not None and not isinstance(writer, PlanFanout)
    assert isinstance(reader, ShmPlanReader)
    writer.send(b"x")
    assert reader.receive(1.0) == b"x"
    reader.close()
    writer.close()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"TPINFER_TOKEN": ""}, "need a shared token.*secrets.token_hex.*export it as TPINFER_TOK"),
        ({"TPINFER_TOKEN": "short"}, "TPINFER_TOKEN has 5 bytes and needs 16 or more"),
        ({"MASTER_ADDR": ""}, "need MASTER_ADDR"),
        ({"TPINFER_PLAN_PORT": "", "MASTER_PORT": ""}, "export TPINFER_PLAN_PORT"),
        ({"TPINFER_PLAN_PORT": "70000"}, r"port 70000 for step plans must be in 1\.\.65535"),
        ({"TPINFER_TOKEN_FILE": "/x"}, "both set; unset one"),
        ({"TPINFER_TOKEN": "", "TPINFER_TOKEN_FILE": "/no/such"}, r"\(/no/such\) cannot be read"),
    ],
)
def test_what_is_missing_is_said_before_anything_opens(
    changed: dict[str, str], told: str, run_name: str
) -> None:
    for rank in (0, 2):
        environment = read_environment(seat_variables(rank, run_name, 1, **changed))
        seat = seat_from_environment(environment, "cpu")
        with pytest.raises(ConfigError, match=told):
            if rank:
                open_plan_reader(seat, 1.0, environment)
            else:
                open_plan_writer(seat, 1.0, environment)


def test_the_meeting_point(tmp_path: Path, run_name: str) -> None:
    held = tmp_path / "token"
    held.write_text(f"{TOKEN}\n")
    changed = {"TPINFER_PLAN_PORT": "", "TPINFER_TOKEN": "", "TPINFER_TOKEN_FILE": str(held)}
    environment = read_environment(seat_variables(2, run_name, 1, **changed))
    point = find_meeting_point(environment)
    assert (point.address, point.port, point.token) == ("127.0.0.1", 29501, TOKEN.encode())
    shown = repr(point) + repr(read_environment(seat_variables(2, run_name, 1)))
    assert TOKEN not in shown
