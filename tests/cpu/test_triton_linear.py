"""Products of few rows under Triton's interpreter against torch's, what is chosen by times, and
compiled for a GPU that is not here. In processes of their own, as `test_triton_layers`."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("case", ["products", "gated", "fused", "loading", "choices", "compiled"])
def test_skinny_products(case: str) -> None:
    command = [sys.executable, "-m", "tests.cpu.triton_linear_program", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"{case} agrees" in done.stdout
