"""What Nsight Compute's table says of kernels, op by op."""

import pytest
from gpu.ncu_bounds import DRAM_PCT, SM_PCT, TIME, bound_by_counters, bounds, op_in
from gpu.ncu_bytes import compared, kernels_of

HEAD = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


def table(*kernels: tuple[str, float, float, float]) -> str:
    """(name, us, DRAM %, SM %) of each, as `ncu --csv` prints them behind a program's own lines."""
    lines = ["RESULT {}", "==PROF== Connected", HEAD]
    for number, (name, us, dram, sm) in enumerate(kernels):
        for metric, value in (
            (TIME, f"{us * 1e3:,.0f}"), (DRAM_PCT, f"{dram}"), (SM_PCT, f"{sm}"),
            ("dram__bytes_read.sum", "2,000,000"), ("dram__bytes_write.sum", "0"),
        ):  # fmt: skip
            lines.append(f'"{number}","7","{name}","{metric}","x","{value}"')
    return "\n".join(lines)


def test_kernels_carry_the_op_that_a_range_names() -> None:
    kernels = kernels_of(table(("tpinfer.op layers.0.mlp.down", 1234.5, 88, 20), ("fill", 3, 1, 2)))
    assert [one["op"] for one in kernels] == ["layers.0.mlp.down", ""]
    assert kernels[0][TIME] == 1_234_500 and kernels[0][DRAM_PCT] == 88
    assert op_in(["void k()", "tpinfer.step id=3 tokens=1", "x tpinfer.op head y"]) == "head"


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ([(10, 85, 30)], "memory"),
        ([(10, 30, 85)], "compute"),
        ([(3, 12, 9)], "latency"),
        ([(90, 80, 20), (10, 5, 95)], "memory"),
        ([(10, 80, 20), (90, 5, 95)], "compute"),
    ],
)
def test_the_larger_share_of_a_peak_bounds(kernels: list[tuple], expected: str) -> None:
    made = [{TIME: us, DRAM_PCT: dram, SM_PCT: sm} for us, dram, sm in kernels]
    assert bound_by_counters(made) == expected


def test_agreement_is_weighted_by_time() -> None:
    kernels = kernels_of(
        table(
            ("tpinfer.op layers.0.mlp.down", 60, 88, 20),
            ("tpinfer.op layers.0.mlp.down", 20, 70, 20),
            ("tpinfer.op layers.0.attn.core", 15, 20, 80),
            ("tpinfer.op layers.0.attn.norm", 5, 3, 3),
            ("fill", 900, 90, 3),
        )
    )
    ledger = {
        "layers.0.mlp.down": "memory", "layers.0.attn.core": "memory",
        "layers.0.attn.norm": "latency", "head": "memory",
    }  # fmt: skip
    found = bounds(kernels, ledger)
    assert found["agree"] == pytest.approx(0.85) and found["us"] == pytest.approx(100)
    assert found["ops"]["layers.0.attn.core"] == {
        "counters": "compute", "ledger": "memory", "us": 15,
    }  # fmt: skip
    assert bounds([], ledger)["agree"] is None
    ops = compared({"layers.0.mlp.down": 2e6, "head": 1e3}, kernels[:1])
    assert ops["layers.0.mlp.down"]["dram"] == 2e6
