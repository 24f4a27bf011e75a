"""What a step hands to every op of the program, and the buffers the ops pass on to each other.

Shapes: T tokens, R logit rows, D head dim, M hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tpinfer.attention.interface import StepSpans
from tpinfer.steps.logprobs import TokenLogprobs
from tpinfer.steps.plan import SamplingRecord

NO_TOKEN = -1
"""Stands for the token of a row whose logits are not numbers."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one logit row picks its token."""

    record: SamplingRecord
    position: int
    """Position the new token will take; with the record's seed and index it keys the random
    number."""
    token_ids: torch.Tensor
    """int64 [position]: prompt and generated so far. May be empty where the record has no
    penalties."""
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class PromptRow:
    """Prompt tokens of one sequence whose log-probabilities this step can tell."""

    row: int
    """Which row it is."""
    position: int
    """Of `target_ids[0]` in its sequence."""
    first_token: int
    """Place in the step's T tokens of the one whose logits predict `target_ids[0]`; the others
    follow it."""
    target_ids: torch.Tensor
    """int64 [n]: what stands at the next n positions of the prompt."""
    num_top: int
    """Likeliest tokens to report at each, 0 or more."""


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
    spans: StepSpans
    logit_rows: torch.Tensor
    """int64 [R]: tokens whose logits are needed."""
    drawn: torch.Tensor
    """int64 [R]: where in the rows' token buffer each drawn token goes."""
    sampling: Sequence[SamplingRow]
    """One per logit row."""
    all_greedy: bool
    """Every row is plain greedy: it takes the likeliest token of the model's own logits and reports
    nothing else. Nobody looks at the rows then."""
    prompt_rows: Sequence[PromptRow] = ()
    """Log-probabilities of prompt tokens to report."""


class Activations:
    """The named buffers of one step: each op reads some and sets one. Nothing survives the step."""

    __slots__ = (
        "deferred",
        "delta",
        "gate_up",
        "gated",
        "hidden",
        "logits",
        "logprobs",
        "mixed",
        "normed",
        "partial",
        "prompt_logprobs",
        "qkv",
        "queries",
        "residual",
        "sampling",
        "tokens",
    )

    residual: torch.Tensor
    """[T, M] the stream that every layer adds to."""
    delta: torch.Tensor | None
    """[T, M] what the last attention or MLP adds to it; None where it has added it already."""
    deferred: "tuple[torch.Tensor, float] | None"
    """(weight, eps) of a norm of residual that is left to the next product, instead of hidden."""
    hidden: torch.Tensor
    """[T, M] normed input of the next linear; [R, M] behind the final norm."""
    normed: bool
    """Whether the op before has added delta to residual and set hidden already, as a fused reduce
    does: the next norm then does nothing but clear this."""
    qkv: torch.Tensor
    """[T, (H + 2K) * D] local queries, keys and values."""
    queries: torch.Tensor
    """[g, T, W * D] rotated queries of the g ranks that share a KV head, padded to W heads."""
    partial: torch.Tensor
    """float32 [g, T, W, D + 1] attention over this rank's keys, log-sum-exp in the last column."""
    mixed: torch.Tensor
    """[T, H * D] attention output of the local heads."""
    gate_up: torch.Tensor | None
    """[T, 2F] local gate and up columns; None where gated is made of them already."""
    gated: torch.Tensor
    """[T, F] silu(gate) * up."""
    logits: torch.Tensor
    """float32 [R, local columns of V]; sampling may change them in place."""
    sampling: Any
    """What the sampling ops pass on to each other."""
    tokens: torch.Tensor
    """int64 [R] sampled tokens; NO_TOKEN where a row's logits are not numbers."""
    logprobs: list[TokenLogprobs | None]
    """[R] where a row asked for them; empty where none did."""
    prompt_logprobs: list[list[TokenLogprobs]]
    """Parallel to `prompt_rows`, one per target."""

    def __init__(self) -> None:
        self.normed = False
        self.deferred = None


OpCall = Callable[[Activations, StepInputs], None]


@dataclass(frozen=True, slots=True)
class Op:
    """One entry of the flat program."""

    id: str
    """The ledger prices the op under this id."""
    call: OpCall
    blank: OpCall | None = None
    """Gives the op empty input, so that a rank which cannot do the step still takes part in its
    collectives and nobody waits. Collectives have one; where another op has one, it and everything
    behind it runs on what it gave."""
