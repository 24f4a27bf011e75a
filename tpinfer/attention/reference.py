"""Attention over the paged cache in plain torch, for CPU ranks and as the oracle of faster
backends.

The query heads that share a KV head are packed as query rows of one small matmul, so keys and
values are never repeated. A cut inside a GQA group leaves a rank with part of a group: its heads
are padded to whole groups for the call. Sequences are walked one by one.

Shapes: T tokens, H local query heads, K local KV heads, G group size, D head dim, N keys.
"""

import torch
import torch.nn.functional as F

from tpinfer.attention.interface import (
    AttentionCall,
    HeadLayout,
    PartialAttentionCall,
    SequenceSpan,
    StepSpans,
)
from tpinfer.attention.paged_kv import KeyRange, LayerKV

_QUERY_ROWS = 256
"""Tokens of a prompt whose scores are held at once where no fused kernel returns log-sum-exp."""


class ReferenceAttention:
    """Plain torch as a backend."""

    reads_paged = False

    def bind_attention(
        self, layout: HeadLayout, head_dim: int, window: int | None
    ) -> AttentionCall:
        """As the function of this name."""
        return bind_attention(layout, head_dim, window)

    def bind_partial_attention(
        self, layout: HeadLayout, head_dim: int, window: int | None
    ) -> PartialAttentionCall:
        """As the function of this name."""
        return bind_partial_attention(layout, head_dim, window)


def bind_attention(layout: HeadLayout, head_dim: int, window: int | None) -> AttentionCall:
    """The attention of one layer. `window` is the sliding window in tokens, None for full
    attention."""
    num_padded = layout.num_kv_heads * layout.group_size
    after = num_padded - layout.offset - layout.num_heads
    padding = (0, 0, layout.offset, after)

    def attend(query_THD: torch.Tensor, cache: LayerKV, spans: StepSpans) -> torch.Tensor:
        if not layout.is_whole:
            query_THD = F.pad(query_THD, padding)
        query_TKGD = query_THD.unflatten(1, (layout.num_kv_heads, layout.group_size))
        outs = [_attend_one(query_TKGD, cache, span, window) for span in spans.sequences]
        out_THD = (outs[0] if len(outs) == 1 else torch.cat(outs)).reshape(-1, num_padded, head_dim)
        if layout.is_whole:
            return out_THD
        return out_THD[:, layout.offset : layout.offset + layout.num_heads]

    return attend


def _attend_one(
    query_TKGD: torch.Tensor, cache: LayerKV, span: SequenceSpan, window: int | None
) -> torch.Tensor:
    query = query_TKGD.narrow(0, span.first_token, span.num_tokens)
    keys = span.keys_of(window)
    key_KND, value_KND = cache.read(keys, query.dtype).unbind(0)
    if span.num_tokens == 1:  # the cache range already ends at this token and starts in its window
        out = F.scaled_dot_product_attention(
            query[0].unsqueeze(1), key_KND.unsqueeze(1), value_KND.unsqueeze(1)
        )
        return out.reshape(1, *query.shape[1:])
    num_groups = query.shape[2]
    is_causal = _is_plain_causal(span, keys, window)
    out_KGTD = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key_KND.unsqueeze(1).expand(-1, num_groups, -1, -1),
        value_KND.unsqueeze(1).expand(-1, num_groups, -1, -1),
        attn_mask=None if is_causal else visible_keys(span, keys, window, query.device),
        is_causal=is_causal,
    )
    return out_KGTD.permute(2, 0, 1, 3).reshape(query.shape)


def _is_plain_causal(span: SequenceSpan, keys: KeyRange, window: int | None) -> bool:
    fits = window is None or span.context_len <= window
    return fits and keys.start == 0 and span.num_tokens == span.context_len


def visible_keys(
    span: SequenceSpan, keys: KeyRange, window: int | None, device: torch.device
) -> torch.Tensor:
    """bool [T, N], true where a query token may look."""
    first = span.context_len - span.num_tokens
    query_position = torch.arange(first, span.context_len, device=device).unsqueeze(1)
    key_position = keys.positions(device).unsqueeze(0)
    visible = key_position <= query_position
    if window is not None:
        visible &= key_position > query_position - window
    return visible


def bind_partial_attention(
    layout: HeadLayout, head_dim: int, window: int | None
) -> PartialAttentionCall:
    """The attention of one layer over the keys this rank holds, for whole groups of heads."""
    assert layout.is_whole, "the ranks that share a KV head gather its whole group of query heads"

    def attend(
        query_THD: torch.Tensor, cache: LayerKV, spans: StepSpans
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query_TKGD = query_THD.unflatten(1, (layout.num_kv_heads, layout.group_size))
        found = [_attend_partly(query_TKGD, cache, span, window) for span in spans.sequences]
        outs, lses = zip(*found, strict=True)
        return torch.cat(outs).flatten(1, 2), torch.cat(lses).flatten(1)

    return attend


def _attend_partly(
    query_TKGD: torch.Tensor, cache: LayerKV, span: SequenceSpan, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, K, G, D], float32 [T, K, G]) of one sequence."""
    query = query_TKGD.narrow(0, span.first_token, span.num_tokens)
    keys = span.keys_of(window)
    if not keys.num_keys:
        lse = query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32)
        return torch.zeros_like(query), lse
    key_KND, value_KND = cache.read(keys, query.dtype).unbind(0)
    if span.num_tokens == 1:  # every key here is visible to the one query
        out, lse = _softmax_parts(query.permute(1, 0, 2, 3), key_KND, value_KND, None)
        return out.permute(1, 0, 2, 3), lse.permute(1, 0, 2)  # the G heads went as query rows
    visible = visible_keys(span, keys, window, query.device)
    out, lse = _softmax_parts(query.permute(1, 2, 0, 3), key_KND, value_KND, visible)
    return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)


def _softmax_parts(
    query_KGTD: torch.Tensor,
    key_KND: torch.Tensor,
    value_KND: torch.Tensor,
    visible_TN: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [K, G, T, D], log-sum-exp float32 [K, G, T]); 0 and -inf where nothing is visible."""
    num_groups = query_KGTD.shape[1]
    key = key_KND.unsqueeze(1).expand(-1, num_groups, -1, -1)
    value = value_KND.unsqueeze(1).expand(-1, num_groups, -1, -1)
    if not query_KGTD.is_cpu:
        return _in_pieces(query_KGTD, key, value, visible_TN)
    mask = None
    if visible_TN is not None:
        mask = torch.zeros(visible_TN.shape, dtype=query_KGTD.dtype)
        mask.masked_fill_(~visible_TN, float("-inf"))
    # What scaled_dot_product_attention runs on a CPU, called by name for its second result.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_KGTD, key, value, attn_mask=mask
    )
    if visible_TN is not None:
        blind = ~visible_TN.any(-1)
        lse = lse.masked_fill(blind, float("-inf"))  # the kernel says 0 of a row without keys
        out = out.masked_fill(blind.unsqueeze(-1), 0.0)
    return out, lse


def _in_pieces(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible_TN: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same straight from the definition, in float32, some query rows at a time."""
    key, value = key.float(), value.float()
    outs, lses = [], []
    for first in range(0, query.shape[2], _QUERY_ROWS):
        rows = query[:, :, first : first + _QUERY_ROWS].float()
        scores = rows @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if visible_TN is not None:
            scores.masked_fill_(~visible_TN[first : first + _QUERY_ROWS], float("-inf"))
        lse = scores.logsumexp(-1)
        weight = (scores - lse.unsqueeze(-1)).exp_().nan_to_num_(0.0)  # -inf less -inf
        outs.append((weight @ value).to(query.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)
