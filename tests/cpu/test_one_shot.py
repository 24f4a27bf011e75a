"""Own sums over ranks under Triton's interpreter in real processes, and compiled for a GPU that is
not here. In processes of their own: the interpreter is chosen when triton is imported."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("case", ["refused", "compiled"])
def test_one_process(case: str) -> None:
    run_case(case)


@pytest.mark.ranks
@pytest.mark.parametrize("case", ["sums-2", "sums-4", "late-2", "given_up-2"])
def test_ranks(case: str) -> None:
    run_case(case)


def run_case(case: str) -> None:
    command = [sys.executable, "-m", "tests.cpu.one_shot_program", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"{case} agrees" in done.stdout
