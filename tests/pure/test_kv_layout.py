"""The rule that says which rank holds a block: every block on one rank, under one local number."""

from hypothesis import given
from hypothesis import strategies as st

from tests.pure.models import tiny
from tpinfer.config.dtypes import DType
from tpinfer.config.engine import EngineConfig
from tpinfer.costs.choices import kv_layout_choice
from tpinfer.costs.kv_capacity import MemoryRequest, plan_memory
from tpinfer.costs.ledger import CostLedger
from tpinfer.sharding.kv_layout import KVLayout, block_class, owner
from tpinfer.sharding.partition import Partition, partition_model

GIB = 1 << 30


@given(st.integers(1, 9), st.integers(1, 200), st.integers(1, 32))
def test_every_block_has_one_place_and_number(
    group_size: int, num_blocks: int, block_size: int
) -> None:
    ranks = [KVLayout(block_size, num_blocks, group_size, place) for place in range(group_size)]
    seen = set()
    for block in range(num_blocks):
        (layout,) = (one for one in ranks if one.holds(block))
        assert layout.place == owner(block, group_size)
        assert 0 <= layout.local_block(block) < layout.num_local_blocks
        seen.add((layout.place, layout.local_block(block)))
    assert len(seen) == num_blocks
    for layout in ranks:
        assert layout.num_local_blocks == ranks[0].num_local_blocks
        assert layout.num_local_blocks * group_size < num_blocks + group_size
        assert (layout.spare_slot < layout.num_slots) == (group_size > 1)


@given(st.integers(1, 9), st.integers(0, 50), st.integers(0, 50))
def test_a_run_of_one_class_adjoins(group_size: int, block: int, logical: int) -> None:
    layout = KVLayout(16, 1000, group_size, owner(block, group_size))
    following = block + group_size
    assert layout.holds(following)
    assert layout.local_block(following) == layout.local_block(block) + 1
    holders = [
        place for place in range(group_size)
        if KVLayout(16, 1000, group_size, place).holds_logical(logical)
    ]  # fmt: skip
    assert holders == [block_class(logical, group_size)]


def partition(tp: int, num_heads: int, num_kv_heads: int, *shares: float) -> Partition:
    spec = tiny(num_heads=num_heads, num_kv_heads=num_kv_heads)
    return partition_model(spec, tp, shares or None, "auto")


def test_which_cuts_share_blocks_out() -> None:
    assert partition(8, 8, 1).kv_group_size == 8
    assert partition(8, 16, 2).kv_group_size == 4
    assert partition(4, 6, 2).kv_group_size == 2  # two and one query heads of three
    assert partition(2, 8, 2).kv_group_size == 1  # a head each
    assert partition(3, 8, 2).kv_group_size == 1  # the middle rank reads both
    assert partition(1, 8, 1).kv_group_size == 1
    assert partition(4, 8, 2, 3, 1, 3, 1).kv_group_size == 2  # uneven, but within a head
    assert partition(4, 8, 2, 3, 3, 1, 1).kv_group_size == 1
    spec = tiny(num_heads=8, num_kv_heads=1)
    assert partition_model(spec, 8, None, "replicated").kv_group_size == 1


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_groups_cover_the_ranks(num_kv_heads: int, per_head: int, group: int) -> None:
    tp = num_kv_heads * per_head
    cut = partition(tp, num_kv_heads * group * per_head, num_kv_heads)
    assert cut.kv_group_size == per_head
    for rank in range(tp):
        ranks = cut.kv_ranks(rank)
        assert rank in ranks and len(ranks) == per_head
        assert ranks[cut.kv_place(rank)] == rank
        assert {cut.kv_heads[other] for other in ranks} == {cut.kv_heads[rank]}
        assert sum(map(cut.num_heads, ranks)) == cut.group_size
        assert cut.widest_heads(rank) >= cut.num_heads(rank)


def capacity(tp: int, kv_layout: str, **wish: int) -> tuple[int, int]:
    """(tokens, bytes of second copies a token) of the whole cache at a rank's 1 GiB."""
    spec = tiny(num_heads=16, num_kv_heads=2, head_dim=8)
    cut = partition_model(spec, tp, None, kv_layout)  # pyright: ignore[reportArgumentType]
    found = set()
    for rank in range(tp):
        ledger = CostLedger(spec, cut, rank, DType.FLOAT32, DType.FLOAT32)
        request = MemoryRequest(2 * GIB, GIB, 16, 4, 64, 100, **wish)
        plan = plan_memory(ledger, request)
        assert plan.kv_bytes <= GIB
        found.add((plan.capacity_tokens, plan.replicated_kv_bytes_per_token))
    (same,) = found
    return same


def test_capacity_grows_with_every_rank() -> None:
    """8 ranks on 2 KV heads hold 4 times the tokens of 2 ranks at the same bytes per rank."""
    two, _ = capacity(2, "auto")
    assert capacity(8, "auto") == (4 * two, 0)
    assert capacity(4, "auto") == (2 * two, 0)
    replicated, copied = capacity(8, "replicated")
    assert replicated == two and copied > 0


def test_host_blocks_count_like_blocks() -> None:
    spec = tiny(num_heads=8, num_kv_heads=2)
    request = MemoryRequest(GIB, 1 << 20, 16, 4, 64, 100, host_bytes=1 << 20)
    for tp in (2, 4):
        cut = partition_model(spec, tp, None, "auto")
        plan = plan_memory(CostLedger(spec, cut, 0, DType.FLOAT32, DType.FLOAT32), request)
        assert plan.num_host_blocks == plan.num_blocks
        assert plan.room(100).endswith(f"; {plan.capacity_tokens} more in host memory")


def test_room_is_told_in_requests() -> None:
    spec = tiny(num_heads=8, num_kv_heads=2)
    cut = partition_model(spec, 1)
    ledger = CostLedger(spec, cut, 0, DType.FLOAT32, DType.FLOAT32)
    plan = plan_memory(ledger, MemoryRequest(GIB, None, 16, 4, 64, 100)).with_blocks(14)
    assert plan.num_requests(100) == 2  # seven blocks each
    assert plan.room(100) == "224 tokens of KV cache: room for 2 requests of 100 tokens"
    assert plan.room(224) == "224 tokens of KV cache: room for 1 request of 224 tokens"


def reason(tp: int, num_kv_heads: int, *shares: float, asked: str = "auto") -> tuple[str, str]:
    spec = tiny(num_heads=8, num_kv_heads=num_kv_heads)
    cut = partition_model(spec, tp, shares or None, asked)  # pyright: ignore[reportArgumentType]
    config = EngineConfig(model_dir=".", kv_layout=asked)  # pyright: ignore[reportArgumentType]
    choice = kv_layout_choice(config, spec, cut)
    return choice.value, choice.reason


def test_the_choice_says_why() -> None:
    assert reason(2, 2) == ("own heads per rank", "2 KV heads on 2 ranks")
    value, why = reason(4, 2)
    assert value == "blocks shared out over 2 ranks a head" and "no key is stored twice" in why
    assert reason(4, 2, asked="replicated") == ("replicated", "asked for")
    value, why = reason(3, 2)
    assert value == "replicated" and "3 ranks are no multiple of 2 KV heads" in why
    value, why = reason(4, 2, 3, 3, 1, 1)
    assert value == "replicated" and why.startswith("uneven shares")
