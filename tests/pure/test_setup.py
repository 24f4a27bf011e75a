"""launch/setup.py: which torch it picks, when it has nothing to do, and what it says when it cannot
go on.
"""

import ast
import json
import sys
from pathlib import Path

import pytest

from launch import setup

TAG = "cp{}{}".format(*sys.version_info[:2])
WHEEL = f"torch-{setup.TORCH}+cpu-{TAG}-{TAG}-manylinux_2_28_x86_64.whl"


class FakeCommands:
    """Stands in for pip and the venv: records what would run and answers as a fresh machine."""

    def __init__(self, configuration: str = "", failing: str = "") -> None:
        self.lines: list[str] = []
        self._configuration = configuration
        self._failing = failing

    def run(self, command: list[str], advice: str) -> str:
        line = " ".join(command)
        self.lines.append(line)
        if self._failing and self._failing in line:
            raise setup.SetupError(f"`{line}` failed:\n{advice}")
        if "venv" in command:
            setup.PYTHON.parent.mkdir(parents=True, exist_ok=True)
            setup.PYTHON.touch()
        return self._configuration if "config" in command else ""

    def installs(self) -> list[str]:
        return [line.partition(" install ")[2] for line in self.lines if " install " in line]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository on a machine without a GPU or AVX-512."""
    (tmp_path / "pyproject.toml").write_text("[project]")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup, "PYTHON", tmp_path / ".venv/bin/python")
    monkeypatch.setattr(setup, "STAMP", tmp_path / ".venv/stamp.json")
    monkeypatch.setattr(setup, "has_gpu", lambda: False)
    monkeypatch.setattr(setup, "ask_venv", lambda code: None)
    monkeypatch.setattr(setup, "deepspeed_can_be_used", lambda: False)
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("TPINFER_TORCH_INDEX", raising=False)
    return tmp_path


def use(monkeypatch: pytest.MonkeyPatch, commands: FakeCommands) -> FakeCommands:
    monkeypatch.setattr(setup, "run", commands.run)
    return commands


def test_a_local_cpu_wheel_is_preferred(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "wheels").mkdir()
    (machine / "wheels" / WHEEL).touch()
    configuration = (
        f"global.cert='/x'\n:env:.find-links='{machine}/nowhere file://{machine}/wheels'\n"
    )
    commands = use(monkeypatch, FakeCommands(configuration))
    setup.set_up({"run"})
    assert commands.installs() == [
        f"--no-deps {machine}/wheels/{WHEEL}",
        "--editable .[run]",
    ]


def test_otherwise_only_a_cpu_build_will_do(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = use(monkeypatch, FakeCommands())
    setup.set_up({"run"})
    assert (
        commands.installs()[0]
        == f"--no-deps --index-url {setup.CPU_INDEX} torch=={setup.TORCH}+cpu"
    )


def test_the_index_can_be_set(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPINFER_TORCH_INDEX", "file:///mirror")
    commands = use(monkeypatch, FakeCommands())
    setup.set_up({"run"})
    assert commands.installs()[0] == f"--no-deps --index-url file:///mirror torch=={setup.TORCH}"


def test_a_gpu_gets_the_usual_build(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "has_gpu", lambda: True)
    commands = use(monkeypatch, FakeCommands())
    setup.set_up({"run"})
    assert commands.installs() == [setup.TORCH_RANGE, "--editable .[gpu,run]"]


def test_other_packages_cannot_replace_torch(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "installed_torch", lambda: "2.13.0+cpu")
    commands = use(monkeypatch, FakeCommands())
    setup.set_up({"run", "test"})
    [only] = commands.installs()
    assert only.startswith("--editable .[run,test] --constraint ")


def test_a_second_run_does_nothing_and_more_extras_add_up(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = use(monkeypatch, FakeCommands())
    setup.set_up({"run"})
    commands.lines.clear()
    setup.set_up({"run"})
    assert commands.lines == []
    setup.set_up({"test"})
    assert commands.installs()[-1] == "--editable .[run,test]"
    commands.lines.clear()
    setup.set_up({"run"})
    assert commands.lines == []
    (machine / "pyproject.toml").write_text("[project] # changed")
    setup.set_up({"run"})
    assert commands.installs()[-1] == "--editable .[run]"


def test_an_interrupted_set_up_is_not_taken_for_done(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakeCommands(failing="--editable"))
    with pytest.raises(setup.SetupError, match="check the network"):
        setup.set_up({"run"})
    assert not setup.STAMP.exists()


def test_natives_may_fail(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, FakeCommands(failing="build_ring"))
    setup.set_up({"run"})
    assert "not fatal" in capsys.readouterr().out
    assert json.loads(setup.STAMP.read_text())["extras"] == ["run"]


@pytest.mark.parametrize(
    "name",
    [
        WHEEL.replace("+cpu", ""),
        WHEEL.replace(TAG, "cp310"),
        WHEEL.replace("x86_64", "aarch64"),
        WHEEL.replace(setup.TORCH, "2.13.1"),
        WHEEL.replace(f"{TAG}-manylinux", f"{TAG}t-manylinux"),
    ],
)
def test_wheels_for_others_are_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert setup.find_cpu_wheel([tmp_path], TAG, "x86_64") is None
    (tmp_path / WHEEL.replace("+", "%2B")).touch()
    assert setup.find_cpu_wheel([tmp_path], TAG, "x86_64") is not None


def test_an_old_python_is_told_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(setup, "find_python", lambda: None)
    with pytest.raises(setup.SetupError, match=r"needs Python 3\.11 or newer"):
        setup.require_python()


def test_an_old_python_hands_over_to_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(setup.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(setup, "find_python", lambda: "/usr/bin/python3.12")
    monkeypatch.setattr(setup.os, "execv", lambda path, argv: calls.append((path, argv[0])))
    setup.require_python()
    assert calls == [("/usr/bin/python3.12", "/usr/bin/python3.12")]


def test_old_interpreters_can_read_it() -> None:
    """It must get as far as saying that they are too old; 3.7 is the oldest grammar `ast` knows."""
    ast.parse(Path(setup.__file__).read_text(), feature_version=(3, 7))
