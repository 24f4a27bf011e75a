"""launch/ncu.sh and launch/nsys.sh: the command lines they make, and what they refuse. Their tools
and the environment are stand-ins that write down how they were called."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
WRITES_DOWN = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0")" "$@" END >> "$CALLS"
"""
TORCHRUN = """#!/usr/bin/env bash
while [ "$1" != --no-python ]; do
  [ "$1" = --nproc-per-node ] && ranks=$2
  shift
done
shift
for RANK in $(seq 0 $((ranks - 1))); do export RANK; "$@"; done
"""


class House:
    """A repository of launchers alone, with tools that write down their arguments."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, root / "calls"
        tools, venv = root / "tools", root / ".venv" / "bin"
        for folder in (tools, venv):
            folder.mkdir(parents=True)
        shutil.copytree(LAUNCH, root / "launch")
        for name in ("python3", "ncu", "nsys"):
            self._tool(tools / name, WRITES_DOWN)
        self._tool(venv / "python", WRITES_DOWN)
        self._tool(venv / "torchrun", TORCHRUN)
        self.path = f"{tools}:{os.environ['PATH']}"

    def _tool(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(self, script: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        quiet = {
            k: v for k, v in os.environ.items() if k not in ("KERNELS", "COUNT", "NCU", "NSYS")
        }
        variables = {**quiet, "PATH": self.path, "CALLS": str(self.calls), **more}
        command = ["bash", str(self.root / "launch" / script), *words]
        return subprocess.run(
            command, capture_output=True, text=True, env=variables, cwd=self.root, timeout=60
        )

    def called(self) -> list[list[str]]:
        """Arguments of each call but those of setup.py; the program's name comes first."""
        found, words = [], []
        for word in self.calls.read_text().splitlines():
            if word == "END":
                found.append(words)
                words = []
            else:
                words.append(word)
        return [one for one in found if one[0] != "python3"]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "house")


def value(call: list[str], flag: str) -> str:
    return call[call.index(flag) + 1]


def test_ncu_looks_at_chosen_kernels_of_chosen_steps(house: House) -> None:
    done = house.run(
        "ncu.sh", "--kernels", "few_rows,one_row", "--steps", "8-10", "--count", "7", "--out", "x",
        "--set", "full", "generate", "--prompt", "a b", "--max-tokens", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [call] = house.called()
    assert call[:2] == ["ncu", "--nvtx"]
    assert value(call, "--nvtx-include") == "regex:tpinfer@tpinfer.step id=(8|9|10) .*/"
    assert value(call, "--kernel-name") == "regex:^(few_rows|one_row)"
    assert (value(call, "--launch-count"), value(call, "--set")) == ("7", "full")
    assert (value(call, "--export"), value(call, "--graph-profiling")) == ("x", "node")
    program = call[call.index("-m") :]
    assert program == [
        "-m",
        "tpinfer",
        "generate",
        "--prompt",
        "a b",
        "--max-tokens",
        "4",
        "--nvtx",
    ]


def test_ncu_of_ops_runs_them_one_by_one(house: House) -> None:
    house.run("ncu.sh", "--ops", "layers.0.mlp.down,head", "bench", "latency")
    [call] = house.called()
    wanted = [call[i + 1] for i, word in enumerate(call) if word == "--nvtx-include"]
    assert wanted == ["tpinfer@tpinfer.op layers.0.mlp.down/", "tpinfer@tpinfer.op head/"]
    assert call[-2:] == ["--nvtx", "--no-cuda-graphs"]
    assert value(call, "--kernel-name") == "regex:.*" and value(call, "--export") == "rank0"


@pytest.mark.parametrize("form", [("--ranks", "3", "--rank", "1", "--out", "r"), ("3", "1", "r")])
def test_ncu_looks_at_one_of_several_ranks(house: House, form: tuple[str, ...]) -> None:
    done = house.run("ncu.sh", *form, "generate", "--collective", "gloo", KERNELS="regex:x y")
    assert done.returncode == 0, done.stderr
    first, second, third = house.called()
    plain = ["python", "-m", "tpinfer", "generate", "--collective", "gloo", "--nvtx"]
    assert first == third == plain
    assert second[0] == "ncu" and second[-6:] == plain[1:]
    assert value(second, "--kernel-name") == "regex:x y" and value(second, "--export") == "r"


@pytest.mark.parametrize("form", [("--ranks", "2", "--out", "reports"), ("2", "reports")])
def test_nsys_records_every_rank(house: House, form: tuple[str, ...]) -> None:
    done = house.run("nsys.sh", *form, "generate", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    calls = house.called()
    assert len(calls) == 2 and calls[0] == calls[1]
    assert calls[0][:2] == ["nsys", "profile"]
    assert value(calls[0], "--output") == "reports/rank%q{RANK}"
    assert calls[0][calls[0].index("-m") :][:5] == [
        "-m",
        "tpinfer",
        "generate",
        "--max-tokens",
        "4",
    ]
    assert "--nvtx" in calls[0] and "tpprof analyze reports" in done.stderr
    assert (house.root / "reports").is_dir()


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        ("ncu.sh", (), "a verb of tpinfer must follow"),
        ("ncu.sh", ("--bogus", "generate"), "option '--bogus' is unknown"),
        ("ncu.sh", ("--ranks",), "--ranks needs a value"),
        ("ncu.sh", ("--ranks", "two", "generate"), "--ranks 'two' must be a whole number"),
        ("ncu.sh", ("--ranks", "2", "--rank", "2", "generate"), "--rank 2 must be below --ranks 2"),
        ("ncu.sh", ("--steps", "9-8", "generate"), "--steps 9-8 must rise"),
        ("ncu.sh", ("--steps", "a", "generate"), "--steps 'a' must be a number or A-B"),
        ("ncu.sh", ("--steps", "1", "--ops", "head", "generate"), "give one"),
        ("ncu.sh", ("--ops", "a b", "generate"), "is no op's id"),
        ("ncu.sh", ("--kernels", "a;b", "generate"), "must be names with commas between"),
        ("nsys.sh", (), "a verb of tpinfer must follow"),
        ("nsys.sh", ("--ranks", "0", "generate"), "must be a whole number from 1 on"),
        ("nsys.sh", ("--rank", "0", "generate"), "option '--rank' is unknown"),
        ("nsys.sh", ("--steps", "4-2", "generate"), "must rise"),
    ],
)
def test_mistakes_are_told_in_one_line(
    house: House, script: str, words: tuple[str, ...], told: str
) -> None:
    done = house.run(script, *words)
    assert done.returncode == 2 and not house.calls.exists()
    assert told in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"launch/{script}: ")


@pytest.mark.parametrize("script", ["ncu.sh", "nsys.sh"])
def test_help_and_a_missing_tool(house: House, script: str) -> None:
    done = house.run(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: bash launch/{script}")
    assert max(map(len, done.stdout.splitlines())) <= 120
    name = script.removesuffix(".sh")
    done = house.run(script, "generate", **{name.upper(): "/nowhere/tool"})
    assert done.returncode == 1 and f"{name} is not on PATH" in done.stderr
