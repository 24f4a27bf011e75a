"""Shard specs and partitions: every element has an owner, shares are even, replicas are counted."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.models import tiny
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import ConfigError
from tpinfer.sharding.parameters import decoder_parameters
from tpinfer.sharding.partition import cut_evenly, cut_in_units, partition_model
from tpinfer.sharding.spec import Cut, Segment, ShardSpec


@given(st.integers(1, 500), st.lists(st.floats(0.1, 10), min_size=1, max_size=9))
def test_cuts_adjoin_and_cover_everything(num_units: int, shares: list[float]) -> None:
    ranges = cut_evenly(num_units, shares)
    assert ranges[0][0] == 0 and ranges[-1][1] == num_units
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    if num_units >= len(shares):
        assert all(stop > start for start, stop in ranges)


@given(st.integers(1, 200), st.integers(1, 8))
def test_equal_shares_differ_by_at_most_one_unit(num_units: int, num_ranks: int) -> None:
    sizes = [stop - start for start, stop in cut_evenly(num_units, (1.0,) * num_ranks)]
    assert max(sizes) - min(sizes) <= 1


def test_nine_heads_on_two_ranks_share_a_kv_head() -> None:
    partition = partition_model(tiny(num_heads=9, num_kv_heads=3), 2)
    assert partition.heads == ((0, 5), (5, 9))
    assert partition.kv_heads == ((0, 2), (1, 3))
    assert partition.num_replicated_kv_heads() == 1
    assert [partition.head_offset(rank) for rank in range(2)] == [0, 2]


def test_eight_heads_on_three_ranks() -> None:
    partition = partition_model(tiny(), 3)
    assert partition.heads == ((0, 3), (3, 5), (5, 8))
    assert partition.kv_heads == ((0, 1), (0, 2), (1, 2))


def test_more_ranks_than_kv_heads_replicate_them() -> None:
    partition = partition_model(tiny(num_kv_heads=1), 8)
    assert partition.kv_heads == ((0, 1),) * 8
    assert partition.num_replicated_kv_heads() == 7


def test_shares_move_the_cuts() -> None:
    partition = partition_model(tiny(), 2, (3, 1))
    assert partition.heads == ((0, 6), (6, 8))
    assert partition.mlp == ((0, 88), (88, 112))


@pytest.mark.parametrize("size", [0, 9])
def test_too_many_ranks_are_refused_with_the_limit(size: int) -> None:
    with pytest.raises(ConfigError, match="between 1 and 8"):
        partition_model(tiny(), size)


def test_wrong_number_of_shares_is_refused() -> None:
    with pytest.raises(ConfigError, match="names 3 shares for tp=2"):
        partition_model(tiny(), 2, (1, 1, 1))


def test_small_dims_fall_back_to_smaller_units() -> None:
    ranges = cut_in_units(20, 16, (1.0,) * 4)
    assert ranges[-1][1] == 20 and all(stop > start for start, stop in ranges)


@given(
    st.integers(1, 8),
    st.sampled_from([(8, 2), (9, 3), (8, 1), (12, 4), (8, 8)]),
    st.booleans(),
)
def test_every_element_of_every_parameter_is_held(
    size: int, heads: tuple[int, int], tied: bool
) -> None:
    spec = tiny(
        num_heads=heads[0], num_kv_heads=heads[1], tie_embeddings=tied, qkv_bias=True, out_bias=True
    )
    partition = partition_model(spec, size)
    for parameter in decoder_parameters(spec, partition, DType.FLOAT32):
        cut = parameter.shard.cut_on("tp")
        if cut is None:
            continue
        for segment in cut.segments:
            held = {i for start, stop in segment.ranges for i in range(start, stop)}
            assert held == set(range(segment.size)), parameter.name
            if segment.name not in ("k", "v"):
                assert sum(stop - start for start, stop in segment.ranges) == segment.size


def test_pieces_of_a_fused_weight_are_packed_in_order() -> None:
    spec = tiny(num_heads=9, num_kv_heads=3)
    qkv = next(
        p
        for p in decoder_parameters(spec, partition_model(spec, 2), DType.FLOAT32)
        if "qkv" in p.name
    )
    pieces = qkv.shard.pieces(1)
    assert [(p.segment, p.source, p.local) for p in pieces] == [
        ("q", (40, 72), (0, 32)),
        ("k", (8, 24), (32, 48)),
        ("v", (8, 24), (48, 64)),
    ]
    assert qkv.shard.local_shape(1) == (64, 64)


def test_a_range_that_splits_a_unit_is_refused() -> None:
    segment = Segment("all", 16, ((0, 4), (4, 16)))
    with pytest.raises(ValueError, match="splits a unit of 8"):
        ShardSpec((16, 4), (Cut("tp", 0, 8, (segment,)),))


def test_segments_must_add_up_to_the_dim() -> None:
    with pytest.raises(ValueError, match="add up to 8"):
        ShardSpec((16,), (Cut("tp", 0, 1, (Segment("all", 8, ((0, 8),)),)),))


def test_copies_are_counted_per_element() -> None:
    assert Segment("k", 24, ((0, 16), (8, 24))).num_copies() == 2
    assert Segment("q", 24, ((0, 8), (8, 24))).num_copies() == 1
