"""`tpinfer bench` as a user runs it: what is printed, and the keys of both JSON files."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cpu.tpinfer_command import REPOSITORY, TIMEOUT_S, user_environment

SHORT = ("--num-iters", "2", "--num-iters-warmup", "0", "--output-len", "6")


def bench(*arguments: str | Path) -> str:
    """What a run prints that goes well."""
    done = subprocess.run(
        [sys.executable, "-m", "tpinfer", "bench", *map(str, arguments)],
        cwd=REPOSITORY,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def written(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.ranks
@pytest.mark.parametrize("tp", [1, 2])
def test_latency(tp: int, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    files = ("--json", ours, "--output-json", theirs)
    shown = bench("latency", "--tp", str(tp), "--batch-size", "2", *SHORT, *files)
    assert re.match(r"Avg latency: \d+\.\d+ seconds\n10% percentile latency: \d", shown)
    found = written(theirs)
    assert list(found) == ["model_id", "avg_latency", "latencies", "percentiles"]
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert len(found["latencies"]) == 2
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 2)
    mine = written(ours)
    rates = ["ttft_s", "tpot_s", "output_tokens_per_s", "total_tokens_per_s"]
    assert list(mine) == ["command", *rates, "latencies_s", "attribution"]
    assert mine["command"][:4] == ["tpinfer", "bench", "latency", "--tp"]
    assert all(mine[name] > 0 for name in rates)
    split = mine["attribution"]
    assert sum(split["rollup"].values()) == split["wall_ns"]
    assert len(split["ranks"]) == tp


@pytest.mark.ranks
def test_throughput_of_prompts_of_several_lengths(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.json"
    shape = (
        "--num-prompts",
        "5",
        "--random-input-len",
        "8",
        "--random-prefix-len",
        "4",
        "--n",
        "2",
    )
    shown = bench(
        "throughput", *shape, *SHORT, "--random-range-ratio", "0.5", "--output-json", theirs
    )
    counted = re.search(
        r"Throughput: [\d.]+ requests/s, [\d.]+ total tokens/s, [\d.]+ output tokens/s\n"
        r"Total num prompt tokens:  (\d+)\nTotal num output tokens:  (\d+)\n",
        shown,
    )
    assert counted is not None
    num_input, num_output = int(counted[1]), int(counted[2])
    assert 5 * (4 + 4) <= num_input <= 5 * (4 + 12) and 10 * 3 <= num_output <= 10 * 9
    found = written(theirs)
    assert found["num_requests"] == 5 and found["total_num_tokens"] == num_input + num_output
    assert found["requests_per_second"] == pytest.approx(5 / found["elapsed_time"])
    assert found["tokens_per_second"] == pytest.approx(
        found["total_num_tokens"] / found["elapsed_time"]
    )


@pytest.mark.ranks
def test_throughput_of_a_file_of_conversations(tmp_path: Path) -> None:
    talk = tmp_path / "talk.json"
    turns = [{"value": "Once upon a time there was a dog"}, {"value": "He ran to the big tree"}]
    talk.write_text(json.dumps([{"conversations": turns}] * 3))
    shown = bench("throughput", "--dataset-path", talk, "--num-prompts", "4", "--num-iters", "1")
    counted = re.search(r"Total num output tokens:  (\d+)", shown)
    assert counted is not None and int(counted[1]) % 4 == 0 and int(counted[1]) >= 16
