"""Which ceiling an op is judged by, and the least time of a collective."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.costs.bound import classify
from tpinfer.costs.collective import collective_floor_s
from tpinfer.costs.ops import OpCost, OpKind

DRAM = MemoryLevel("DRAM", 1 << 34, 10e9)
CEILINGS = Ceilings(
    memory=(MemoryLevel("L3", 1 << 23, 100e9), DRAM),
    flops_per_s={DType.FLOAT32: 100e9, DType.INT8: 50e9},
    kernel_floor_s=2e-6,
    collective_latency_s=5e-6,
    collective_bytes_per_s=1e9,
    origin="made up",
)
"""10 FLOPs a byte is where the DRAM roof meets the arithmetic one."""


def cost(flops: int = 0, num_bytes: int = 0, sent: int = 0) -> OpCost:
    return OpCost(flops, num_bytes - num_bytes // 3, num_bytes // 3, sent)


@pytest.mark.parametrize(
    ("flops", "num_bytes", "leaf", "floor_ns"),
    [
        (10_000_000, 100_000, "compute", 100_000),
        (100_000, 1_000_000, "memory", 100_000),
        (1_000_000, 100_000, "compute", 10_000),  # a tie is compute's
        (1_000_000, 100_001, "memory", 10_000),
        (0, 0, "latency", 2000),
        (199_999, 19_999, "latency", 2000),  # just below the floor
        (200_000, 0, "compute", 2000),  # just at it
        (0, 20_000, "memory", 2000),
    ],
)
def test_the_nearest_ceiling(flops: int, num_bytes: int, leaf: str, floor_ns: int) -> None:
    found = classify(OpKind.LINEAR, cost(flops, num_bytes), DType.FLOAT32, DRAM, CEILINGS)
    assert (found.leaf, found.floor_ns) == (leaf, floor_ns)


def test_the_level_that_the_working_set_fits_decides() -> None:
    work = cost(500_000, 1_000_000)
    leaves = [
        classify(OpKind.LINEAR, work, DType.FLOAT32, CEILINGS.memory_level(size), CEILINGS)
        for size in (1 << 20, 1 << 30)
    ]
    assert [(bound.leaf, bound.floor_ns) for bound in leaves] == [
        ("memory", 10_000),
        ("memory", 100_000),
    ]


@pytest.mark.parametrize(
    ("dtype", "rates", "expected_ns"),
    [
        (DType.INT8, {DType.FLOAT32: 100e9, DType.INT8: 50e9}, 20_000),
        (DType.BFLOAT16, {DType.FLOAT32: 100e9, DType.INT8: 50e9}, 10_000),
        (DType.BFLOAT16, {DType.FLOAT16: 25e9, DType.INT8: 50e9}, 40_000),
    ],
)
def test_a_dtype_without_a_rate_takes_float32s_else_the_lowest(
    dtype: DType, rates: dict[DType, float], expected_ns: int
) -> None:
    ceilings = replace(CEILINGS, flops_per_s=rates)
    found = classify(OpKind.LINEAR, cost(1_000_000), dtype, DRAM, ceilings)
    assert (found.leaf, found.floor_ns) == ("compute", expected_ns)


@pytest.mark.parametrize("kind", OpKind)
def test_collectives_and_only_they_are_transfer(kind: OpKind) -> None:
    found = classify(kind, cost(10**9, 10**9, 1000), DType.FLOAT32, DRAM, CEILINGS)
    assert (found.leaf == "comm_transfer") == (
        kind in (OpKind.REDUCE, OpKind.GATHER, OpKind.EXCHANGE)
    )
    if kind.is_collective:
        assert found.floor_ns == 5000 + 1000, "one latency and a microsecond a kilobyte"


def test_a_collective_takes_a_latency_and_its_bytes() -> None:
    assert collective_floor_s(0, CEILINGS) == 0, "with nothing to send it does not take place"
    assert collective_floor_s(1, CEILINGS) == pytest.approx(5e-6 + 1e-9)
    assert collective_floor_s(10**9, CEILINGS) == pytest.approx(1 + 5e-6)
    alone = replace(CEILINGS, collective_latency_s=0.0, collective_bytes_per_s=float("inf"))
    assert collective_floor_s(10**9, alone) == 0


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.floats(1.01, 50), st.booleans())
def test_a_faster_machine_never_needs_longer(
    flops: int, num_bytes: int, factor: float, is_memory: bool
) -> None:
    """And the floor is the roof: no less than either ceiling or the least time of an op."""
    level, ceilings = DRAM, CEILINGS
    slow = classify(OpKind.LINEAR, cost(flops, num_bytes), DType.FLOAT32, level, ceilings)
    if is_memory:
        level = replace(DRAM, bytes_per_s=DRAM.bytes_per_s * factor)
    else:
        ceilings = replace(CEILINGS, flops_per_s={DType.FLOAT32: 100e9 * factor})
    fast = classify(OpKind.LINEAR, cost(flops, num_bytes), DType.FLOAT32, level, ceilings)
    assert fast.floor_ns <= slow.floor_ns
    roof_ns = max(flops / 100e9, num_bytes / 10e9, 2e-6) * 1e9
    assert abs(slow.floor_ns - roof_ns) <= 0.5 + roof_ns * 1e-12
