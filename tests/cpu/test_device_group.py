"""The group of GPUs of one host, in real CPU processes over a fake of torch's symmetric memory, its
own kernels in Triton's interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.ranks
@pytest.mark.parametrize("case", ["routes", "without", "kernelless", "wrong", "aborted"])
def test_device_group(case: str) -> None:
    command = [sys.executable, "-m", "tests.cpu.device_group_program", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"{case} agrees" in done.stdout


@pytest.mark.ranks
def test_tokens_and_waits_of_a_model(tmp_path: Path) -> None:
    """Sums with the norm in them leave the tokens of one rank, and every step has its waits."""
    call = ["generate", "--dtype", "float32", "--greedy", "--max-tokens", "3", "--json", "-"]
    call += ["--prompt", "Once upon a time", "--device", "cpu", "--explain"]
    alone = subprocess.run(
        [sys.executable, "-m", "tpinfer", *call], capture_output=True, text=True, timeout=60
    )
    assert alone.returncode == 0, alone.stderr
    meeting, waits = tmp_path / "meeting", tmp_path / "waits"
    meeting.mkdir()
    command = [sys.executable, "-m", "tests.cpu.device_tokens_program", meeting, waits]
    both = subprocess.run(
        [*command, *call, "--tp", "2"], capture_output=True, text=True, timeout=300
    )
    assert both.returncode == 0, both.stderr
    assert "own one-shot" in both.stderr, "explained"
    assert json.loads(both.stdout)["token_ids"] == json.loads(alone.stdout)["token_ids"]
    for rank in range(2):
        steps = json.loads((tmp_path / f"waits-{rank}").read_text())
        assert len(steps) >= 3
        assert len({len(step) for step in steps}) == 1
        assert all(min(step) >= 0 for step in steps)
