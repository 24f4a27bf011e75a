"""Prompts through torch's `varlen_attn`, which reads block tables from torch 2.12 on.

The cache's blocks are given as they lie, as views [blocks, block_size, K, D]. Keys are never split
over programs (`num_splits=1`): its FA2 leaves rows unwritten where it splits a paged cache
(pytorch issue 194167). FA2 also wants blocks of a multiple of 256 tokens, and raises at others.

Shapes: P query tokens, H local query heads, K local KV heads, D head dim.
"""

import inspect
from itertools import accumulate
from typing import Any

import torch

from tpinfer.attention.interface import PagedSpans
from tpinfer.attention.paged_kv import LayerKV
from tpinfer.attention.prompt_attention import AttentionShape, BoundPrompts, first_line
from tpinfer.attention.prompt_part import PromptPart, keys_by_block, on_device, own_tables


class VarlenPrompts:
    """`varlen_attn` as a `PromptKernel`."""

    def __init__(self, varlen: Any, block_size: int) -> None:
        """`varlen` is the module torch.nn.attention.varlen, or one with its functions."""
        self.name = f"torch {torch.__version__.partition('+')[0]}'s varlen_attn"
        self._varlen = varlen
        self._block_size = block_size

    def bind(self, shape: AttentionShape) -> BoundPrompts:
        """For the layers of one shape."""
        return _PlannedVarlen(self._varlen, shape, self._block_size)


class _PlannedVarlen:
    """The layers of one shape."""

    def __init__(self, varlen: Any, shape: AttentionShape, block_size: int) -> None:
        self._varlen = varlen
        self._shape = shape
        self._block_size = block_size
        self._arguments: tuple[Any, ...] = ()
        self._paging: dict[str, torch.Tensor] = {}

    def plan(self, part: PromptPart, paged: PagedSpans) -> None:
        """Have the lengths and block tables of a step's prompts on the device."""
        contexts, device = part.context_lens, paged.block_tables_RB.device
        first_keys = [0, *accumulate(contexts)]
        columns = on_device([*part.starts, *first_keys, *contexts], torch.int32, device)
        count = len(contexts)
        starts, keys, lens = columns.split([count + 1, count + 1, count])
        self._arguments = starts, keys, max(part.query_lens), max(contexts)
        self._paging = {"seqused_k": lens, "block_table": own_tables(part, paged)}

    def run(
        self,
        query_PHD: torch.Tensor,
        cache: LayerKV,
        out_PHD: torch.Tensor,
        lse_PH: torch.Tensor | None,
    ) -> None:
        """One layer of the step that was planned last."""
        blocks = keys_by_block(cache, self._block_size)
        keys, values = blocks.permute(0, 2, 3, 1, 4).unbind(0)
        wanted = None if lse_PH is None else self._varlen.AuxRequest(lse=True)
        found = self._varlen.varlen_attn_out(
            out_PHD, query_PHD, keys, values, *self._arguments, return_aux=wanted,
            scale=self._shape.head_dim**-0.5, window_size=(self._shape.window_left, 0),
            enable_gqa=True, num_splits=1, **self._paging,
        )  # fmt: skip
        if lse_PH is not None:
            lse_PH.copy_(found[1].transpose(0, 1))  # it comes as [H, P]


def load_varlen(block_size: int) -> tuple[VarlenPrompts | None, str]:
    """(kernel, ""), or (None, why not)."""
    version = torch.__version__.partition("+")[0]
    try:
        from torch.nn.attention import varlen
    except Exception as failure:  # older than 2.10, or built without
        return None, f"torch {version} has no varlen_attn: {first_line(failure)}"
    out = getattr(varlen, "varlen_attn_out", None)
    if out is None or "block_table" not in inspect.signature(out).parameters:
        return None, f"torch {version}'s varlen_attn knows no block tables"
    return VarlenPrompts(varlen, block_size), ""
