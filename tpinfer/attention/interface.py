"""What an attention backend is told about a step, and the shape of the calls it answers.

Shapes: T tokens of the step, H local query heads, K local KV heads, S slots, D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tpinfer.attention.paged_kv import KeyRange, LayerKV


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence's part of a step."""

    first_token: int
    """Its first query token within the step's T tokens."""
    num_tokens: int
    """Query tokens; they are the last ones of its context."""
    context_len: int
    """Tokens it attends to at its last query token, itself included."""
    keys: KeyRange
    """Where its whole context lies, as far as this rank holds it; only positions still held."""
    window_keys: KeyRange | None
    """The same for layers that slide: nothing before the first query token's window."""

    def keys_of(self, window: int | None) -> KeyRange:
        """What a layer with this sliding window reads."""
        return self.keys if window is None or self.window_keys is None else self.window_keys


@dataclass(frozen=True, slots=True)
class PagedSpans:
    """The sequences of a step as kernels on a device read them. S sequences, some of them padding:
    of no query token, or of one that attends to nothing.

    The tensors are buffers that stay where they are from step to step, so that a recorded step
    finds the next one's values in them; their rows beyond S may hold anything.
    """

    block_tables_RB: torch.Tensor
    """int32 [rows, blocks]: of each row of the row store, the local number of the block that this
    rank holds at logical block j * g + place, for j from 0, where g ranks share a KV head. Entries
    that no context reaches may hold anything."""
    rows_S: torch.Tensor
    """int32 [S]: row of each sequence."""
    first_tokens_S1: torch.Tensor
    """int32 [S + 1]: first query token of each sequence within the step's T, and T."""
    context_lens_S: torch.Tensor
    """int32 [S]: tokens that each attends to at its last query token, itself included; 0 for
    padding, whose output is 0."""
    num_sequences: int
    max_query_len: int
    """No sequence brings more query tokens."""
    max_context_len: int
    """No sequence attends to more tokens."""


@dataclass(frozen=True, slots=True)
class StepSpans:
    """The sequences of a step in the order of their query tokens."""

    sequences: Sequence[SequenceSpan]
    """For backends that walk them on the host. Empty in a recorded step."""
    paged: PagedSpans | None = None
    """For backends that read them on the device; None where nobody does."""


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """How a rank's query heads sit on its KV heads."""

    num_heads: int
    num_kv_heads: int
    group_size: int
    """Query heads of the whole model that read one KV head."""
    offset: int
    """Place of the first local query head inside the group of the first local KV head."""

    @property
    def is_whole(self) -> bool:
        """Whether every local KV head has its whole group of query heads here."""
        return self.num_heads == self.num_kv_heads * self.group_size


AttentionCall = Callable[[torch.Tensor, LayerKV, StepSpans], torch.Tensor]
"""(query [T, H, D], layer cache, spans) -> [T, H, D]."""

PartialAttentionCall = Callable[
    [torch.Tensor, LayerKV, StepSpans], tuple[torch.Tensor, torch.Tensor]
]
"""(query [T, H, D], layer cache, spans) -> (out [T, H, D], log-sum-exp float32 [T, H]) of the keys
that this rank holds. A query that sees none of them has log-sum-exp -inf and out 0. Softmax over
all keys is then exp(lse) out summed over the ranks, divided by exp(lse) summed (FlashAttention,
arXiv 2205.14135, section 3.1)."""


class AttentionBackend(Protocol):
    """What binds the attention of one layer: (layout, head_dim, window), where `window` is the
    sliding window in tokens and None is full attention."""

    reads_paged: bool
    """Whether its calls need `StepSpans.paged`."""

    def bind_attention(
        self, layout: HeadLayout, head_dim: int, window: int | None
    ) -> AttentionCall:
        """Over all keys of a sequence."""
        ...

    def bind_partial_attention(
        self, layout: HeadLayout, head_dim: int, window: int | None
    ) -> PartialAttentionCall:
        """Over the keys this rank holds, for whole groups of heads."""
        ...
