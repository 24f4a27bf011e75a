"""The table of where the time went: a golden, its width, its sums, and what its notes claim."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.golden import check_golden
from tests.pure.made_up_reports import MEMORY, attribution, report, with_levels
from tests.pure.recorded_runs import CEILINGS
from tpinfer.cli.attribution_table import render_run
from tpinfer.config.ceilings import MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.costs.leaves import LEAVES
from tpinfer.engine.run_report import RunReport

TTFT = (
    {"compute": 20_000_000, "memory": 30_000_000, "comm_wait": 40_000_000,
     "comm_transfer": 9_123_456, "latency": 17_114_000, "host": 1_539_000, "queue": 290_000},
    {"compute": 21_000_000, "memory": 31_000_000, "comm_transfer": 49_000_000,
     "unmodelled": 4_548_000, "host_tail": 12_228_456, "queue": 290_000},
)  # fmt: skip
DECODE = (
    {"memory": 880_000_000, "comm_wait": 300_000_000, "comm_transfer": 100_000_000},
    {"memory": 1_180_000_000, "comm_transfer": 100_000_000},
)


def two_ranks() -> RunReport:
    """Rank 1 is late while decoding: 3 of 4 parts of the communication are waiting for it."""
    tight = replace(MEMORY, replicated_kv_bytes_per_token=1536)
    return report(
        attribution(
            *TTFT, caused=(0, 40_000_000), warning="2 steps are not on every rank's record"
        ),
        attribution(*DECODE, caused=(0, 300_000_000)),
        100,
        memory=(MEMORY, tight),
        num_requests=3,
    )


def test_golden_of_two_ranks(tmp_path: Path) -> None:
    check_golden("attribution_table.txt", render_run(two_ranks()) + "\n", tmp_path)


def test_golden_of_one_rank_and_one_token(tmp_path: Path) -> None:
    found = report(attribution({"memory": 3_000_000, "idle_unexplained": 1_000_000}))
    check_golden("attribution_table_one_rank.txt", render_run(found) + "\n", tmp_path)


def test_nobody_got_a_token() -> None:
    assert "nobody got a token" in render_run(report(None))


leaves = st.dictionaries(st.sampled_from(LEAVES), st.integers(1, 10**11), min_size=1)
"""Up to half an hour in all."""


@given(st.lists(leaves, min_size=1, max_size=4), st.integers(1, 10**6), st.integers(1, 9))
def test_the_table_keeps_to_100_columns(
    ranks: list[dict[str, int]], num_tokens: int, num_requests: int
) -> None:
    found = report(
        attribution(*ranks, warning="a word " * 40),
        attribution(*ranks),
        num_tokens,
        memory=(replace(MEMORY, replicated_kv_bytes_per_token=3072),),
        num_requests=num_requests,
    )
    lines = render_run(found).splitlines()
    assert max(len(line) for line in lines) <= 100
    assert sum(line.lstrip().startswith("rank ") for line in lines) == 2 * len(ranks)


@given(leaves, st.integers(1, 1000))
def test_cells_are_the_exact_times_divided(leaves: dict[str, int], count: int) -> None:
    """Read back from the text: no number is off by more than its last digit, and none touches its
    neighbour."""
    found = report(attribution({"host": 1}), attribution(leaves), count)
    row = render_run(found).splitlines()[6]
    split = attribution(leaves).ranks[0]
    wall, *cells = re.sub(r"^ *rank 0", "", row).replace(" - ", " - -% ").split()
    assert close(wall, split.wall_ns / count)
    spent = [ns for ns in split.rollup.values() if ns]
    numbers = [cell for cell in cells if cell not in ("-", "-%")]
    assert len(numbers) == 2 * len(spent)
    for shown, share, ns in zip(numbers[::2], numbers[1::2], spent, strict=True):
        assert close(shown, ns / count)
        assert abs(float(share.removesuffix("%")) - 100 * ns / split.wall_ns) <= 0.51


def close(text: str, spent_ns: float) -> bool:
    assert re.fullmatch(r"\d+(\.\d+)?", text), text
    return abs(float(text) - spent_ns / 1e6) <= max(0.00051, spent_ns / 1e6 * 0.006)


@pytest.mark.parametrize(
    ("spent_ns", "text"),
    [
        (1, "0.000"),
        (1_234_567, "1.235"),
        (99_999_600, "100.000"),
        (123_456_789, "123"),
        (999_400_000, "999"),
        (999_600_000, "999.6"),
        (12_345_678_901, "12345.7"),
        (123_456_789_012, "123457"),
    ],
)
def test_times_have_no_exponent(spent_ns: int, text: str) -> None:
    row = render_run(report(attribution({"compute": spent_ns}))).splitlines()[4]
    assert row.split() == ["rank", "0", text, text, "100%", "-", "-", "-", "-", "-"]


def notes(found: RunReport) -> str:
    """What is written below the rows, on one line."""
    lines = render_run(found).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Judged against"))
    return " ".join(line.strip() for line in lines[start:])


def test_a_model_that_fits_a_cache_is_judged_by_that_cache() -> None:
    text = notes(report(attribution({"memory": 1}), working_set_bytes=40_000))
    assert "Judged against L3: weights and KV of a step take 40 kB a rank, which fits its 65.5 kB."\
        in text  # fmt: skip
    assert "L3 100 GB/s" in text


def test_a_model_that_no_cache_holds_is_judged_by_memory() -> None:
    text = notes(report(attribution({"memory": 1}), working_set_bytes=70_000))
    assert "Judged against DRAM: weights and KV of a step take 70 kB a rank" in text
    assert "which no cache holds (L3: 65.5 kB)" in text
    assert "DRAM 10 GB/s" in text


def test_memory_without_a_known_cache() -> None:
    ceilings = with_levels(MemoryLevel("HBM", 80_000_000_000, 3e12))
    text = notes(report(attribution({"memory": 1}), ceilings=ceilings, working_set_bytes=10**9))
    assert "Judged against HBM: weights and KV of a step take 1 GB a rank, which fits its 80 GB"\
        in text  # fmt: skip


def test_the_origin_and_the_rate_that_was_judged_by() -> None:
    ceilings = replace(CEILINGS, flops_per_s={DType.FLOAT32: 5e10, DType.INT8: 9e12})
    text = notes(report(attribution({"compute": 1}), ceilings=ceilings, dtype=DType.BFLOAT16))
    assert "Ceilings (made up)" in text and "bfloat16 50 GFLOPS" in text
    assert "an op takes at least 0.2 us." in text


def test_a_late_rank_is_named_with_its_share() -> None:
    text = notes(two_ranks())
    assert "Communication while decoding: 60% waiting for a later rank" in text
    assert "100% of it for rank 1; 40% transfer" in text
    prompt = notes(report(attribution(*TTFT, caused=(10_000_000, 30_000_000))))
    assert "Communication during the prompt: 41% waiting" in prompt
    assert "75% of it for rank 1; 59% transfer" in prompt


def test_communication_that_could_not_be_split_says_so() -> None:
    text = notes(report(attribution({"comm_unsplit": 5}, {"comm_unsplit": 5})))
    assert "Communication could not be split" in text
    assert "Communication" not in notes(report(attribution({"memory": 5})))


def test_second_copies_of_kv_heads_are_told() -> None:
    none = notes(report(attribution({"memory": 1}), memory=(MEMORY,) * 2))
    assert "second copy" not in none
    third = replace(MEMORY, kv_bytes_per_token=9216, replicated_kv_bytes_per_token=3072)
    half = replace(MEMORY, replicated_kv_bytes_per_token=1536)
    text = notes(report(attribution({"memory": 1}), memory=(third, half)))
    assert "50% of a rank's KV is a second copy" in text
    assert "32768 tokens" in text


def test_warnings_come_last() -> None:
    last = render_run(two_ranks()).splitlines()[-1]
    assert last == "Warning: 2 steps are not on every rank's record"
