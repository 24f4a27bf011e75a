"""The paged kernel under Triton's interpreter against plain torch, and compiled for a GPU that is
not here. Runs in processes of its own: the interpreter is chosen when triton is imported."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from tpinfer.attention.interface import HeadLayout
from tpinfer.attention.made_step import made_step
from tpinfer.attention.prompt_attention import AttentionShape
from tpinfer.config.dtypes import DType
from tpinfer.sharding.kv_layout import KVLayout

pytest.importorskip("triton")
CASES = ["decode", "prefill", "mixed", "uneven", "window", "eight_bits", "parts", "padding",
         "replayed", "loading", "compiled"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_paged_attention(case: str) -> None:
    command = [sys.executable, "-m", "tests.cpu.triton_attention_program", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"{case} agrees" in done.stdout


class CompiledKernel:
    """Stands for the kernel; keeps what each launch would be compiled for."""

    def __init__(self) -> None:
        self.variants: set[tuple[tuple[str, object], ...]] = set()

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **constants: self.variants.add(tuple(sorted(constants.items())))


def test_steps_with_prompts_take_two_kernels_whatever_they_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel compiled while requests wait is a second lost: one for prompts, one for the rest."""
    from tpinfer.attention import triton_attention

    kernel, cpu = CompiledKernel(), torch.device("cpu")
    monkeypatch.setattr(triton_attention.triton_paged, "paged_attention", kernel)
    shape = AttentionShape(HeadLayout(8, 2, 4, 0), 64)
    backend = triton_attention.TritonAttention(KVLayout(16, 600), cpu)
    attend = backend.bind_attention(shape.layout, shape.head_dim, None)
    decodes = [(1, 40 + 100 * i) for i in range(7)]
    for beside in range(7):
        for prompt in (2, 3, 5, 8, 9, 40, 300):
            sizes = [*decodes[:beside], (prompt, prompt + 10)]
            step = made_step(sizes, shape, 16, cpu, torch.float32, DType.FLOAT32)
            attend(step.query_THD, step.cache, step.spans)
    assert len(kernel.variants) == 2
