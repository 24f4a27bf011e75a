"""The engine under pressure: many requests, little memory, ranks that fail. On 1 to 4 real ranks,
plain and overlapped."""

import pytest

from tests.cpu.ranks import rank_values, run_ranks

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


OPS = ("embed", "layers.0.attn.qkv", "layers.2.attn.core", "layers.5.mlp.down", "head")


def test_a_rank_without_memory_ends_exactly_the_rows_of_its_step(run_name: str) -> None:
    """In a crowd through a cache that is too small, with one step or two behind it on their way."""
    runs = [[2, 1], [3, 0]]
    arguments = {"runs": runs, "at_ops": OPS, "num_blocks": 12}
    values = rank_values(f"{PROGRAM}:fails_in_a_crowd", 2, run_name, arguments, timeout_s=90)
    for place, (_, rank) in enumerate(runs):
        assert values[rank][place]["broken"] == list(OPS)
        outputs = values[0][place]["outputs"]
        steps = [one["step"] for one in outputs if one["step"] is not None]
        assert len(set(steps)) == len(OPS) < len(steps)
        said = "rank 1: out of memory in " if rank else "out of memory in "
        for one in outputs:
            assert one["num_logprobs"] in (0, len(one["tokens"]))
            if one["step"] is None:
                assert (one["tokens"], one["error"]) == (one["alone"], None)
                assert one["reason"] in ("stop", "length")
            else:
                assert one["reason"] == "error" and one["error"].startswith(said)
                assert one["tokens"] == one["alone"][: len(one["tokens"])] != one["alone"]


@pytest.mark.parametrize(
    ("rank", "depth", "at_op"),
    [(1, 1, "sample.mass"), (1, 2, "sample.draw"), (1, 1, "sample"), (0, 1, "sample.mass"),
     (0, 3, "sample.mass"), (0, 2, "layers.1.mlp.reduce"), (1, 2, "layers.1.mlp.reduce")],
)  # fmt: skip
def test_a_rank_without_memory_where_nobody_can_go_on_says_so(
    run_name: str, rank: int, depth: int, at_op: str
) -> None:
    """In a collective, or behind the first of the sampler's, no rank can stand in for what is
    missing; what steps behind it on their way come to hides nothing."""
    arguments = {"failing_rank": rank, "at_op": at_op, "at_step": 3, "depth": depth}
    outcomes = run_ranks(f"{PROGRAM}:fails_locally", 2, run_name, arguments, timeout_s=60)
    assert not any(outcome.timed_out for outcome in outcomes)
    told = [outcome.error.splitlines()[-1] for outcome in outcomes if outcome.error]
    assert outcomes[rank].error.splitlines()[-1] == "MemoryError: no memory for this op"
    if rank:
        assert told[0].endswith("RankError: rank 1 failed: MemoryError: no memory for this op")
