"""Scripts that wait for a GPU, as far as they run without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.engine import ratios, weight_count
from gpu.shard_alone import shard_step_s

from tpinfer.config.huggingface import read_model_spec
from tpinfer.config.model_name import model_directory

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    "engine.py",
    "linears.py",
    "ncu_bytes.py",
    "attention.py",
    "first_call.py",
    "ranks.py",
    "collectives.py",
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they would measure")
@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_gpu_they_say_so(script: str) -> None:
    command = [sys.executable, str(ROOT / "profiling" / "gpu" / script)]
    quiet = {**os.environ, "PATH": "/nowhere"}  # no nvidia-smi
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=quiet)
    assert done.returncode == 3, done.stderr
    assert "no GPU is visible here" in done.stdout


def test_a_shard_runs_alone() -> None:
    step_s, num_bytes = shard_step_s("qwen3-0.6b-slice", 4, 1, 40, torch.device("cpu"))
    assert step_s > 0
    # A layer of 1,024 by 3,072 (three times), queries and output of 4 of 16 heads, 2 of 8 KV
    # heads twice; a quarter of the tied head; and 40 tokens of keys and values.
    linears = 3 * 1024 * 3072 // 4 + 1024 * 128 * (4 + 4 + 2 + 2) + 32768 * 1024 // 4
    itemsize = num_bytes // linears
    assert itemsize in (2, 4)
    small = num_bytes - itemsize * linears - itemsize * 40 * 2 * 2 * 128
    assert 0 <= small < itemsize * 5000, "norms"


def test_ratios_are_those_of_known_figures() -> None:
    spec = read_model_spec(model_directory("shape:llama-3.1-8b"))
    assert 2 * weight_count(spec) == pytest.approx(15.009e9, rel=1e-3)
    found = ratios(
        {
            "ceilings": {
                "read_gbps": 4544, "gemv_bf16_28672x8192_gbps": 4000, "matrix_tflops": 788,
            },
            "decode": {"rows 1, in flight 2": {"tpot_ms": 4.032}},
            "prefill": {"ttft_ms": 100.0},
        }
    )  # fmt: skip
    assert found["decode rows 1, in flight 2"] == pytest.approx(0.8265, abs=5e-3)
    assert found["prefill"] == pytest.approx(0.78, abs=0.02)
    assert ratios({"decode": {}}) == {}
