"""The attribution must move when the cause moves: a rank that is slowed on purpose shows as waiting
on the others, with that rank named, on real ranks and without a profiler."""

import re
from typing import Any

import pytest

from tests.cpu.ranks import rank_values
from tests.cpu.slow_rank_program import NUM_TOKENS
from tests.cpu.tpinfer_command import user_environment

pytestmark = pytest.mark.ranks
DELAY_MS = 3.0
STEPS = NUM_TOKENS  # the prompt is one, and brings the first token


def run(run_name: str, size: int, slow_rank: int, op_endings: list[str]) -> list[Any]:
    """What the ranks returned. Our own ring: DeepSpeed's op would hold the core it waits on."""
    wanted = {"slow_rank": slow_rank, "delay_ms": DELAY_MS, "op_endings": op_endings}
    cache = {"XDG_CACHE_HOME": user_environment()["XDG_CACHE_HOME"]}
    target = "tests.cpu.slow_rank_program:generate_slowly"
    return rank_values(target, size, run_name, wanted, timeout_s=60, variables=cache)


def assert_sums(attribution: dict[str, Any], size: int) -> None:
    for part in (attribution, attribution["ttft"], attribution["decode"]):
        assert [split["rank"] for split in part["ranks"]] == list(range(size))
        for split in part["ranks"]:
            assert sum(split["leaves"].values()) == split["wall_ns"] == part["wall_ns"]
            assert sum(split["rollup"].values()) == split["wall_ns"]
            assert min(split["leaves"].values()) >= 0 and split["caused_wait_ns"] >= 0


@pytest.mark.parametrize(("size", "slow_rank"), [(2, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("op_ending", ["layers.3.mlp.gate_up", "layers.0.attn.norm"])
def test_a_slow_rank_is_named_and_the_others_wait(
    run_name: str, size: int, slow_rank: int, op_ending: str
) -> None:
    found = run(run_name, size, slow_rank, [op_ending])
    attribution, slept = found[0]["attribution"], found[slow_rank]
    slept = slept["slept"] if slow_rank == 0 else slept
    assert slept == STEPS, "the op to be slowed is in every step once"
    assert_sums(attribution, size)
    added_ns = slept * DELAY_MS * 1e6
    waits = [split["leaves"].get("comm_wait", 0) for split in attribution["ranks"]]
    caused = [split["caused_wait_ns"] for split in attribution["ranks"]]
    for rank in range(size):
        if rank == slow_rank:
            assert caused[rank] == max(caused) > added_ns * (size - 1) / 2
        else:
            assert waits[rank] > added_ns / 2, f"rank {rank} hardly waited: {waits}"
            assert waits[rank] > waits[slow_rank]
    match = re.search(r"waiting for a later rank, (\d+)% of it for rank (\d)", found[0]["table"])
    assert match is not None and int(match[2]) == slow_rank and int(match[1]) > 100 / size


def test_time_lost_between_ops_of_one_rank_is_not_called_communication(run_name: str) -> None:
    """Alone, a rank that dawdles has nobody who waits: the time is its own op's."""
    (found,) = run(run_name, 1, 0, ["layers.3.mlp.gate_up"])
    assert_sums(found["attribution"], 1)
    assert found["attribution"]["rollup"]["communication"] == 0
    assert found["attribution"]["wall_ns"] > STEPS * DELAY_MS * 1e6
    assert "waiting for a later rank" not in found["table"]
