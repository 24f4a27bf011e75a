"""Decode rows through the compiled kernel of paged_decode.c: one call a layer for all rows that
bring one token, keys and values read where they lie. Prompts, and heads the kernel was not made
for, go through `reference`.

Set-up compiles it (`python -m tpinfer.attention.native_decode`); a rank that finds no library
compiles it itself, which takes some seconds. Takes CPU tensors.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tpinfer.attention.interface import (
    AttentionCall,
    HeadLayout,
    PartialAttentionCall,
    SequenceSpan,
    StepSpans,
)
from tpinfer.attention.paged_kv import LayerKV
from tpinfer.attention.reference import bind_attention, bind_partial_attention
from tpinfer.numerics.native_library import build_library, open_library

SOURCE = Path(__file__).with_name("paged_decode.c")
_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
}
"""The enum in paged_decode.c."""
_MOST_GROUP, _MOST_DIM = 32, 256
"""The kernel's room for query heads that share a KV head, and for a head's values."""


class _Attention(ctypes.Structure):
    """struct attention of paged_decode.c."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("keys", "values", "key_scales", "value_scales", "queries", "out", "lse"),
                *("tokens", "run_offsets", "run_starts", "run_lengths"),
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("num_rows", "num_kv_heads", "group_size", "head_dim", "head_slots"),
                *("query_stride", "query_dtype", "cache_dtype", "num_threads"),
            )
        ),
        ("scale", ctypes.c_double),
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """The decode rows of a step, and where their keys lie, as the kernel takes them."""

    spans: Sequence[SequenceSpan]
    """Of the whole step."""
    others: Sequence[SequenceSpan]
    """Those that bring several tokens."""
    num_rows: int
    columns: tuple[torch.Tensor, ...]
    """int32: token of each row; offsets of its runs; their first slots; their lengths."""
    addresses: tuple[int, ...]
    """Of `columns`."""


