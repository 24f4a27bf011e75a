"""The prompts of a step as libraries' kernels take them: the sequences that bring more query tokens
than are decoded, where their rows lie among the step's, and their blocks.

Shapes: P prompts, S sequences of the step, T its query tokens, B blocks, K local KV heads, D head
dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from tpinfer.attention.interface import PagedSpans, StepSpans
from tpinfer.attention.paged_kv import LayerKV

MOST_DECODE_TOKENS = 8
"""Query tokens a sequence may bring to be decoded: its last one and drafts behind it."""


@dataclass(frozen=True, slots=True)
class PromptPart:
    """The prompts of one step, in the order of their query tokens. On the host."""

    places: tuple[int, ...]
    """P: index of each among the step's sequences."""
    first_tokens: tuple[int, ...]
    """P: first query token of each within the step's T."""
    query_lens: tuple[int, ...]
    """P: query tokens of each; they are the last ones of its context."""
    context_lens: tuple[int, ...]
    """P: tokens that each attends to at its last query token, itself included."""

    @property
    def starts(self) -> list[int]:
        """P + 1: first query token of each among the prompts' own, and how many these are."""
        return [0, *accumulate(self.query_lens)]

    @property
    def rows(self) -> slice | None:
        """The prompts' query tokens within the step's T; None where others lie between them."""
        lasts = [a + b for a, b in zip(self.first_tokens, self.query_lens, strict=True)]
        if any(last != first for last, first in zip(lasts, self.first_tokens[1:], strict=False)):
            return None
        return slice(self.first_tokens[0], lasts[-1])

    def row_numbers(self) -> list[int]:
        """The same one by one."""
        parts = zip(self.first_tokens, self.query_lens, strict=True)
        return [number for first, count in parts for number in range(first, first + count)]


def prompt_part(spans: StepSpans) -> PromptPart | None:
    """The prompts of a step; None where there is none, or the host does not know its sequences."""
    found = [
        (place, span.first_token, span.num_tokens, span.context_len)
        for place, span in enumerate(spans.sequences)
        if span.num_tokens > MOST_DECODE_TOKENS
    ]
    return PromptPart(*zip(*found, strict=True)) if found else None


def keys_by_block(cache: LayerKV, block_size: int) -> torch.Tensor:
    """[2, K, B, block_size, D] view of a layer's keys and values, without the spare slot."""
    values_2KSD = cache.values_2KSD
    num_slots = values_2KSD.shape[2] // block_size * block_size
    return values_2KSD.narrow(2, 0, num_slots).unflatten(2, (-1, block_size))


def own_tables(part: PromptPart, paged: PagedSpans) -> torch.Tensor:
    """int32 [P, blocks]: the prompts' rows of the block tables."""
    tables_RB = paged.block_tables_RB
    places = on_device(part.places, torch.int32, tables_RB.device)
    return tables_RB.index_select(0, paged.rows_S.index_select(0, places))


def on_host(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """int32 column that a copy to `device` need not wait for."""
    column = torch.tensor(numbers, dtype=torch.int32)
    return column.pin_memory() if device.type == "cuda" else column


def on_device(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A column on the device, by a copy that the host does not wait for."""
    column = torch.tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return column
    return column.pin_memory().to(device, non_blocking=True)
