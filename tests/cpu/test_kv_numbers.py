"""Rows in 8 bits: how near they come back, what zeros, infinities and NaN become; and what an 8-bit
cache does to logits."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.cpu.thread_ranks import prefill_logits
from tests.cpu.tiny_models import write_checkpoint
from tpinfer.config.dtypes import DType
from tpinfer.numerics.row_quantize import LARGEST, dequantize_rows, quantize_rows

FP8 = torch.float8_e4m3fn
DTYPES = [torch.int8, FP8]
floats = st.floats(-(2.0**99), 2.0**99, width=32)
rows = hnp.arrays("float32", hnp.array_shapes(min_dims=2, max_dims=3, max_side=9), elements=floats)
MEAN_KL = {DType.INT8: 0.002, DType.FLOAT8_E4M3: 0.03, DType.BFLOAT16: 0.0005}
"""Most nats between logits over such a cache and over a float32 one, both computed in float32, mean
over positions. Measured on these checkpoints, whose logits are far apart: int8 0.0002 and 0.0004,
e4m3 0.004 and 0.010, bfloat16 0.00002 and 0.00006."""


@given(rows, st.sampled_from(DTYPES))
def test_the_error_is_bounded_by_the_rows_peak(array: object, dtype: torch.dtype) -> None:
    """int8: half a step of peak / 127. e4m3: 1/16 of the value (three bits of mantissa), or half of
    its smallest step, 2**-9 of a scale."""
    x = torch.as_tensor(array)
    values, scales = quantize_rows(x, dtype)
    assert values.dtype is dtype and scales.shape == x.shape[:-1]
    found = dequantize_rows(values, scales, torch.float32)
    scale = scales.unsqueeze(-1)
    slack = 1e-6 * x.abs().amax(-1, keepdim=True) + 1e-37
    bound = 0.5 * scale if dtype is torch.int8 else torch.maximum(x.abs() / 16, scale * 2**-10)
    assert (found - x).abs().le(bound + slack).all()
    assert found.isfinite().all()


@given(rows, st.sampled_from(DTYPES))
def test_a_row_is_scaled_by_itself(array: object, dtype: torch.dtype) -> None:
    x = torch.as_tensor(array)
    whole = dequantize_rows(*quantize_rows(x, dtype), torch.float32).reshape(-1, x.shape[-1])
    for row, together in zip(x.reshape(-1, x.shape[-1]), whole, strict=True):
        alone = dequantize_rows(*quantize_rows(row, dtype), torch.float32)
        assert torch.equal(alone, together)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_and_broken_rows(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -448.0], [float("inf"), 1.0], [float("nan"), 1.0]])
    x = torch.cat((x, torch.full((1, 2), 1e-44)))  # a row whose scale would round to zero
    values, scales = quantize_rows(x, dtype)
    found = dequantize_rows(values, scales, torch.float32)
    assert torch.equal(found[0], torch.zeros(2)) and scales[0] == 1
    assert found[1, 1] == -448
    assert found[2:4].isnan().all(), "nothing hides what is broken"
    assert found[4].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_peak_takes_the_largest_value(dtype: torch.dtype) -> None:
    values, scales = quantize_rows(torch.tensor([[3.0, -6.0, 1e-9]]), dtype)
    assert values.float()[0, 1] == -LARGEST[dtype]
    torch.testing.assert_close(scales, torch.tensor([6.0 / LARGEST[dtype]]))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Directory of a family's checkpoint, written when first asked for."""
    root = tmp_path_factory.mktemp("numbers")
    return cache(lambda name: write_checkpoint(name, root / name))


@pytest.mark.parametrize("kv_dtype", MEAN_KL)
@pytest.mark.parametrize(("name", "tp"), [("llama-tied-gqa", 4), ("qwen3-norms", 2)])
def test_logits_stay_near(name: str, tp: int, kv_dtype: DType, checkpoint) -> None:
    directory: Path = checkpoint(name)
    draw = random.Random(3)
    prompt = [draw.randrange(331) for _ in range(40)]
    exact = prefill_logits(directory, 1, DType.FLOAT32, prompt).log_softmax(-1)
    found = prefill_logits(directory, tp, DType.FLOAT32, prompt, "auto", kv_dtype).log_softmax(-1)
    kl = float((exact.exp() * (exact - found)).sum(-1).mean())
    print(f"{name} tp={tp} {kv_dtype}: mean KL {kl:.6f} nats")
    assert 0 < kl < MEAN_KL[kv_dtype]
