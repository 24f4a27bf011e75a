"""A rank that dies or hangs under torchrun: rank 0 says which and why, all of them end long before
torchrun's own patience (30 s) or NCCL's (600 s) does, and a restart begins a whole run anew."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cpu.running import LAUNCHERS, Running, children_of, endless_model
from tests.cpu.tpinfer_command import REPOSITORY, json_lines, user_environment

pytestmark = pytest.mark.ranks
STEP_S = 3.0
END_S = 25.0
"""Less than torchrun waits for one rank that does not end when it is asked to."""


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_model(tmp_path_factory.mktemp("models") / "endless")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run(rank: int, endless: Path, tmp_path: Path) -> None:
    with Running("torchrun", endless, tmp_path / "errors") as run:
        os.kill(run.ranks[rank], signal.SIGKILL)
        assert run.wait(END_S) == 1
        assert f"rank      : {rank} (local_rank: {rank})" in run.told().split("Root Cause")[1]
        run.assert_gone(1.0)


def test_a_hung_rank_is_named_and_all_end(endless: Path, tmp_path: Path) -> None:
    """It is stopped, so that it does not even hear that it should end."""
    errors = tmp_path / "errors"
    with Running("torchrun", endless, errors, "--step-timeout", str(STEP_S)) as run:
        time.sleep(1.0)  # the first step has a longer deadline
        os.kill(run.ranks[1], signal.SIGSTOP)
        assert run.wait(STEP_S + END_S) == 1
        told = run.told()
        assert "is not done after 3 s; not reported by rank 1" in told
        assert "stacks follow" in told and "in all_reduce" in told
        [failed] = [line for line in told.splitlines() if line.startswith("rank 0 failed: ")]
        assert "not reported by rank 1" in failed
        run.assert_gone(1.0)


def test_a_restart_begins_anew(endless: Path, tmp_path: Path) -> None:
    """Under another generation: nothing of the first one is in its way."""
    command = list(LAUNCHERS["torchrun"])
    command[command.index("--standalone")] = "--max-restarts=1"
    command.insert(command.index("--max-restarts=1"), "--standalone")
    out = tmp_path / "out.jsonl"
    command += ["--model", str(endless), "--prompt", "fox", "--ignore-eos", "--greedy"]
    command += ["--max-tokens", "3000", "--max-num-seqs", "1", "--json", str(out)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=user_environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.read(12), "text comes"
        os.kill(children_of(process.pid)[1], signal.SIGKILL)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, said.decode()
    [result] = json_lines(out)
    assert len(result["token_ids"]) == 3000
