"""Fused kernels of a layer and of greedy sampling under Triton's interpreter against plain torch,
and compiled for a GPU that is not here. In processes of their own: the interpreter is chosen when
triton is imported."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "case", ["norms", "activation", "rope", "passes", "loading", "decoder", "compiled"]
)
def test_layer_kernels(case: str) -> None:
    command = [sys.executable, "-m", "tests.cpu.triton_layers_program", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"{case} agrees" in done.stdout
