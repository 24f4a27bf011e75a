"""What a step hands to every op of the program, and the buffers the ops pass on to each other.

Shapes: T tokens, R logit rows, D head dim, M hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tpinfer.attention.interface import SequenceSpan

NO_TOKEN = -1
"""Stands for the token of a row whose logits are not numbers."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one logit row picks its token."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    index: int
    """Which of a request's n continuations this is."""
    position: int
    """Position the new token will take; with seed and index it keys the random number."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Tensors and spans of one step."""

    token_ids: torch.Tensor
    """int64 [T]."""
    positions: torch.Tensor
    """int64 [T]."""
    slots: torch.Tensor
    """int64 [T]: cache slot each token's key and value are written to; the spare one where another
    rank holds the token's block."""
    cos: torch.Tensor
    """compute dtype [T, 1, D]."""
    sin: torch.Tensor
    """compute dtype [T, 1, D], first half negated."""
    spans: Sequence[SequenceSpan]
    logit_rows: torch.Tensor
    """int64 [R]: tokens whose logits are needed."""
    drawn: torch.Tensor
    """int64 [R]: where in the rows' token buffer each drawn token goes."""
    sampling: Sequence[SamplingRow]
    """One per logit row."""
    all_greedy: bool
    """Every row picks its likeliest token, so that no rank needs the whole vocabulary."""


class Activations:
    """The named buffers of one step: each op reads some and sets one. Nothing survives the step."""

    __slots__ = (
        "best",
        "delta",
        "gate_up",
        "gated",
        "hidden",
        "logits",
        "mixed",
        "partial",
        "qkv",
        "queries",
        "residual",
        "tokens",
    )

    residual: torch.Tensor
    """[T, M] the stream that every layer adds to."""
    delta: torch.Tensor
    """[T, M] what the last attention or MLP adds to it."""
    hidden: torch.Tensor
    """[T, M] normed input of the next linear; [R, M] behind the final norm."""
    qkv: torch.Tensor
    """[T, (H + 2K) * D] local queries, keys and values."""
    queries: torch.Tensor
    """[g, T, W * D] rotated queries of the g ranks that share a KV head, padded to W heads."""
    partial: torch.Tensor
    """float32 [g, T, W, D + 1] attention over this rank's keys, log-sum-exp in the last column."""
    mixed: torch.Tensor
    """[T, H * D] attention output of the local heads."""
    gate_up: torch.Tensor
    """[T, 2F] local gate and up columns."""
    gated: torch.Tensor
    """[T, F] silu(gate) * up."""
    logits: torch.Tensor
    """float32 [R, V] after the gather, local columns before it."""
    best: torch.Tensor | None
    """int64 [R] likeliest tokens when every row is greedy and the head is sharded."""
    tokens: torch.Tensor
    """int64 [R] sampled tokens."""


OpCall = Callable[[Activations, StepInputs], None]


@dataclass(frozen=True, slots=True)
class Op:
    """One entry of the flat program."""

    id: str
    """The ledger prices the op under this id."""
    call: OpCall
    blank: OpCall | None = None
    """For a collective: give it empty input, so that a rank which cannot do the step still takes
    part and nobody waits."""
