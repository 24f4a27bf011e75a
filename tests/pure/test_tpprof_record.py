"""`tpprof record` with a stand-in for torch: one clean trace a rank, the script runs as it would,
nothing of the environment is kept."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from tpprof.cli.main import main
from tpprof.cli.record import clean_trace, with_runner
from tpprof.errors import TraceError

SECRET = "sk-live-nobody-may-see-this"
FAKE_PROFILER = f'''
import json


def supported_activities():
    return {{"cpu"}}


class profile:
    def __init__(self, activities, record_shapes, with_stack):
        assert record_shapes and not with_stack
        self.events = []

    def start(self):
        self.events.append({{"ph": "X", "name": "begun", "ts": 1.5, "dur": 2, "pid": 1, "tid": 1}})

    def stop(self):
        self.events.append({{"ph": "X", "name": "ended", "ts": 4.5, "dur": 2, "pid": 1, "tid": 1}})

    def export_chrome_trace(self, path):
        found = {{"schemaVersion": 1, "env": {{"TOKEN": "{SECRET}"}}, "traceName": path}}
        with open(path, "w") as out:
            json.dump({{**found, "traceEvents": self.events}}, out)
'''
SCRIPT = """
import os
import sys
import beside

assert __name__ == "__main__"
print("script", sys.argv[1:], os.path.basename(sys.argv[0]), beside.VALUE)
sys.exit(int(sys.argv[1]) if len(sys.argv) > 1 else None)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a script, a module beside it and a torch that is none."""
    (tmp_path / "lib" / "torch").mkdir(parents=True)
    (tmp_path / "lib" / "torch" / "__init__.py").write_text("from . import profiler\n")
    (tmp_path / "lib" / "torch" / "profiler.py").write_text(FAKE_PROFILER)
    (tmp_path / "lib" / "module_of_mine.py").write_text(
        SCRIPT.replace("import beside", "class beside: VALUE = 8")
    )
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    monkeypatch.setenv("API_TOKEN", SECRET)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def events(path: Path) -> list[str]:
    found = json.loads(gzip.decompress(path.read_bytes()))
    assert set(found) == {"schemaVersion", "traceEvents"}
    return [event["name"] for event in found["traceEvents"]]


def test_a_script_runs_as_it_would_and_leaves_a_trace(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["record", "--out", "t", "--", sys.executable, "script.py", "0", "--x"]) == 0
    said = capfd.readouterr().out
    assert "script ['0', '--x'] script.py 7" in said
    assert "recorded 1 rank in t" in said
    assert events(place / "t" / "rank0.trace.json.gz") == ["begun", "ended"]
    assert sorted(path.name for path in (place / "t").iterdir()) == [
        "rank0.trace.json.gz",
        "run.json",
    ]
    facts = json.loads((place / "t" / "run.json").read_text())
    assert (facts["tp"], facts["dilation"], facts["command"]) == (1, None, ["script.py"])
    assert not [p for p in (place / "t").iterdir() if SECRET.encode() in p.read_bytes()]


def test_ranks_are_told_apart_by_their_launcher(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["record", "--out", "t", "--", sys.executable, "-u", "script.py"]) == 0
    assert (place / "t" / "rank3.trace.json.gz").is_file()
    assert json.loads((place / "t" / "run.json").read_text())["tp"] == 4


def test_modules_run_too(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "--", sys.executable, "-m", "module_of_mine", "0"]) == 0
    assert "script ['0'] module_of_mine.py 8" in capfd.readouterr().out
    assert (place / "traces" / "rank0.trace.json.gz").is_file()


@pytest.mark.parametrize("code", [1, 7])
def test_the_exit_code_is_the_scripts_and_the_trace_stays(place: Path, code: int) -> None:
    assert main(["record", "--", sys.executable, "script.py", str(code)]) == code
    assert (place / "traces" / "rank0.trace.json.gz").is_file()


def test_a_script_that_breaks_leaves_its_trace(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "script.py").write_text("raise ValueError('mine')\n")
    assert main(["record", "--", sys.executable, "script.py"]) == 1
    assert "ValueError: mine" in capfd.readouterr().err
    assert (place / "traces" / "rank0.trace.json.gz").is_file()


def test_twice_measures_dilation(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "script.py").write_text("import time; time.sleep(0.02)\n")
    assert main(["record", "--twice", "--", sys.executable, "script.py"]) == 0
    facts = json.loads((place / "traces" / "run.json").read_text())
    assert facts["dilation"] == pytest.approx(
        facts["profiled_step_ns"][0] / facts["unprofiled_step_ns"][0]
    )
    assert "times as long as without recording" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([], "runs no Python script"),
        (["--", "ls", "-l"], "runs no Python script"),
        (["--", "no-such-python", "script.py"], "was not found"),
        (["--", sys.executable, "missing.py"], "missing.py does not exist"),
        (["--", sys.executable, "-c", "1", "script.py"], "no rank wrote a trace"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(
    place: Path, capfd: pytest.CaptureFixture[str], command: list[str], said: str
) -> None:
    assert main(["record", *command]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error


def test_a_directory_with_traces_is_left_alone(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "traces").mkdir()
    (place / "traces" / "rank0.trace.json.gz").write_text("mine")
    assert main(["record", "--", sys.executable, "script.py"]) == 2
    assert "holds traces already" in capfd.readouterr().err
    assert (place / "traces" / "rank0.trace.json.gz").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python a.py b.py", "python R a.py b.py"),
        ("torchrun --nproc-per-node 2 a.py -m x", "torchrun --nproc-per-node 2 R a.py -m x"),
        (
            "python -m torch.distributed.run -n 2 a.py",
            "python -m torch.distributed.run -n 2 R a.py",
        ),
        ("python -m torch.distributed.run -m pkg", "python -m torch.distributed.run R -m pkg"),
        ("python -m pkg --flag", "python R -m pkg --flag"),
    ],
)
def test_the_runner_goes_before_the_script(command: str, expected: str) -> None:
    assert with_runner(command.split(), ["R"]) == expected.split()


def test_what_is_no_json_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "rank0.trace.json"
    path.write_text("{" + SECRET)
    with pytest.raises(TraceError, match="not the JSON"):
        clean_trace(path)
    assert list(tmp_path.iterdir()) == []
