"""The engine under pressure: many requests, little memory, ranks that fail. On 1 to 4 real ranks,
plain and overlapped."""

import pytest

from tests.cpu.ranks import rank_values

pytestmark = pytest.mark.ranks
PROGRAM = "tests.cpu.engine_program"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_crowd_gets_what_each_would_get_alone(run_name: str, size: int) -> None:
    """Plain and overlapped; without and with host memory to move blocks to."""
    arguments = {"runs": [[1, 0], [2, 30]], "num_blocks": 14}
    found = rank_values(f"{PROGRAM}:crowd", size, run_name, arguments, timeout_s=400)[0]
    for tokens, stats in zip(found["together"], found["stats"], strict=True):
        assert tokens == found["alone"]
        assert stats["num_recomputed"] + stats["num_moved_out"] > 0, "the cache was not too small"
        assert stats["num_forked"] > 0 and stats["num_hit_tokens"] > 0


def test_a_shared_prefix_is_computed_once(run_name: str) -> None:
    found = rank_values(f"{PROGRAM}:shared_prefix", 2, run_name, timeout_s=60)[0]
    assert found["cached"] == [0] + [512] * 31
    # The first prompt whole, of the others what differs, and three decode steps of all.
    assert found["tokens"] == 521 + 31 * 9 + 32 * 3
    assert max(found["ttft_s"][1:]) < 20 * found["ttft_s"][0]


@pytest.mark.parametrize(
    ("size", "rank", "at_op"),
    [
        (1, 0, "layers.0.mlp.act"),
        (2, 1, "layers.0.mlp.act"),
        (2, 0, "layers.1.attn.qkv"),
        (3, 2, "embed"),
    ],
)
def test_a_rank_without_memory_ends_one_step_and_nothing_else(
    run_name: str, size: int, rank: int, at_op: str
) -> None:
    arguments = {"failing_rank": rank, "at_op": at_op, "at_step": 3}
    found = rank_values(f"{PROGRAM}:fails_locally", size, run_name, arguments, timeout_s=60)[0]
    assert found["reasons"] == ["error", "error"]
    assert all("memory" in error for error in found["errors"])
    assert found["num_events"] == 2 * 2 + 2, "two tokens each, then one end each"
    assert len(found["again"]) == 6 and found["last"] == "length"
