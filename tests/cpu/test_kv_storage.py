"""Addresses and copies of the paged cache: which positions a rank finds where, and blocks moved
whole, to other blocks and to host memory and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpinfer.attention.host_tier import HostTier
from tpinfer.attention.paged_kv import BlockTable, PagedKV, key_range
from tpinfer.config.dtypes import DType
from tpinfer.config.kv_cache import kv_vector_bytes
from tpinfer.sharding.kv_layout import KVLayout, block_class

CPU = torch.device("cpu")
NUM_LAYERS, HEADS, HEAD_DIM, BLOCK, NUM_BLOCKS = 2, 2, 8, 4, 12
DTYPES = [DType.FLOAT32, DType.BFLOAT16, DType.INT8, DType.FLOAT8_E4M3]


@st.composite
def tables(draw: st.DrawFn) -> tuple[BlockTable, int, int]:
    """(table with dropped blocks, group size, positions it has room for)."""
    group_size = draw(st.sampled_from([1, 2, 3, 4]))
    per_class = draw(st.integers(1, 6))
    count = draw(st.integers(1, per_class * group_size))
    free = [
        draw(st.permutations(range(place, per_class * group_size, group_size)))
        for place in range(group_size)
    ]
    blocks = [free[block_class(j, group_size)][j // group_size] for j in range(count)]
    table = BlockTable(blocks)
    table.drop(draw(st.integers(0, count - 1)))
    return table, group_size, count * BLOCK


@given(tables(), st.data())
def test_each_position_is_found_on_one_rank_where_it_was_written(
    case: tuple[BlockTable, int, int], draws: st.DataObject
) -> None:
    table, group_size, room = case
    start = draws.draw(st.integers(table.num_dropped * BLOCK, room - 1))
    stop = draws.draw(st.integers(start + 1, room))
    found: list[int] = []
    for place in range(group_size):
        layout = KVLayout(BLOCK, 24, group_size, place)
        slots = table.slots(start, stop, layout)
        assert len(slots) == stop - start
        keys = key_range(table, start, stop, layout)
        positions = keys.positions(CPU).tolist()
        read = [slot for first, count in keys.runs for slot in range(first, first + count)]
        assert keys.num_keys == len(read) == len(positions)
        written = [slot for slot in slots if group_size == 1 or slot != layout.spare_slot]
        assert read == written, "read in the order of positions"
        assert all(0 <= slot < layout.num_local_blocks * BLOCK for slot in read)
        assert all(
            first + count != following
            for (first, count), (following, _) in zip(keys.runs, keys.runs[1:], strict=False)
        ), "runs are as long as they can be"
        found += positions
    assert sorted(found) == list(range(start, stop))


def test_blocks_a_group_apart_are_one_run() -> None:
    table = BlockTable([4, 5, 6, 7, 8, 9, 10])
    for place, runs in ((0, ((8, 14),)), (1, ((8, 12),))):
        assert key_range(table, 2, 28, KVLayout(BLOCK, 12, 2, place)).runs == tuple(
            (first + (2 if place == 0 else 0), count) for first, count in runs
        )


def caches(dtype: DType, group_size: int) -> list[PagedKV]:
    """One per rank of a group, filled with random values."""
    made = []
    for place in range(group_size):
        layout = KVLayout(BLOCK, NUM_BLOCKS, group_size, place)
        kv = PagedKV(NUM_LAYERS, HEADS, HEAD_DIM, layout, dtype, CPU)
        torch.manual_seed(place)
        slots = torch.arange(layout.num_slots)
        for index in range(NUM_LAYERS):
            kv.layer(index).write(slots, torch.randn(len(slots), 2, HEADS, HEAD_DIM))
        made.append(kv)
    return made


def block(ranks: list[PagedKV], number: int) -> list[torch.Tensor]:
    """What the rank that holds a block has in it."""
    (kv,) = (one for one in ranks if one.layout.holds(number))
    local = kv.layout.local_block(number)
    return [kv.as_blocks(tensor)[:, :, :, local].clone() for tensor in kv.tensors()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [1, 3])
def test_copies_take_whole_blocks_and_read_before_they_write(dtype: DType, group_size: int) -> None:
    ranks = caches(dtype, group_size)
    before = [block(ranks, number) for number in range(NUM_BLOCKS)]
    spare = [kv.values_L2KSD[:, :, :, kv.layout.spare_slot :].clone() for kv in ranks]
    pairs = [(0, 3), (3, 6), (4, 10), (2, 11)]
    for kv in ranks:
        kv.copy_blocks(pairs)
        kv.copy_blocks([])
    came_from = {to: source for source, to in pairs}
    for number in range(NUM_BLOCKS):
        assert same(block(ranks, number), before[came_from.get(number, number)]), number
    for kv, kept in zip(ranks, spare, strict=True):
        assert torch.equal(kv.values_L2KSD[:, :, :, kv.layout.spare_slot :], kept)


def test_a_block_never_changes_its_rank() -> None:
    (first, *_) = caches(DType.FLOAT32, 3)
    with pytest.raises(AssertionError, match="blocks 0 and 4 lie on different ranks"):
        first.copy_blocks([(0, 4)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [1, 2])
def test_blocks_come_back_from_the_host_as_they_were(dtype: DType, group_size: int) -> None:
    ranks = caches(dtype, group_size)
    hosts = [HostTier(kv, 6) for kv in ranks]
    before = [block(ranks, number) for number in range(NUM_BLOCKS)]
    saved = [(7, 1), (2, 4), (9, 5)]
    for kv, host in zip(ranks, hosts, strict=True):
        host.save(saved)
        for tensor in kv.tensors():
            tensor.zero_()
        host.fetch([(1, 3), (4, 8), (5, 9)])
    for number, source in ((3, 7), (8, 2), (9, 9)):
        assert same(block(ranks, number), before[source])
    untouched = block(ranks, 0)
    assert not any(tensor.any() for tensor in untouched)
    vector = kv_vector_bytes(HEAD_DIM, dtype)
    local_blocks = 6 // group_size
    assert hosts[0].num_bytes == local_blocks * BLOCK * NUM_LAYERS * 2 * HEADS * vector


def test_a_written_cache_takes_the_bytes_that_are_counted() -> None:
    for dtype in DTYPES:
        (kv,) = caches(dtype, 1)
        slots = kv.layout.num_slots
        counted = slots * NUM_LAYERS * 2 * HEADS * kv_vector_bytes(HEAD_DIM, dtype)
        assert sum(tensor.nbytes for tensor in kv.tensors()) == counted
