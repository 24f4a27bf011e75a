"""Long tests, run by launch/nightly.sh: full cross products, ranks killed, many requests."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cpu.parity_program import MAX_TOKENS
from tests.cpu.tiny_models import SHAPES, greedy_oracle, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ranks, pytest.mark.nightly]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nightly")
    draw = random.Random(11)
    prompts = [[draw.randrange(331) for _ in range(draw.randint(1, 60))] for _ in range(12)]
    (root / "prompts.json").write_text(json.dumps(prompts))
    expected = {
        name: greedy_oracle(write_checkpoint(name, root / name), prompts, MAX_TOKENS)
        for name in SHAPES
    }
    (root / "expected.json").write_text(json.dumps(expected))
    return root


@pytest.mark.parametrize("collective", ["shared_memory", "gloo"])
@pytest.mark.parametrize("tp", [2, 3, 4])
def test_every_family_on_every_collective(checkpoints: Path, tp: int, collective: str) -> None:
    out = checkpoints / f"{collective}-{tp}.json"
    command = [
        sys.executable,
        "-m",
        "tests.cpu.parity_program",
        str(checkpoints),
        str(out),
        str(tp),
    ]
    done = subprocess.run([*command, collective], cwd=REPOSITORY, timeout=900)
    assert done.returncode == 0
    assert json.loads(out.read_text()) == json.loads((checkpoints / "expected.json").read_text())


def ours_in_shared_memory() -> set[str]:
    return {p.name for p in Path("/dev/shm").iterdir() if "tpinfer" in p.name}


@pytest.mark.parametrize("seed", range(10))
def test_a_rank_killed_at_any_moment_ends_the_run(seed: int) -> None:
    before = ours_in_shared_memory()
    draw = random.Random(seed)
    command = [sys.executable, "-m", "tpinfer", "generate", "--tp", "3", "--prompt", "Once"]
    command += ["--max-tokens", "900", "--ignore-eos", "--no-table"]
    run = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    deadline = time.monotonic() + 30
    while len(ranks := children.read_text().split()) < 3:
        assert time.monotonic() < deadline, "three ranks start"
        time.sleep(0.01)
    time.sleep(draw.random() * 4)
    victim = draw.randrange(3)
    os.kill(int(ranks[victim]), signal.SIGKILL)
    _, told = run.communicate(timeout=10)
    assert run.returncode not in (0, None), told
    assert f"rank {victim} failed: killed by SIGKILL" in told.partition("\n\n")[0] + told, told
    assert ours_in_shared_memory() <= before


def test_many_requests_leave_nothing_behind(tmp_path: Path) -> None:
    """600 prompts through 32 rows: every one is answered, and its time adds up."""
    prompts = tmp_path / "prompts.jsonl"
    draw = random.Random(3)
    lines = [
        json.dumps(
            {"prompt_token_ids": [draw.randrange(5, 1000) for _ in range(draw.randint(1, 40))]}
        )
        for _ in range(600)
    ]
    prompts.write_text("\n".join(lines))
    before, out = ours_in_shared_memory(), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "tpinfer", "generate", "--tp", "2", "--prompts", str(prompts)]
    command += ["--max-tokens", "16", "--ignore-eos", "--json", str(out), "--no-table"]
    done = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(one["token_ids"]) for one in found] == [16] * 600
    for one in found:
        assert sum(one["attribution"]["leaves"].values()) == one["attribution"]["wall_ns"]
    assert ours_in_shared_memory() <= before
