"""Prompts through FlashInfer's paged prefill kernel, where flashinfer is installed.

The cache's blocks are given as they lie, as views [blocks, K, block_size, D] (its `HND` layout,
strided). A step is planned once for all layers of a shape: `plan` sorts its query tiles on the
host. Its log-sum-exp has base 2. Written against flashinfer 0.6; whatever else an installed one
wants, it raises, and is not used.

Shapes: P query tokens, H local query heads, K local KV heads, D head dim.
"""

import math
from itertools import accumulate
from typing import Any

import torch

from tpinfer.attention.interface import PagedSpans
from tpinfer.attention.paged_kv import LayerKV
from tpinfer.attention.prompt_attention import AttentionShape, BoundPrompts, first_line
from tpinfer.attention.prompt_part import PromptPart, keys_by_block, on_device, on_host, own_tables

_LEAST_WORKSPACE_BYTES = 128 << 20
"""What its documentation recommends."""
_TILE_ROWS = 128


class FlashInferPrompts:
    """FlashInfer as a `PromptKernel`."""

    def __init__(
        self,
        flashinfer: Any,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        shape: AttentionShape,
    ) -> None:
        """`flashinfer` is the module; `shape` is what its workspace is sized for. Others share it:
        layers run one behind the other on one stream."""
        self.name = f"FlashInfer {getattr(flashinfer, '__version__', 'of an unknown version')}"
        self._flashinfer = flashinfer
        self._block_size = block_size
        self._dtype = dtype
        num_bytes = max(_LEAST_WORKSPACE_BYTES, _split_bytes(shape, device))
        self._workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def bind(self, shape: AttentionShape) -> BoundPrompts:
        """For the layers of one shape."""
        wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
        return _PlannedWrapper(wrapper, shape, self._block_size, self._dtype)


class _PlannedWrapper:
    """One of FlashInfer's wrappers, for the layers of one shape."""

    def __init__(
        self, wrapper: Any, shape: AttentionShape, block_size: int, dtype: torch.dtype
    ) -> None:
        self._wrapper = wrapper
        self._shape = shape
        self._block_size = block_size
        self._dtype = dtype
        self._planned: torch.cuda.Event | None = None

    def plan(self, part: PromptPart, paged: PagedSpans) -> None:
        """Which blocks each prompt reads, and how its tiles are shared out over the device."""
        size, device = self._block_size, paged.block_tables_RB.device
        counts = [-(-context // size) for context in part.context_lens]
        lasts = [c - (n - 1) * size for c, n in zip(part.context_lens, counts, strict=True)]
        width = paged.block_tables_RB.shape[1]
        places = [place * width + j for place, n in enumerate(counts) for j in range(n)]
        blocks = own_tables(part, paged).view(-1)
        indices = blocks.index_select(0, on_device(places, torch.int32, device))
        if self._planned is not None:
            # The wrapper has one pinned buffer, which the last plan may still be copied from.
            self._planned.synchronize()
        layout = self._shape.layout
        self._wrapper.plan(
            on_host(part.starts, device), on_host([0, *accumulate(counts)], device), indices,
            on_host(lasts, device), layout.num_heads, layout.num_kv_heads, self._shape.head_dim,
            size, causal=True, sm_scale=self._shape.head_dim**-0.5,
            window_left=self._shape.window_left, q_data_type=self._dtype, kv_data_type=self._dtype,
        )  # fmt: skip
        if device.type == "cuda":
            self._planned = self._planned or torch.cuda.Event()
            self._planned.record()

    def run(
        self,
        query_PHD: torch.Tensor,
        cache: LayerKV,
        out_PHD: torch.Tensor,
        lse_PH: torch.Tensor | None,
    ) -> None:
        """One layer of the step that was planned last."""
        keys, values = keys_by_block(cache, self._block_size).transpose(1, 2).unbind(0)
        if lse_PH is None:
            self._wrapper.run(query_PHD, (keys, values), out=out_PHD)
            return
        _, lse = self._wrapper.run(query_PHD, (keys, values), out=out_PHD, return_lse=True)
        torch.mul(lse, math.log(2.0), out=lse_PH)


def load_flashinfer(
    block_size: int, device: torch.device, dtype: torch.dtype, shape: AttentionShape
) -> tuple[FlashInferPrompts | None, str]:
    """(kernel, ""), or (None, why not). Imports flashinfer: whoever calls has a GPU to try it."""
    try:
        import flashinfer  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name == "flashinfer":
            return None, "flashinfer is not installed"
        return None, f"flashinfer cannot be imported: {first_line(error)}"
    except Exception as failure:  # a broken installation raises anything
        return None, f"flashinfer cannot be imported: {first_line(failure)}"
    try:
        return FlashInferPrompts(flashinfer, block_size, device, dtype, shape), ""
    except Exception as failure:  # no memory for its workspace
        return None, f"flashinfer cannot be set up: {first_line(failure)}"


def _split_bytes(shape: AttentionShape, device: torch.device) -> int:
    """What its scheduler asks for where it splits keys: float32 tiles of `_TILE_ROWS` rows and
    their log-sum-exp, for all query heads of as many tiles as two a processor."""
    if device.type != "cuda":
        return 0
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    num_tiles = 2 * num_processors // max(1, shape.layout.num_kv_heads)
    return shape.layout.num_heads * num_tiles * _TILE_ROWS * (shape.head_dim + 1) * 4
