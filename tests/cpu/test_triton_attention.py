"""The paged kernel under Triton's interpreter against plain torch, and compiled for a GPU that is
not here. Runs in processes of its own: the interpreter is chosen when triton is imported."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")
CASES = ["decode", "prefill", "mixed", "uneven", "window", "eight_bits", "parts", "padding",
         "replayed", "loading", "compiled"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_paged_attention(case: str) -> None:
    command = [sys.executable, "-m", "tests.cpu.triton_attention_program", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"{case} agrees" in done.stdout
