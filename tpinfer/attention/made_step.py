"""A step of made-up keys and queries, on which kernels are held against plain torch and timed at
start: blocks out of order, rows of the block tables in another order than the sequences, and no
number where nothing was written.

Shapes as in `interface`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from tpinfer.attention.interface import PagedSpans, SequenceSpan, StepSpans
from tpinfer.attention.paged_kv import BlockTable, LayerKV, PagedKV, key_range
from tpinfer.attention.prompt_attention import AttentionShape
from tpinfer.config.dtypes import DType
from tpinfer.sharding.kv_layout import KVLayout


@dataclass(frozen=True, slots=True)
class MadeStep:
    """What an `AttentionCall` takes."""

    query_THD: torch.Tensor
    """Columns of a wider tensor, as they lie beside keys and values in a step."""
    cache: LayerKV
    spans: StepSpans


def made_step(
    sizes: Sequence[tuple[int, int]],
    shape: AttentionShape,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: DType,
) -> MadeStep:
    """sizes: (query tokens, context) of each sequence. The same numbers at every call."""
    generator = torch.Generator().manual_seed(1)
    layout, head_dim = shape.layout, shape.head_dim
    counts = [-(-context // block_size) for _, context in sizes]
    kv_layout = KVLayout(block_size, sum(counts) + 1, has_spare=True)
    kv = PagedKV(1, layout.num_kv_heads, head_dim, kv_layout, kv_dtype, device)
    for tensor in kv.tensors():
        tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.zero_()
    cache = kv.layer(0)
    free = torch.randperm(sum(counts) + 1, generator=generator).tolist()
    tables, spans = [], []
    first_tokens = [0, *accumulate(num_tokens for num_tokens, _ in sizes)]
    for (num_tokens, context), count, first in zip(sizes, counts, first_tokens, strict=False):
        table = BlockTable([free.pop() for _ in range(count)])
        fresh = torch.randn(context, 2, layout.num_kv_heads, head_dim, generator=generator)
        slots = torch.tensor(table.slots(0, context, kv_layout), dtype=torch.int64, device=device)
        cache.write(slots, fresh.to(device, dtype))
        tables.append(table.blocks)
        spans.append(_span(table, first, num_tokens, context, shape.window, kv_layout))
    wide = layout.num_heads + 2 * layout.num_kv_heads, head_dim
    query = torch.randn(first_tokens[-1], *wide, generator=generator).to(device, dtype)
    paged = _paged(tables, first_tokens, sizes, device)
    return MadeStep(query[:, : layout.num_heads], cache, StepSpans(spans, paged))


def _span(
    table: BlockTable,
    first: int,
    num_tokens: int,
    context: int,
    window: int | None,
    layout: KVLayout,
) -> SequenceSpan:
    seen = None
    if window is not None:
        low = max(0, context - num_tokens - window + 1)
        seen = key_range(table, low, context, layout)
    keys = key_range(table, 0, context, layout)
    return SequenceSpan(first, num_tokens, context, keys, seen)


def _paged(
    tables: list[list[int]],
    first_tokens: list[int],
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
) -> PagedSpans:
    count, width = len(sizes), max(map(len, tables)) + 1
    rows = [table + [0] * (width - len(table)) for table in reversed(tables)]

    def column(values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    query_lens, contexts = zip(*sizes, strict=True)
    return PagedSpans(
        column(rows), column(range(count - 1, -1, -1)), column(first_tokens), column(contexts),
        count, max(query_lens), max(contexts),
    )  # fmt: skip
