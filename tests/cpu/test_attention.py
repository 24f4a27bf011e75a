"""Paged attention against plain softmax attention in float64, over shapes, windows, chunks and
scattered blocks."""

import pytest
import torch

from tpinfer.attention.interface import HeadLayout, SequenceSpan
from tpinfer.attention.paged_kv import BlockTable, PagedKV, key_range
from tpinfer.attention.reference import bind_attention
from tpinfer.config.dtypes import DType
from tpinfer.sharding.kv_layout import KVLayout

BLOCK = 4
CPU = torch.device("cpu")


def oracle(
    query_THD: torch.Tensor, keys_NKD: torch.Tensor, values_NKD: torch.Tensor, first_head: int,
    group: int, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Straight from the definition: the T queries are the last ones of the N keys."""
    num_tokens, num_heads, head_dim = query_THD.shape
    out = torch.zeros(query_THD.shape, dtype=torch.float64)
    for token in range(num_tokens):
        last = keys_NKD.shape[0] - num_tokens + token
        start = 0 if window is None else max(0, last - window + 1)
        for head in range(num_heads):
            kv_head = (first_head + head) // group
            keys = keys_NKD[start : last + 1, kv_head].double()
            scores = keys @ query_THD[token, head].double() / head_dim**0.5
            out[token, head] = (
                torch.softmax(scores, 0) @ values_NKD[start : last + 1, kv_head].double()
            )
    return out


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    "blocks", [[1, 2, 3, 4, 5], [4, 0, 5, 2, 1]], ids=["adjoining", "scattered"]
)
@pytest.mark.parametrize(("num_tokens", "context"), [(1, 1), (1, 9), (6, 6), (5, 17), (1, 20)])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "group", "offset"),
    [(8, 2, 4, 0), (5, 2, 3, 0), (4, 2, 3, 2), (1, 1, 4, 2)],
)
def test_matches_the_definition(
    window: int | None, blocks: list[int], num_tokens: int, context: int,
    num_heads: int, num_kv_heads: int, group: int, offset: int,
) -> None:  # fmt: skip
    torch.manual_seed(context)
    head_dim = 8
    layout = KVLayout(BLOCK, 6)
    cache = PagedKV(1, num_kv_heads, head_dim, layout, DType.FLOAT32, CPU)
    cache.values_L2KSD.fill_(float("nan"))  # whoever reads an unwritten slot shows it
    table = BlockTable(list(blocks))
    keys, values = torch.randn(2, context, num_kv_heads, head_dim)
    slots = torch.tensor(table.slots(0, context, layout))
    cache.layer(0).write(slots, torch.stack((keys, values), 1))
    first = context - num_tokens
    window_start = 0 if window is None else max(0, first - window + 1)
    span = SequenceSpan(
        first_token=0,
        num_tokens=num_tokens,
        context_len=context,
        keys=key_range(table, 0, context, layout),
        window_keys=None if window is None else key_range(table, window_start, context, layout),
    )
    query = torch.randn(num_tokens, num_heads, head_dim)
    heads = HeadLayout(num_heads, num_kv_heads, group, offset)
    found = bind_attention(heads, head_dim, window)(query, cache.layer(0), [span])
    expected = oracle(query, keys, values, offset, group, window)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


def test_adjoining_blocks_are_read_without_a_copy() -> None:
    layout = KVLayout(BLOCK, 6)
    cache = PagedKV(1, 2, 8, layout, DType.FLOAT32, CPU)
    found = key_range(BlockTable([2, 3, 4]), 1, 11, layout)
    view = found.gather(cache.layer(0).values_2KSD)
    assert view.untyped_storage().data_ptr() == cache.values_L2KSD.untyped_storage().data_ptr()
    assert cache.layer(0).read(found, torch.float32).data_ptr() == view.data_ptr()
    assert found.runs == ((9, 10),)


def test_dropped_blocks_shift_the_table() -> None:
    table = BlockTable([7, 8, 9])
    table.drop(1)
    assert table.blocks == [8, 9]
    assert table.slots(4, 9, KVLayout(BLOCK, 10)) == [32, 33, 34, 35, 36]
