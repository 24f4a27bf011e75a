"""The run of all GPU scripts: parts that fail, hang or are unknown, and the table of an earlier
run's figures."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu import claims

from tpinfer.steps.liveness import is_running

ROOT = Path(__file__).resolve().parents[2]
RAW = ROOT / "profiling/results/gpu/h100-2026-11-27"
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def part(name: str, program: str, budget_s: float = 20.0) -> claims.Part:
    return claims.Part(name, ("-c", program), budget_s)


def test_a_part_that_fails_or_hangs_costs_itself_alone(tmp_path: Path) -> None:
    began_s = time.monotonic()
    ends = claims.run_all(
        [
            part("good", "open('OUT/good.json', 'w').write('{}')"),
            part("bad", "raise SystemExit(7)"),
            part("hangs", HANGS, 2.0),
            part("last", "print('still here')"),
        ],
        tmp_path,
        60.0,
    )
    assert ends == {
        "good": "done", "bad": "ended with 7, see bad.log", "hangs": "ended after 2 s",
        "last": "done",
    }  # fmt: skip
    assert json.loads((tmp_path / "parts.json").read_text()) == ends
    assert (tmp_path / "good.json").read_text() == "{}"
    assert (tmp_path / "last.log").read_text() == "still here\n"
    assert not is_running(int((tmp_path / "hangs.log").read_text())), "its child ended too"
    assert time.monotonic() - began_s < 40


def test_what_the_time_leaves_no_room_for_is_skipped(tmp_path: Path) -> None:
    ends = claims.run_all([part("one", "pass"), part("two", "pass")], tmp_path, 0.5)
    assert set(ends.values()) == {"skipped: the time is spent"}


def test_the_table_of_an_earlier_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in RAW.glob("*.json"):
        shutil.copy(path, tmp_path / path.name)
    assert claims.tell(tmp_path) == 1, "two were missed"
    told = {line[:42].strip(): line[42:].split() for line in capsys.readouterr().out.splitlines()}
    assert told["one row decodes, of its floor"] == [">=", "86", "88.9", "%", "held"]
    assert told["64 rows at 1k, of their floor"] == [">=", "80", "75.6", "%", "missed"]
    assert told["a shard of 70B at tp=8, of its floor"][-1] == "missed"
    assert told["host, of a request of one row"] == ["<=", "1", "0.509", "%", "held"]
    assert told["own one-shot over torch's, the most"][2:] == ["0.852", "times", "held"]
    assert told["stamps of a call"][-1] == "held"
    assert told["ledger's bytes from DRAM's"][2:] == ["0.994", "%", "held"]
    assert told["wall that tpprof explains"][-2:] == ["not", "measured"]
    written = json.loads((tmp_path / "claims.json").read_text())
    assert written["stamps of a call"]["verdict"] == "held"


def test_figures_of_scripts_that_had_not_run_then(tmp_path: Path) -> None:
    steps = {"rows 1, in flight 2": {"tpot_ms": 5.0}, "rows 32, in flight 2": {"tpot_ms": 8.0}}
    (tmp_path / "engine.json").write_text(json.dumps({"decode": steps}))
    peers = {"compiled batch 1": {"step_ms": 6.0}, "compiled batch 32": {"step_ms": 8.8},
             "transformers batch 1": {"error": "none"}}  # fmt: skip
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    runs = {"rows 1": {"explained": 0.99, "held": True, "graph gaps": 0.01},
            "rows 32": {"explained": 0.975, "held": True, "graph gaps": 0.04}}  # fmt: skip
    (tmp_path / "attribution.json").write_text(json.dumps({"targets": {}, **runs}))
    bounds = {"1 rows": {"agree": 0.9, "us": 100.0}, "prompt of 512": {"agree": 1.0, "us": 300.0},
              "prompt of 4096": {"failed": "no room"}}  # fmt: skip
    (tmp_path / "ncu_bytes.json").write_text(json.dumps({"bounds": bounds, "ops": {}}))
    assert claims.tell(tmp_path) == 0
    told = json.loads((tmp_path / "claims.json").read_text())
    assert told["a peer's step over ours, the least"] == {"figure": "1.1 times", "verdict": "held"}
    assert told["graph gaps, of the step"]["figure"] == "4 %"
    assert told["wall that tpprof explains"]["figure"] == "97.5 %"
    assert told["bound class as ncu's, of kernel time"]["figure"] == "97.5 %"


def test_every_part_is_a_script_that_is_there() -> None:
    command = [sys.executable, str(ROOT / "profiling/gpu/claims.py"), "--plan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    scripts = [line.split()[3] for line in done.stdout.splitlines()]
    assert len(scripts) == 9
    assert all(Path(name).is_file() for name in scripts if name != "-m")
    done = subprocess.run([*command, "--only", "engine,none"], capture_output=True, text=True)
    assert done.returncode == 2 and "none unknown; there are engine, " in done.stderr
