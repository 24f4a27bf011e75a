"""Times of ops in steps, fitted: what was made by the formula is found again, noise is weighed."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpinfer.config.dtypes import DType
from tpinfer.config.measured import OpTime
from tpinfer.machine.op_fit import OpPoint, fit_op_times

_LOADS = [(1, 1, 64), (8, 8, 64), (64, 64, 96), (4, 4, 512), (128, 1, 128), (512, 1, 512)]
"""(tokens, rows, context)."""


def points(kind: str, made: OpTime, noise: float = 0.0, seed: int = 0) -> list[OpPoint]:
    """An op of this kind in several steps, timed as `made` says, off by up to `noise`."""
    random_ = random.Random(seed)
    found = []
    for tokens, rows, context in _LOADS:
        for width in (1024, 4096) if kind == "linear" else (1024,):
            num_bytes = 2.0 * (width * 1024 + tokens * context * width)
            flops = 2.0 * tokens * width * (1024 if kind == "linear" else context)
            seconds = made.floor_s + made.row_s * rows
            seconds += num_bytes / made.bytes_per_s if made.bytes_per_s else 0.0
            rate = made.rates.get(tokens, made.flops_per_s)
            seconds += flops / rate if rate else 0.0
            seconds *= 1 + noise * random_.uniform(-1, 1)
            found.append(OpPoint(kind, tokens, rows, num_bytes, flops, seconds))
    return found


rates = st.floats(1e9, 1e13)
floors = st.floats(1e-7, 1e-3)


@given(floors, st.floats(1e-8, 1e-4), rates, rates)
def test_attention_pays_for_rows_bytes_and_operations(
    floor_s: float, row_s: float, bytes_per_s: float, flops_per_s: float
):
    made = OpTime("attention", DType.BFLOAT16, floor_s, row_s, bytes_per_s, flops_per_s)
    [found] = fit_op_times(points("attention", made), DType.BFLOAT16)
    assert found.error < 1e-6
    assert min(found.floor_s, found.row_s) >= 0


@given(floors, st.lists(rates, min_size=6, max_size=6))
def test_a_linear_has_a_rate_for_each_number_of_rows(floor_s: float, by_count: list[float]):
    counts = sorted({tokens for tokens, _, _ in _LOADS})
    made = OpTime("linear", DType.FLOAT32, floor_s, rates=dict(zip(counts, by_count, strict=False)))
    [found] = fit_op_times(points("linear", made), DType.FLOAT32)
    assert found.error < 1e-6
    assert list(found.rates) == counts


def test_what_costs_nothing_has_no_rate():
    made = OpTime("norm", DType.BFLOAT16, 5e-6)
    [found] = fit_op_times(points("norm", made), DType.BFLOAT16)
    assert found.floor_s == pytest.approx(5e-6, rel=1e-6)
    assert found.bytes_per_s is None or 1e9 / found.bytes_per_s < 1e-9


@given(st.integers(0, 1000))
def test_noise_shows_in_the_error_and_not_below_zero(seed: int):
    made = OpTime("attention", DType.BFLOAT16, 50e-6, 10e-6, 300e9, 64e9)
    [found] = fit_op_times(points("attention", made, 0.2, seed), DType.BFLOAT16)
    assert 0 <= found.error < 0.2
    assert found.floor_s >= 0 and found.row_s >= 0
    assert all(rate is None or rate > 0 for rate in (found.bytes_per_s, found.flops_per_s))


def test_kinds_are_fitted_apart_and_idle_ops_left_out():
    norm = points("norm", OpTime("norm", DType.BFLOAT16, 5e-6, bytes_per_s=1e9))
    rope = points("rope", OpTime("rope", DType.BFLOAT16, 9e-6, bytes_per_s=2e9))
    idle = [OpPoint("sample", 1, 0, 0.0, 0.0, 1e-6)]
    found = {op.kind: op for op in fit_op_times([*norm, *rope, *idle], DType.BFLOAT16)}
    assert set(found) == {"norm", "rope"}
    assert found["norm"].bytes_per_s == pytest.approx(1e9, rel=1e-6)
    assert found["rope"].floor_s == pytest.approx(9e-6, rel=1e-6)
