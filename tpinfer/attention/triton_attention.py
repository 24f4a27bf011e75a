"""Attention on a GPU through the Triton kernel of `triton_paged`: what is launched for a step.

Sequences of few query tokens take a launch whose keys are split over programs, the others one with
many query rows a program; a step of both takes both. A library's kernel may take the place of the
second. Shapes as in `interface`.
"""

from dataclasses import dataclass

import torch

from tpinfer.attention import triton_paged
from tpinfer.attention.interface import (
    AttentionCall,
    HeadLayout,
    PagedSpans,
    PartialAttentionCall,
    StepSpans,
)
from tpinfer.attention.paged_kv import LayerKV
from tpinfer.attention.prompt_attention import PromptAttention, PromptCall
from tpinfer.attention.prompt_part import MOST_DECODE_TOKENS
from tpinfer.sharding.kv_layout import KVLayout

MOST_SPLITS = 32
_NUM_KEYS = 64
_PROGRAMS_PER_PROCESSOR = 2
_MERGED_ELEMENTS = 1 << 14
"""Of the parts that a program reads at once when it merges: 128 registers of 128 threads."""
_SPLITS_WITH_PROMPTS = 4
_MANY = 2**30
_LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class _Workspace:
    """What split programs leave to the one that merges."""

    out: torch.Tensor
    lse: torch.Tensor
    arrived: torch.Tensor


