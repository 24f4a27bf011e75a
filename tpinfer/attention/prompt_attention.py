"""A library's kernel for the prompts of a step, as `TritonAttention` calls it: which heads it may
serve, which rows it is given, and what happens where it fails.

Decode rows never come here. Shapes: T query tokens of the step, P of them prompts', H local query
heads, D head dim.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from tpinfer.attention.interface import HeadLayout, PagedSpans, StepSpans
from tpinfer.attention.paged_kv import LayerKV
from tpinfer.attention.prompt_part import PromptPart, on_device, prompt_part


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a layer's attention is bound for."""

    layout: HeadLayout
    head_dim: int
    window: int | None = None
    """Sliding window in tokens; None is full attention."""

    @property
    def window_left(self) -> int:
        """Tokens before a query's own that it sees, as libraries count them; -1 is all."""
        return -1 if self.window is None else self.window - 1

    @property
    def has_whole_groups(self) -> bool:
        """Whether query head h reads KV head h // group size, as libraries take it to."""
        return self.layout.is_whole and self.layout.offset == 0

    def words(self) -> str:
        """For people."""
        heads = f"{self.layout.num_heads} heads over {self.layout.num_kv_heads} of {self.head_dim}"
        return heads if self.window is None else f"{heads} in a window of {self.window}"


class BoundPrompts(Protocol):
    """A library's attention of all layers of one shape."""

    def plan(self, part: PromptPart, paged: PagedSpans) -> None:
        """Get ready for the layers of a step."""
        ...

    def run(
        self,
        query_PHD: torch.Tensor,
        cache: LayerKV,
        out_PHD: torch.Tensor,
        lse_PH: torch.Tensor | None,
    ) -> None:
        """One layer of the step that was planned last. query_PHD: last dim contiguous; out_PHD
        contiguous and of its dtype; lse_PH float32, natural logarithms, where they are wanted."""
        ...


class PromptKernel(Protocol):
    """A library's attention for prompts over a cache of whole blocks in the compute dtype."""

    @property
    def name(self) -> str:
        """Of the library and its version, for people."""
        ...

    def bind(self, shape: AttentionShape) -> BoundPrompts:
        """For the layers of one shape. Raises what the library raises where it has no kernel."""
        ...


PromptCall = Callable[
    [torch.Tensor, LayerKV, StepSpans, torch.Tensor, torch.Tensor | None], bool
]  # fmt: skip
"""(query [T, H, D], layer cache, spans, out [T, H, D], log-sum-exp [T, H] or None) -> whether the
rows of prompts were computed; the others are left alone."""
Proof = Callable[[AttentionShape], str]
"""Why a kernel is not right for a shape; nothing where it is."""


class PromptAttention:
    """A library's kernel for the shapes it has been held against plain torch for."""

    def __init__(self, kernel: PromptKernel, prove: Proof) -> None:
        """`prove` tries the kernel on a shape, once for each."""
        self.name = kernel.name
        self._kernel = kernel
        self._prove = prove
        self._refused: dict[AttentionShape, str] = {}
        self._served: dict[AttentionShape, PromptsOfShape | None] = {}

    def bind(self, layout: HeadLayout, head_dim: int, window: int | None) -> PromptCall | None:
        """What computes the prompts of a layer; None, having said why, where the library may not.
        Layers of one shape share it, and with it a step's plan."""
        shape = AttentionShape(layout, head_dim, window)
        if shape not in self._served:
            self._served[shape] = self._serve(shape)
        return self._served[shape]

    def _serve(self, shape: AttentionShape) -> "PromptsOfShape | None":
        why = self.why_not(shape)
        if not why:
            try:
                return self.new(shape)
            except Exception as failure:  # no memory, behind the cache's
                why = f"raised {first_line(failure)}"
        _tell(f"prompts of {shape.words()} go through the Triton kernel: {self.name} {why}")
        return None

    def new(self, shape: AttentionShape) -> "PromptsOfShape":
        """For the layers of a shape, which has been proved. Raises what the library raises."""
        return PromptsOfShape(self.name, self._kernel.bind(shape))

    def why_not(self, shape: AttentionShape) -> str:
        """Why the library does not serve a shape; nothing where it does."""
        if not shape.has_whole_groups:
            return "reads whole groups of query heads"
        if shape not in self._refused:
            self._refused[shape] = self._prove(shape)
        return self._refused[shape]


class PromptsOfShape:
    """The prompts of all layers of one shape; a step is planned when the first of them asks."""

    def __init__(self, name: str, bound: BoundPrompts) -> None:
        self._name = name
        self._bound = bound
        self._spans: StepSpans | None = None
        self._part: PromptPart | None = None
        self._rows: slice | torch.Tensor = slice(0)
        self._has_failed = False

    def __call__(
        self,
        query_THD: torch.Tensor,
        cache: LayerKV,
        spans: StepSpans,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor | None,
    ) -> bool:
        """As `PromptCall`. A library that raises is not asked again."""
        if self._has_failed:
            return False
        try:
            return self.attend(query_THD, cache, spans, out_THD, lse_TH)
        except Exception as failure:  # whatever a library raises; the step goes on without it
            self._has_failed = True
            what = f"{self._name} raised {first_line(failure)}"
            _tell(f"prompts go through the Triton kernel from here on: {what}")
            return False

    def attend(
        self,
        query_THD: torch.Tensor,
        cache: LayerKV,
        spans: StepSpans,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor | None,
    ) -> bool:
        """The same, raising what the library raises."""
        if spans is not self._spans:
            self._plan(spans)
        if self._part is None:
            return False
        rows = self._rows
        if isinstance(rows, slice):
            lse_PH = None if lse_TH is None else lse_TH[rows]
            self._bound.run(query_THD[rows], cache, out_THD[rows], lse_PH)
            return True
        query_PHD = query_THD.index_select(0, rows)
        out_PHD = torch.empty_like(query_PHD, memory_format=torch.contiguous_format)
        lse_PH = None if lse_TH is None else lse_TH.new_empty(query_PHD.shape[:2])
        self._bound.run(query_PHD, cache, out_PHD, lse_PH)
        out_THD.index_copy_(0, rows, out_PHD)
        if lse_TH is not None and lse_PH is not None:
            lse_TH.index_copy_(0, rows, lse_PH)
        return True

    def _plan(self, spans: StepSpans) -> None:
        """Held by its spans, which are one object for all layers of a step and no other's."""
        self._spans, self._part = spans, prompt_part(spans)
        if self._part is None:
            return
        assert spans.paged is not None, "who reads block tables is given them"
        rows, device = self._part.rows, spans.paged.block_tables_RB.device
        if rows is None:
            rows = on_device(self._part.row_numbers(), torch.int64, device)
        self._rows = rows
        self._bound.plan(self._part, spans.paged)


def first_line(failure: Exception) -> str:
    """What an exception says, in one line of at most 160 characters."""
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:160]


def _tell(words: str) -> None:
    warnings.warn(words, RuntimeWarning, stacklevel=3)
