"""How much KV cache fits: never more than there is, both numbers when nothing does, one size for
all ranks."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.pure.cost_cases import ledgers
from tests.pure.models import tiny
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import ConfigError
from tpinfer.costs.kv_capacity import MemoryRequest, plan_memory
from tpinfer.costs.ledger import CostLedger
from tpinfer.sharding.partition import partition_model


def ledger(tp: int = 1, rank: int = 0, **changes: object) -> CostLedger:
    spec = tiny(**changes)
    return CostLedger(spec, partition_model(spec, tp), rank, DType.FLOAT32, DType.FLOAT32)


def request(available_bytes: int, kv_bytes: int | None = None, **changes: int) -> MemoryRequest:
    values = {
        "block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 100,
    }  # fmt: skip
    return MemoryRequest(available_bytes, kv_bytes, **(values | changes))


requests = st.builds(
    MemoryRequest,
    available_bytes=st.integers(0, 1 << 22),
    kv_bytes=st.none() | st.integers(1, 1 << 20),
    block_size=st.integers(1, 32),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.integers(1, 128),
    max_model_len=st.integers(1, 256),
)


@given(ledgers(), requests)
def test_a_plan_fits_and_wastes_nothing(group: list[CostLedger], wish: MemoryRequest) -> None:
    one = group[0]
    activations = one.activation_bytes(wish.max_num_batched_tokens, wish.max_num_seqs)
    block = one.kv_bytes_per_token * wish.block_size
    room = wish.available_bytes - activations
    fits = room >= block and (wish.kv_bytes is None or block <= wish.kv_bytes <= room)
    if not fits:
        with pytest.raises(ConfigError):
            plan_memory(one, wish)
        return
    plan = plan_memory(one, wish)
    assert plan.weight_bytes == one.weight_bytes and plan.activation_bytes == activations
    assert plan.kv_bytes == plan.num_blocks * block
    assert plan.kv_bytes + activations <= wish.available_bytes
    assert plan.capacity_tokens == plan.num_blocks * wish.block_size
    if wish.kv_bytes is not None:
        assert wish.kv_bytes - block < plan.kv_bytes <= wish.kv_bytes
        return
    per_sequence = next(n for n in range(999) if n * wish.block_size >= wish.max_model_len)
    useful = per_sequence * wish.max_num_seqs
    assert plan.num_blocks == min(useful, room // block), "all that is useful, as far as it fits"


def test_asking_for_more_than_is_free_gives_both_numbers() -> None:
    one = ledger()
    free = 1_000_000 - one.activation_bytes(64, 4)
    with pytest.raises(ConfigError, match=rf"--kv-bytes 999999 exceeds the {free} bytes free"):
        plan_memory(one, request(1_000_000, 999_999))
    with pytest.raises(ConfigError, match=r"--kv-bytes 1 exceeds the 0 bytes free"):
        plan_memory(one, request(10, 1))


def test_no_room_for_a_block_gives_both_numbers() -> None:
    one = ledger()
    block = one.kv_bytes_per_token * 16
    room = one.activation_bytes(64, 4) + block
    assert plan_memory(one, request(room)).num_blocks == 1
    with pytest.raises(ConfigError, match=rf"takes {block} bytes, but {block - 1} are there"):
        plan_memory(one, request(room - 1))
    with pytest.raises(ConfigError, match=rf"takes {block} bytes, but 0 are .* more ranks"):
        plan_memory(one, request(0))
    with pytest.raises(ConfigError, match=rf"takes {block} bytes, but {block - 1} are there"):
        plan_memory(one, request(1 << 30, block - 1))


@given(ledgers(), st.integers(1, 64))
def test_ranks_agree_on_the_smallest(group: list[CostLedger], block_size: int) -> None:
    """Every rank then holds the same block numbers within its own bytes."""
    wish = request(1 << 24, None, block_size=block_size)
    plans = [plan_memory(one, wish) for one in group]
    agreed = min(plan.num_blocks for plan in plans)
    for one, plan in zip(group, plans, strict=True):
        same = plan.with_blocks(agreed)
        assert same.num_blocks == agreed and same.kv_bytes <= plan.kv_bytes
        assert same.kv_bytes == agreed * block_size * one.kv_bytes_per_token
        assert (same.weight_bytes, same.block_size) == (plan.weight_bytes, block_size)


@given(ledgers())
def test_replicated_bytes_are_those_that_another_rank_stores_too(group: list[CostLedger]) -> None:
    spec, partition = group[0].spec, group[0].partition
    held = [set(range(*heads)) for heads in partition.kv_heads]
    shared_anywhere = 0
    for one in group:
        others = set().union(*(h for rank, h in enumerate(held) if rank != one.rank))
        shared = len(held[one.rank] & others)
        per_head = 2 * spec.num_layers * spec.head_dim * one.kv_dtype.num_bytes
        plan = plan_memory(one, request(1 << 24))
        assert plan.replicated_kv_bytes_per_token == shared * per_head
        assert plan.replicated_kv_bytes_per_token <= plan.kv_bytes_per_token
        shared_anywhere += shared
    assert (shared_anywhere > 0) == (partition.num_replicated_kv_heads() > 0)


def test_a_cut_inside_a_group_of_heads_is_reported() -> None:
    plans = [
        plan_memory(ledger(3, rank, num_heads=9, num_kv_heads=3), request(1 << 24))
        for rank in range(3)
    ]
    assert [plan.replicated_kv_bytes_per_token for plan in plans] == [0, 0, 0]
    plans = [
        plan_memory(ledger(2, rank, num_heads=9, num_kv_heads=3), request(1 << 24))
        for rank in range(2)
    ]
    assert [plan.replicated_kv_bytes_per_token for plan in plans] == [2 * 2 * 8 * 4] * 2


@given(ledgers(), st.integers(1, 200), st.integers(1, 16))
def test_activations_grow_with_tokens_and_rows(
    group: list[CostLedger], num_tokens: int, num_rows: int
) -> None:
    one = group[-1]
    smaller = one.activation_bytes(num_tokens, num_rows)
    assert smaller < one.activation_bytes(num_tokens + 1, num_rows)
    assert smaller < one.activation_bytes(num_tokens, num_rows + 1)
    stream = num_tokens * one.spec.hidden_size * one.compute_dtype.num_bytes
    logits = num_rows * one.spec.vocab_size * 4
    assert smaller >= 2 * stream + logits


@given(requests)
def test_more_memory_never_gives_fewer_blocks(wish: MemoryRequest) -> None:
    one = ledger()
    assume(wish.kv_bytes is None)

    def blocks(available: int) -> int:
        try:
            return plan_memory(one, replace(wish, available_bytes=available)).num_blocks
        except ConfigError:
            return 0

    found = [blocks(wish.available_bytes + extra) for extra in (0, 5000, 100_000)]
    assert found == sorted(found)
