"""The attribution must move when the cause moves: a rank that is slowed on purpose shows as waiting
on the others, with that rank named, on real ranks and without a profiler."""

import re
from typing import Any

import pytest

from tests.cpu.ranks import rank_values
from tests.cpu.slow_rank_program import NUM_TOKENS
from tests.cpu.tpinfer_command import user_environment

pytestmark = pytest.mark.ranks
DELAY_MS = 40.0
"""Long beside what a busy machine delays any rank by."""
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


def what_is_wrong(found: list[Any], slow_rank: int) -> str:
    """In which way the run does not show that `slow_rank` held up the others; empty if it does."""
    size, attribution = len(found), found[0]["attribution"]
    added_ns = STEPS * DELAY_MS * 1e6
    waits = [split["leaves"].get("comm_wait", 0) for split in attribution["ranks"]]
    caused = [split["caused_wait_ns"] for split in attribution["ranks"]]
    others = [rank for rank in range(size) if rank != slow_rank]
    shown = f"waits {waits}, caused {caused}"
    if any(waits[rank] < max(added_ns / 2, waits[slow_rank]) for rank in others):
        return f"the others hardly waited: {shown}"
    if caused[slow_rank] < max(added_ns * (size - 1) / 2, *(caused[rank] for rank in others)):
        return f"not put down to rank {slow_rank}: {shown}"
    named = re.search(r"waiting for a later rank, (\d+)% of it for rank (\d)", found[0]["table"])
    if named is None or int(named[2]) != slow_rank:
        return f"the table does not name rank {slow_rank}:\n{found[0]['table']}"
    return ""


@pytest.mark.parametrize(("size", "slow_rank"), [(2, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("op_ending", ["layers.3.mlp.gate_up", "layers.0.attn.norm"])
def test_a_slow_rank_is_named_and_the_others_wait(
    run_name: str, size: int, slow_rank: int, op_ending: str
) -> None:
    wrong = "it was never run"
    for attempt in range(3):  # other processes slow ranks down too, but not the same one each time
        found = run(f"{run_name}-{attempt}", size, slow_rank, [op_ending])
        slept = found[slow_rank]
        slept = slept["slept"] if slow_rank == 0 else slept
        assert slept == STEPS, "the op to be slowed is in every step once"
        assert_sums(found[0]["attribution"], size)
        wrong = what_is_wrong(found, slow_rank)
        if not wrong:
            return
    raise AssertionError(wrong)


def test_time_lost_between_ops_of_one_rank_is_not_called_communication(run_name: str) -> None:
    """Alone, a rank that dawdles has nobody who waits: the time is its own op's."""
    (found,) = run(run_name, 1, 0, ["layers.3.mlp.gate_up"])
    assert_sums(found["attribution"], 1)
    assert found["attribution"]["rollup"]["communication"] == 0
    assert found["attribution"]["wall_ns"] > STEPS * DELAY_MS * 1e6
    assert "waiting for a later rank" not in found["table"]
