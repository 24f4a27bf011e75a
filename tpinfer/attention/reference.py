"""Attention over the paged cache in plain torch, for CPU ranks and as the oracle of faster
backends.

The query heads that share a KV head are packed as query rows of one small matmul, so keys and
values are never repeated. A cut inside a GQA group leaves a rank with part of a group: its heads
are padded to whole groups for the call. Sequences are walked one by one.

Shapes: T tokens, H local query heads, K local KV heads, G group size, D head dim, N keys.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tpinfer.attention.interface import AttentionCall, HeadLayout, SequenceSpan
from tpinfer.attention.paged_kv import KeyRange


def bind_attention(layout: HeadLayout, head_dim: int, window: int | None) -> AttentionCall:
    """The attention of one layer. `window` is the sliding window in tokens, None for full
    attention."""
    num_padded = layout.num_kv_heads * layout.group_size
    after = num_padded - layout.offset - layout.num_heads
    padding = (0, 0, layout.offset, after)

    def attend(
        query_THD: torch.Tensor, cache_2KSD: torch.Tensor, spans: Sequence[SequenceSpan]
    ) -> torch.Tensor:
        if not layout.is_whole:
            query_THD = F.pad(query_THD, padding)
        query_TKGD = query_THD.view(-1, layout.num_kv_heads, layout.group_size, head_dim)
        outs = [_attend_one(query_TKGD, cache_2KSD, span, window) for span in spans]
        out_THD = (outs[0] if len(outs) == 1 else torch.cat(outs)).view(-1, num_padded, head_dim)
        if layout.is_whole:
            return out_THD
        return out_THD[:, layout.offset : layout.offset + layout.num_heads]

    return attend


def _attend_one(
    query_TKGD: torch.Tensor, cache_2KSD: torch.Tensor, span: SequenceSpan, window: int | None
) -> torch.Tensor:
    query = query_TKGD.narrow(0, span.first_token, span.num_tokens)
    keys = span.keys if window is None or span.window_keys is None else span.window_keys
    key_KND, value_KND = keys.read(cache_2KSD).unbind(0)
    if span.num_tokens == 1:  # the cache range already ends at this token and starts in its window
        out = F.scaled_dot_product_attention(
            query[0].unsqueeze(1), key_KND.unsqueeze(1), value_KND.unsqueeze(1)
        )
        return out.reshape(1, *query.shape[1:])
    num_groups = query.shape[2]
    out_KGTD = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key_KND.unsqueeze(1).expand(-1, num_groups, -1, -1),
        value_KND.unsqueeze(1).expand(-1, num_groups, -1, -1),
        attn_mask=_mask(span, keys, window, query.device),
        is_causal=_is_plain_causal(span, keys, window),
    )
    return out_KGTD.permute(2, 0, 1, 3).reshape(query.shape)


def _is_plain_causal(span: SequenceSpan, keys: KeyRange, window: int | None) -> bool:
    fits = window is None or span.context_len <= window
    return fits and keys.start == 0 and span.num_tokens == span.context_len


def _mask(
    span: SequenceSpan, keys: KeyRange, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """bool [T, N], true where a query token may look; None where plain causality says the same."""
    if _is_plain_causal(span, keys, window):
        return None
    first = span.context_len - span.num_tokens
    query_position = torch.arange(first, span.context_len, device=device).unsqueeze(1)
    key_position = torch.arange(keys.start, keys.stop, device=device).unsqueeze(0)
    visible = key_position <= query_position
    if window is not None:
        visible &= key_position > query_position - window
    return visible
