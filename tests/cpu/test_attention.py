"""Paged attention against plain softmax attention in float64, over shapes, windows, chunks and
scattered blocks."""

import pytest
import torch

from tpinfer.attention.interface import AttentionBackend, HeadLayout, SequenceSpan, StepSpans
from tpinfer.attention.native_decode import NativeAttention, load_native_attention
from tpinfer.attention.paged_kv import BlockTable, PagedKV, key_range
from tpinfer.attention.reference import ReferenceAttention, _in_pieces, _softmax_parts
from tpinfer.config.dtypes import DType
from tpinfer.layers.attention import merge_parts
from tpinfer.numerics.torch_dtypes import to_torch
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


@pytest.fixture(scope="module")
def native() -> NativeAttention:
    """The compiled kernel."""
    backend, reason = load_native_attention(2, [torch.float32])
    if backend is None:
        pytest.skip(f"no compiled kernel here: {reason}")
    return backend


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    """Each way to run attention on a CPU."""
    return (
        ReferenceAttention() if request.param == "reference" else request.getfixturevalue("native")
    )


def filled(
    layout: KVLayout, num_kv_heads: int, head_dim: int, table: BlockTable,
    keys_NKD: torch.Tensor, values_NKD: torch.Tensor, dtype: DType = DType.FLOAT32,
) -> PagedKV:  # fmt: skip
    """A cache in which only this sequence's slots are written."""
    cache = PagedKV(1, num_kv_heads, head_dim, layout, dtype, CPU)
    for tensor in cache.tensors():  # whoever reads an unwritten slot shows it
        tensor.fill_(float("nan") if tensor.is_floating_point() else 127)
    slots = torch.tensor(table.slots(0, len(keys_NKD), layout))
    cache.layer(0).write(slots, torch.stack((keys_NKD, values_NKD), 1))
    return cache


def span_of(
    table: BlockTable, layout: KVLayout, num_tokens: int, context: int, window: int | None,
    first_token: int = 0,
) -> SequenceSpan:  # fmt: skip
    window_start = 0 if window is None else max(0, context - num_tokens - window + 1)
    return SequenceSpan(
        first_token=first_token,
        num_tokens=num_tokens,
        context_len=context,
        keys=key_range(table, 0, context, layout),
        window_keys=None if window is None else key_range(table, window_start, context, layout),
    )


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
    num_heads: int, num_kv_heads: int, group: int, offset: int, backend: AttentionBackend,
) -> None:  # fmt: skip
    torch.manual_seed(context)
    head_dim, layout, table = 8, KVLayout(BLOCK, 6), BlockTable(list(blocks))
    keys, values = torch.randn(2, context, num_kv_heads, head_dim)
    cache = filled(layout, num_kv_heads, head_dim, table, keys, values)
    span = span_of(table, layout, num_tokens, context, window)
    query = torch.randn(num_tokens, num_heads, head_dim)
    heads = HeadLayout(num_heads, num_kv_heads, group, offset)
    found = backend.bind_attention(heads, head_dim, window)(
        query, cache.layer(0), StepSpans([span])
    )
    expected = oracle(query, keys, values, offset, group, window)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("group_size", [1, 2, 3])
