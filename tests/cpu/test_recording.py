"""--profile on real ranks: what is written, that it says what ran, and that it holds no secrets."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tpprof.cli.main import main as analyze

from tpinfer.costs.ops import TERMS

REPOSITORY = Path(__file__).resolve().parents[2]
SECRET = "hunter2-never-written"
NUM_STEPS = 6
pytestmark = pytest.mark.ranks


def record(directory: Path, *more: str, tp: int = 2) -> subprocess.CompletedProcess[str]:
    """Generate with the embedded model and record it."""
    command = [sys.executable, "-m", "tpinfer", "generate", "--tp", str(tp), "--prompt", "One day"]
    command += [
        "--greedy",
        "--ignore-eos",
        "--max-tokens",
        "20",
        "--profile",
        str(directory),
        *more,
    ]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "API_TOKEN": SECRET},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recorded")
    done = record(directory, "--profile-steps", str(NUM_STEPS), "--profile-skip", "4")
    assert done.returncode == 0, done.stderr
    assert str(directory) in done.stderr and "tpprof analyze" in done.stderr
    return directory


def ranges(directory: Path, rank: int) -> list[dict[str, Any]]:
    with gzip.open(directory / f"rank{rank}.trace.json.gz", "rt") as file:
        found = json.load(file)
    assert found["distributedInfo"]["rank"] == rank
    return [e for e in found["traceEvents"] if e.get("cat") == "user_annotation"]


def named(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return sorted((e for e in events if e["name"].split()[0] == kind), key=lambda e: e["ts"])


def test_every_rank_names_the_same_steps_and_ops(recorded: Path) -> None:
    by_rank = [ranges(recorded, rank) for rank in (0, 1)]
    steps = [[e["name"] for e in named(events, "tpinfer.step")] for events in by_rank]
    assert steps[0] == steps[1]
    assert [name.split()[1] for name in steps[0]] == [f"id={i}" for i in range(4, 4 + NUM_STEPS)]
    assert all("phase=decode" in name for name in steps[0])
    fields = dict(part.split("=") for part in steps[0][0].split()[3:])
    assert list(fields) == list(TERMS[1:])
    assert int(fields["sk"]) > int(fields["tokens"]) == 1
    manifest = json.loads((recorded / "rank1.manifest.json").read_text())["manifest"]
    ids = [op["id"] for op in manifest["ops"]]
    for events in by_rank:
        ops = [e["name"].split()[1] for e in named(events, "tpinfer.op")]
        assert ops == ids * NUM_STEPS


def test_ops_lie_inside_their_steps(recorded: Path) -> None:
    events = ranges(recorded, 0)
    steps = named(events, "tpinfer.step")
    for op in named(events, "tpinfer.op"):
        inside = [
            s
            for s in steps
            if s["ts"] <= op["ts"] and op["ts"] + op["dur"] <= s["ts"] + s["dur"] + 0.01
        ]
        assert len(inside) == 1, op["name"]


def test_the_facts_beside_the_traces(recorded: Path) -> None:
    run = json.loads((recorded / "run.json").read_text())
    assert run["tp"] == 2 and run["format_version"] == 1
    assert len(run["profiled_step_ns"]) == NUM_STEPS
    assert len(run["unprofiled_step_ns"]) >= 3
    assert run["dilation"] > 0
    (clock,) = recorded.glob("clock-*.json")
    assert json.loads(clock.read_text())["ranks"] == [0, 1]
    for rank in (0, 1):
        ceilings = json.loads((recorded / f"rank{rank}.manifest.json").read_text())["ceilings"]
        assert ceilings["memory"][-1]["name"] == "DRAM" and ceilings["kernel_floor_s"] > 0
    assert not list(recorded.glob("*.part")) and not list(recorded.glob("rank?.trace.json"))


def test_nothing_of_the_environment_is_written(recorded: Path) -> None:
    for path in recorded.iterdir():
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert SECRET.encode() not in content, path.name


@pytest.mark.parametrize(("depth", "skipped"), [(2, 4), (3, 0)])
def test_steps_that_overlap_are_recorded_whole_on_every_rank(
    tmp_path: Path, depth: int, skipped: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 runs them on a thread of its own then; a step belongs to one range on each rank, ops
    to the step that ran them, and the report adds up."""
    more = "--steps-in-flight", str(depth), "--profile-skip", str(skipped)
    done = record(tmp_path, *more, "--profile-steps", str(NUM_STEPS))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "rank0.manifest.json").read_text())["manifest"]
    ids = [op["id"] for op in manifest["ops"]]
    names = []
    for rank in (0, 1):
        events = ranges(tmp_path, rank)
        steps, ops = named(events, "tpinfer.step"), named(events, "tpinfer.op")
        names.append([step["name"] for step in steps])
        assert len({step["tid"] for step in steps}) == 1
        for step in steps:
            end = step["ts"] + step["dur"] + 0.01
            inside = [op for op in ops if step["ts"] <= op["ts"] and op["ts"] + op["dur"] <= end]
            assert [op["name"].split()[1] for op in inside] == ids, step["name"]
        assert len(ops) == len(ids) * NUM_STEPS
        if rank == 0:
            parts = {event["name"].split()[1] for event in named(events, "tpinfer.host")}
            assert {"schedule", "ipc", "prepare", "detokenize"} <= parts
    assert names[0] == names[1]
    wanted = [f"id={i}" for i in range(skipped, skipped + NUM_STEPS)]
    assert [name.split()[1] for name in names[0]] == wanted
    run = json.loads((tmp_path / "run.json").read_text())
    assert len(run["profiled_step_ns"]) == NUM_STEPS - (skipped == 0), "the first is a prompt"
    report = tmp_path / "report.json"
    assert analyze(["analyze", str(tmp_path), "--window", "steps", "--json", str(report)]) == 0
    assert "different numbers of steps" not in capsys.readouterr().out
    windows = json.loads(report.read_text())["windows"]
    assert len(windows) == NUM_STEPS
    for window in windows:
        for rank in window["ranks"]:
            assert sum(rank["leaves"].values()) == rank["wall_ns"] > 0


def test_time_to_first_token_can_be_recorded(tmp_path: Path) -> None:
    done = record(tmp_path, "--profile-steps", "3", "--profile-skip", "0", tp=1)
    assert done.returncode == 0, done.stderr
    events = ranges(tmp_path, 0)
    order = [named(events, f"tpinfer.{kind}")[0]["ts"] for kind in ("accept", "admit", "token")]
    assert order == sorted(order)
    assert "phase=prefill" in named(events, "tpinfer.step")[0]["name"]
    assert named(events, "tpinfer.token")[-1]["name"] == "tpinfer.token request=0 index=2"


def test_a_run_too_short_to_record_says_so(tmp_path: Path) -> None:
    done = record(tmp_path, "--profile-skip", "500", tp=1)
    assert done.returncode == 0
    assert "nothing was recorded" in done.stderr and "--profile-skip" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_numbers_are_refused_before_anything_starts(tmp_path: Path) -> None:
    done = record(tmp_path, "--profile-steps", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --profile-steps 0 must be 1 or more")