class NativeAttention:
    """The compiled kernel, bound layer by layer. What it makes of a step's spans is kept for the
    step's other layers."""

    reads_paged = False

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._attend = library.attend
        self._attend.argtypes = [ctypes.c_void_p]
        self._attend.restype = None
        self._num_threads = num_threads
        self._rows: dict[bool, _Rows] = {}

    def bind_attention(
        self, layout: HeadLayout, head_dim: int, window: int | None
    ) -> AttentionCall:
        """As `reference.bind_attention`."""
        plain = bind_attention(layout, head_dim, window)
        if not _is_made_for(layout, head_dim):
            return plain
        slides, call = window is not None, self._call(layout, head_dim)

        def attend(query_THD: torch.Tensor, cache: LayerKV, spans: StepSpans) -> torch.Tensor:
            rows = self._rows_of(spans.sequences, slides)
            if not rows.num_rows:
                return plain(query_THD, cache, spans)
            out = torch.empty(query_THD.shape, dtype=query_THD.dtype)
            self._run(call, rows, query_THD, cache, out, None)
            for span in rows.others:
                part = slice(span.first_token, span.first_token + span.num_tokens)
                out[part] = plain(query_THD, cache, StepSpans((span,)))
            return out

        return attend

    def bind_partial_attention(
        self, layout: HeadLayout, head_dim: int, window: int | None
    ) -> PartialAttentionCall:
        """As `reference.bind_partial_attention`."""
        plain = bind_partial_attention(layout, head_dim, window)
        if not _is_made_for(layout, head_dim):
            return plain
        slides, call = window is not None, self._call(layout, head_dim)

        def attend(
            query_THD: torch.Tensor, cache: LayerKV, spans: StepSpans
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows = self._rows_of(spans.sequences, slides)
            if not rows.num_rows:
                return plain(query_THD, cache, spans)
            out = torch.empty(query_THD.shape, dtype=query_THD.dtype)
            lse = torch.empty(query_THD.shape[:2], dtype=torch.float32)
            self._run(call, rows, query_THD, cache, out, lse)
            for span in rows.others:
                part = slice(span.first_token, span.first_token + span.num_tokens)
                out[part], lse[part] = plain(query_THD, cache, StepSpans((span,)))
            return out, lse

        return attend

    def _rows_of(self, spans: Sequence[SequenceSpan], slides: bool) -> _Rows:
        found = self._rows.get(slides)
        if found is None or found.spans is not spans:  # held, so its identity is its own
            found = self._rows[slides] = _decode_rows(spans, slides)
        return found

    def _call(self, layout: HeadLayout, head_dim: int) -> _Attention:
        """A layer's call with what never changes; the rest is set by each step."""
        return _Attention(
            num_kv_heads=layout.num_kv_heads,
            group_size=layout.group_size,
            head_dim=head_dim,
            num_threads=self._num_threads,
            scale=head_dim**-0.5,
        )

    def _run(
        self,
        call: _Attention,
        rows: _Rows,
        query_THD: torch.Tensor,
        cache: LayerKV,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor | None,
    ) -> None:
        if query_THD.stride(2) != 1 or query_THD.stride(1) != call.head_dim:
            query_THD = query_THD.contiguous()
        if not call.keys:  # the cache stays where it is
            stored, scales = cache.values_2KSD, cache.scales_2KS
            call.keys, call.values = stored[0].data_ptr(), stored[1].data_ptr()
            if scales is not None:
                call.key_scales, call.value_scales = scales[0].data_ptr(), scales[1].data_ptr()
            call.head_slots, call.cache_dtype = stored.shape[2], _CODES[cache.dtype]
            call.query_dtype = _CODES[query_THD.dtype]
        call.tokens, call.run_offsets, call.run_starts, call.run_lengths = rows.addresses
        call.num_rows, call.query_stride = rows.num_rows, query_THD.stride(0)
        call.queries, call.out = query_THD.data_ptr(), out_THD.data_ptr()
        call.lse = None if lse_TH is None else lse_TH.data_ptr()
        self._attend(ctypes.addressof(call))


def _is_made_for(layout: HeadLayout, head_dim: int) -> bool:
    return layout.is_whole and layout.group_size <= _MOST_GROUP and head_dim <= _MOST_DIM


def _decode_rows(spans: Sequence[SequenceSpan], slides: bool) -> _Rows:
    tokens: list[int] = []
    offsets, starts, lengths = [0], [], []
    others: list[SequenceSpan] = []
    for span in spans:
        if span.num_tokens > 1:
            others.append(span)
            continue
        tokens.append(span.first_token)
        keys = span.window_keys if slides and span.window_keys is not None else span.keys
        for start, length in keys.runs:
            starts.append(start)
            lengths.append(length)
        offsets.append(len(starts))
    columns = tuple(
        torch.tensor(column, dtype=torch.int32) for column in (tokens, offsets, starts, lengths)
    )
    addresses = tuple(column.data_ptr() for column in columns)
    return _Rows(spans, others, len(tokens), columns, addresses)


def load_native_attention(
    num_threads: int, dtypes: Sequence[torch.dtype]
) -> tuple[NativeAttention | None, str]:
    """(the kernel, where it came from), or (None, why it cannot be had). `dtypes`: what is computed
    in and what is stored."""
    unknown = [str(dtype) for dtype in dtypes if dtype not in _CODES]
    if unknown:
        return None, f"the compiled kernel does not know {', '.join(unknown)}"
    library, reason = open_library(SOURCE, ("-fopenmp",), _Attention, "attention_struct_bytes")
    if library is None:
        return None, reason
    if torch.float16 in dtypes and not library.knows_float16():
        return None, "the C compiler knows no float16"
    return NativeAttention(library, num_threads), reason


if __name__ == "__main__":
    built, said = build_library(SOURCE, ("-fopenmp",))
    print(f"native decode attention: {built or 'not built, plain torch is used'} ({said})")