@pytest.mark.parametrize(("num_tokens", "context"), [(1, 1), (1, 11), (7, 7), (5, 18), (1, 24)])
def test_parts_of_the_keys_merge_to_all_of_them(
    window: int | None, group_size: int, num_tokens: int, context: int, backend: AttentionBackend
) -> None:
    torch.manual_seed(context)
    head_dim, num_heads, num_kv_heads = 8, 6, 2
    keys, values = torch.randn(2, context, num_kv_heads, head_dim)
    query = torch.randn(num_tokens, num_heads, head_dim)
    classes = {1: [0, 5, 2, 3, 1, 4], 2: [4, 1, 0, 5, 2, 3], 3: [3, 4, 5, 0, 1, 2]}
    table = BlockTable(classes[group_size])
    parts = []
    for place in range(group_size):
        layout = KVLayout(BLOCK, 6, group_size, place)
        cache = filled(layout, num_kv_heads, head_dim, table, keys, values)
        span = span_of(table, layout, num_tokens, context, window)
        heads = HeadLayout(num_heads, num_kv_heads, num_heads // num_kv_heads, 0)
        attend = backend.bind_partial_attention(heads, head_dim, window)
        out, lse = attend(query, cache.layer(0), StepSpans([span]))
        assert out.isfinite().all() and not lse.isnan().any()
        if not span.keys_of(window).num_keys:
            assert (lse == -torch.inf).all()
        parts.append(torch.cat((out, lse.unsqueeze(-1)), -1))
    found = merge_parts(torch.stack(parts))
    expected = oracle(query, keys, values, 0, 3, window)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


def test_both_ways_to_log_sum_exp_agree() -> None:
    torch.manual_seed(1)
    query, keys = torch.randn(2, 3, 70, 8), torch.randn(2, 600, 8)
    visible = torch.rand(70, 600) < 0.01
    visible[3] = False
    visible[4, :550] = False
    found = _softmax_parts(query, keys, keys, visible)
    expanded = keys.unsqueeze(1).expand(-1, 3, -1, -1)
    expected = _in_pieces(query, expanded, expanded, visible)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found[1][:, :, 3] == -torch.inf).all() and not found[0][:, :, 3].any()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "stored", [DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16, DType.INT8, DType.FLOAT8_E4M3]
)
@pytest.mark.parametrize("head_dim", [8, 64, 128, 80])
def test_the_kernel_reads_every_format_like_torch(
    compute: torch.dtype, stored: DType, head_dim: int
) -> None:
    """Many rows beside a prompt, contexts of any length, queries that do not lie densely."""
    native, reason = load_native_attention(2, [compute, to_torch(stored)])
    if native is None:
        pytest.skip(reason)
    torch.manual_seed(head_dim)
    num_heads, num_kv_heads, contexts = 6, 2, (1, 16, 17, 3, 130)
    layout = KVLayout(BLOCK, 60)
    cache = PagedKV(1, num_kv_heads, head_dim, layout, stored, CPU)
    spans, used, first = [], 0, 0
    for context in contexts:
        count = -(-context // BLOCK)
        table = BlockTable(list(range(used, used + count))[:: -1 if context == 17 else 1])
        used += count
        num_tokens = 3 if context == 3 else 1
        spans.append(span_of(table, layout, num_tokens, context, None, first))
        first += num_tokens
        slots = torch.tensor(table.slots(0, context, layout))
        cache.layer(0).write(slots, torch.randn(context, 2, num_kv_heads, head_dim) * 2)
    query = torch.randn(first, num_heads + 1, head_dim).to(compute)[:, :num_heads]
    heads = HeadLayout(num_heads, num_kv_heads, num_heads // num_kv_heads, 0)
    found = native.bind_attention(heads, head_dim, None)(query, cache.layer(0), StepSpans(spans))
    plain = ReferenceAttention().bind_attention(heads, head_dim, None)
    exact = plain(query.float(), cache.layer(0), StepSpans(spans))
    assert found.dtype is compute
    decodes = [span.first_token for span in spans if span.num_tokens == 1]
    bound = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[compute]
    torch.testing.assert_close(found[decodes].float(), exact[decodes], atol=bound, rtol=bound)
    assert torch.equal(found[3:6], plain(query, cache.layer(0), StepSpans(spans))[3:6]), (
        "the prompt's"
    )


def test_the_kernel_shows_what_is_broken(native: NativeAttention) -> None:
    layout, table = KVLayout(BLOCK, 2), BlockTable([0, 1])
    heads = HeadLayout(2, 2, 1, 0)
    for broken in (float("nan"), float("inf")):
        keys, values = torch.ones(2, 6, 2, 8)
        keys[3, 1, 2] = broken
        cache = filled(layout, 2, 8, table, keys, values)
        span = span_of(table, layout, 1, 6, None)
        found = native.bind_attention(heads, 8, None)(
            torch.ones(1, 2, 8), cache.layer(0), StepSpans([span])
        )
        assert found[0, 0].isfinite().all() and found[0, 1].isnan().any()


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