class TritonAttention:
    """The kernel as a backend; `kv` is how the cache lies. Layers share one workspace: they run one
    behind the other on one stream."""

    reads_paged = True

    def __init__(
        self,
        kv: KVLayout,
        device: torch.device,
        *,
        batch_invariant: bool = False,
        prompts: PromptAttention | None = None,
    ) -> None:
        """batch_invariant: split the keys of every sequence alike, whatever else is in the step, so
        that a row's result never depends on its company; costs speed where many rows decode.
        prompts: what computes sequences of more than MOST_DECODE_TOKENS, where it can."""
        self._kv = kv
        self._device = device
        self._batch_invariant = batch_invariant
        self._prompts = prompts
        is_cuda = device.type == "cuda"
        self._num_processors = (
            torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 4
        )
        self._workspaces: dict[tuple[int, ...], _Workspace] = {}

    def with_prompts(self, prompts: PromptAttention) -> "TritonAttention":
        """The same, where `prompts` computes sequences of more than MOST_DECODE_TOKENS."""
        invariant = self._batch_invariant
        return TritonAttention(self._kv, self._device, batch_invariant=invariant, prompts=prompts)

    def bind_attention(
        self, layout: HeadLayout, head_dim: int, window: int | None
    ) -> AttentionCall:
        """Over all keys of a sequence."""
        prompts = self._bind_prompts(layout, head_dim, window)

        def attend(query_THD: torch.Tensor, cache: LayerKV, spans: StepSpans) -> torch.Tensor:
            out_THD = torch.empty_like(query_THD, memory_format=torch.contiguous_format)
            query_THD = _with_adjoining_heads(query_THD)
            bound = _Bound(layout, window, query_THD, cache, spans, out_THD, None)
            self._launch(bound, prompts)
            return out_THD

        return attend

    def bind_partial_attention(
        self, layout: HeadLayout, head_dim: int, window: int | None
    ) -> PartialAttentionCall:
        """Over the keys this rank holds, for whole groups of heads."""
        prompts = self._bind_prompts(layout, head_dim, window)

        def attend(
            query_THD: torch.Tensor, cache: LayerKV, spans: StepSpans
        ) -> tuple[torch.Tensor, torch.Tensor]:
            out_THD = torch.empty_like(query_THD, memory_format=torch.contiguous_format)
            lse_TH = torch.empty(query_THD.shape[:2], dtype=torch.float32, device=query_THD.device)
            query_THD = _with_adjoining_heads(query_THD)
            bound = _Bound(layout, window, query_THD, cache, spans, out_THD, lse_TH)
            self._launch(bound, prompts)
            return out_THD, lse_TH

        return attend

    def num_splits(self, num_sequences: int, num_kv_heads: int, max_context_len: int) -> int:
        """Programs that the keys of a sequence are split over: enough to fill the device, and none
        without a tile."""
        room = MOST_SPLITS
        if not self._batch_invariant:
            wanted = self._num_processors * _PROGRAMS_PER_PROCESSOR
            room = min(room, max(1, wanted // max(1, num_sequences * num_kv_heads)))
            tiles = -(-max_context_len // (_NUM_KEYS * self._kv.group_size))
            room = min(room, max(1, tiles))
        return 1 << (room.bit_length() - 1)

    def _bind_prompts(
        self, layout: HeadLayout, head_dim: int, window: int | None
    ) -> PromptCall | None:
        return None if self._prompts is None else self._prompts.bind(layout, head_dim, window)

    def _launch(self, bound: "_Bound", prompts: PromptCall | None) -> None:
        paged = bound.paged
        if not paged.num_sequences:
            return
        if paged.max_query_len > MOST_DECODE_TOKENS:
            spans = bound.spans
            tensors = bound.query, bound.cache, spans, bound.out, bound.lse
            if prompts is None or not prompts(*tensors):
                self._run(bound, MOST_DECODE_TOKENS + 1, _MANY)
            counts = [span.num_tokens for span in spans.sequences]
            if counts and min(counts) > MOST_DECODE_TOKENS:
                return
        self._run(bound, 0, MOST_DECODE_TOKENS)

    def _run(self, bound: "_Bound", shortest: int, longest: int) -> None:
        layout, paged, cache = bound.layout, bound.paged, bound.cache
        num_kv_heads, size = layout.num_kv_heads, layout.group_size
        is_prefill = longest > MOST_DECODE_TOKENS
        if is_prefill:
            rows = prefill_rows(cache.head_dim, bound.query.dtype)
            num_rows = max(rows, _power_of_2(size))
            tokens, num_splits = num_rows // size, 1
            num_tiles = -(-paged.max_query_len // tokens)
        else:
            tokens = min(max(paged.max_query_len, 1), longest)
            num_splits = self.num_splits(paged.num_sequences, num_kv_heads, paged.max_context_len)
            if bound.spans.sequences and tokens > 1:
                # With prompts, however short, both change from step to step, and each is compiled
                # anew: one kernel serves them all.
                tokens = longest
                num_splits = num_splits if self._batch_invariant else _SPLITS_WITH_PROMPTS
            num_rows = max(16, _power_of_2(tokens * size))
            num_tiles = 1
        head_dim = cache.head_dim
        space = self._workspace(bound, num_splits, num_rows)
        has_lse, scales = bound.lse is not None, cache.scales_2KS
        stored = triton_paged.PLAIN
        if scales is not None:
            is_int = cache.dtype is torch.int8
            stored = triton_paged.INT8 if is_int else triton_paged.FP8
        exact, padded = bound.query.dtype is torch.float32, max(16, _power_of_2(head_dim))
        triton_paged.paged_attention[num_tiles * num_splits, paged.num_sequences, num_kv_heads](
            bound.query, bound.out, bound.lse if has_lse else bound.out,
            cache.values_2KSD, scales if scales is not None else cache.values_2KSD,
            paged.block_tables_RB, paged.rows_S, paged.first_tokens_S1, paged.context_lens_S,
            space.out, space.lse, space.arrived,
            bound.query.stride(0), bound.out.stride(0), cache.values_2KSD.shape[2],
            paged.block_tables_RB.shape[1], num_kv_heads, layout.num_heads, layout.offset,
            bound.window or 0, head_dim**-0.5 * _LOG2E, shortest, longest,
            GROUP=self._kv.group_size, PLACE=self._kv.place, BLOCK=self._kv.block_size, D=head_dim,
            G=size, TOKENS=tokens, M=num_rows, N=_NUM_KEYS,
            D_PADDED=padded, NUM_SPLITS=num_splits,
            MERGED=max(1, min(num_splits, _MERGED_ELEMENTS // (num_rows * padded))),
            STORED=stored, SLIDES=bound.window is not None, HAS_LSE=has_lse,
            PRECISION="ieee" if exact else "tf32",
            num_warps=8 if is_prefill or num_rows >= 128 else 4,  # pyright: ignore[reportCallIssue]
            num_stages=2 if exact else 3,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip

    def _workspace(self, bound: "_Bound", num_splits: int, num_rows: int) -> _Workspace:
        """Kept by what it is for, so that recorded launches never share one with another shape."""
        count, heads = bound.paged.num_sequences, bound.layout.num_kv_heads
        shape = (count, heads, num_splits, num_rows) if num_splits > 1 else (1, 1, 1, 1)
        head_dim = bound.cache.head_dim
        key = (*shape, head_dim)
        found = self._workspaces.get(key)
        if found is None:
            like = bound.out.new_empty(0, dtype=torch.float32)
            found = self._workspaces[key] = _Workspace(
                like.new_empty(*shape, head_dim),
                like.new_empty(shape),
                like.new_zeros(shape[:2], dtype=torch.int32),
            )
        return found


def prefill_rows(head_dim: int, dtype: torch.dtype) -> int:
    """Query rows of a prompt that one program takes. The widest float32 heads take fewer:
    compiled for sm_90, 128 rows of 256 take 295,424 bytes of shared memory, of which a block has
    232,448, and 32 rows take 172,160."""
    return 32 if dtype is torch.float32 and head_dim > 128 else 128


def _power_of_2(count: int) -> int:
    """The next one, as tiles need."""
    return 1 << (count - 1).bit_length()


def _with_adjoining_heads(query_THD: torch.Tensor) -> torch.Tensor:
    """As the kernel reads them; tokens may lie apart."""
    if query_THD.stride(2) != 1 or query_THD.stride(1) != query_THD.shape[2]:
        return query_THD.contiguous()
    return query_THD


@dataclass(frozen=True, slots=True)
class _Bound:
    """One call's tensors."""

    layout: HeadLayout
    window: int | None
    query: torch.Tensor
    cache: LayerKV
    spans: StepSpans
    out: torch.Tensor
    lse: torch.Tensor | None

    @property
    def paged(self) -> PagedSpans:
        """The sequences as the kernel reads them."""
        paged = self.spans.paged
        assert paged is not None, "rows.py builds block tables where the backend reads them"
        return paged
