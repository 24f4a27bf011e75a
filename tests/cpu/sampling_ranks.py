"""The sampler on ranks that are threads, and a slow sampler that is easy to believe, for the
sampler's tests."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from tests.cpu.thread_ranks import ThreadExchange
from tpinfer.attention.interface import StepSpans
from tpinfer.decoding.native_passes import load_native_passes
from tpinfer.decoding.random_numbers import uniform
from tpinfer.decoding.sampler import bind_sampler
from tpinfer.decoding.vocab_passes import TorchPasses
from tpinfer.layers.step_inputs import Activations, PromptRow, SamplingRow, StepInputs
from tpinfer.sharding.spec import Range
from tpinfer.steps.logprobs import TokenLogprobs
from tpinfer.steps.plan import SamplingRecord
from tpinfer.steps.sampling_record import is_plain_greedy

NATIVE = load_native_passes(1)[0] or TorchPasses()
EMPTY = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Sampled:
    """What one rank found."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[list[TokenLogprobs]]


def ranges_of(vocab_size: int, *cuts: int) -> list[Range]:
    """Half-open ranges of the vocabulary between `cuts`."""
    return list(pairwise((0, *cuts, vocab_size)))


def rows_of(records: Sequence[SamplingRecord], position: int = 9) -> list[SamplingRow]:
    """A row of each record, with a history of `position` tokens, 5 of them the prompt's."""
    history = torch.tensor([1, 2, 3, 7, 7, 9, 40, 9, 9, 1] * (1 + position // 10))[:position]
    return [SamplingRow(record, position, history, min(5, position)) for record in records]


def sample_once(
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    ranges: Sequence[Range],
    prompts: Sequence[PromptRow] = (),
    prompt_logits: torch.Tensor | None = None,
) -> Sampled:
    """Every rank's result, which has to be the same; logits are float32 [R, V], prompt_logits those
    of the step's tokens, [T, V]."""
    exchange, found = ThreadExchange(len(ranges)), {}

    def work(rank: int) -> None:
        start, stop = ranges[rank]

        def all_gather(out: torch.Tensor, t: torch.Tensor) -> None:
            out.copy_(torch.stack(exchange.swap(rank, t)))

        def any_logits(acts: Activations, tokens: torch.Tensor) -> torch.Tensor:
            assert prompt_logits is not None
            return prompt_logits[tokens, start:stop].contiguous()

        acts = Activations()
        acts.logits = logits[:, start:stop].clone()
        step: dict[str, Any] = dict.fromkeys(("token_ids", "positions", "slots"), EMPTY)
        step |= {
            "cos": EMPTY,
            "sin": EMPTY,
            "spans": StepSpans(()),
            "logit_rows": EMPTY,
            "drawn": EMPTY,
        }
        is_plain = all(is_plain_greedy(row.record) for row in rows)
        inputs = StepInputs(**step, sampling=rows, all_greedy=is_plain, prompt_rows=prompts)
        try:
            passes = NATIVE if rank % 2 == 0 else TorchPasses()  # ranks have to agree all the same
            for op in bind_sampler(all_gather, ranges, rank, any_logits, passes):
                op.call(acts, inputs)
            found[rank] = Sampled(acts.tokens.tolist(), acts.logprobs, acts.prompt_logprobs)
        except BaseException:
            exchange.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(1, len(ranges))]
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == len(ranges), "a rank failed"
    assert all(repr(found[rank]) == repr(found[0]) for rank in found), "ranks disagree"
    return found[0]


@dataclass(frozen=True)
class Slow:
    """The distribution a row draws from, worked out step by step in float64."""

    probabilities: torch.Tensor
    """[V]; zero where filters took the token out."""
    order: torch.Tensor
    """int64 [V]: tokens by falling logit, equal ones by rising id."""
    borderline: torch.Tensor
    """bool [V]: tokens so near the edge of min-p or top-p that rounding may decide."""


def edited(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """float64 [V] after masks, bias and penalties, one token at a time."""
    record, found = row.record, logits.double().clone()
    history = row.token_ids.tolist()
    generated = history[row.num_prompt_tokens :]
    never = set(record.banned_token_ids)
    if len(generated) < record.min_tokens:
        never |= set(record.stop_token_ids)
    biases = dict(record.logit_bias)
    for token in range(found.shape[0]):
        value = float(found[token])
        if token in never or token not in (record.allowed_token_ids or range(found.shape[0])):
            value = float("-inf")
        value += biases.get(token, 0.0)
        if token in history:
            penalty = record.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        if token in generated:
            value -= record.frequency_penalty * generated.count(token) + record.presence_penalty
        found[token] = value
    return found


def slow_distribution(logits: torch.Tensor, row: SamplingRow) -> Slow:
    """What the row may draw. The order of tokens is that of float32 logits: edits round there."""
    record, values = row.record, edited(logits, row)
    order = torch.sort(values.float(), descending=True, stable=True).indices
    chances = torch.softmax(values / (record.temperature or 1), 0)[order]
    if not record.temperature:
        chances = (torch.arange(len(order)) == 0).double()
    share = chances / chances[0]
    borderline = (share / max(record.min_p, 1e-30) - 1).abs() < 1e-4
    chances = chances * (share >= record.min_p)
    if record.top_k:
        chances[record.top_k :] = 0
    chances = chances / chances.sum()
    before = chances.cumsum(0) - chances
    if record.top_p < 1:
        borderline |= (before - record.top_p).abs() < 1e-5
        chances = chances * (before < record.top_p)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    chances = chances / chances.sum()
    return Slow(chances[back], order, borderline[back])


def is_the_draw(token: int, row: SamplingRow, slow: Slow, tolerance: float = 1e-5) -> bool:
    """Whether the row's random number falls on `token`, by token id or by falling probability, as
    far as float32 can tell."""
    record = row.record
    if not record.temperature:
        return token == int(slow.order[0])
    number = uniform(record.seed, record.index, row.position)
    by_id = slow.probabilities.cumsum(0)
    by_rank = slow.probabilities[slow.order].cumsum(0)
    place = int((slow.order == token).nonzero())
    chance = float(slow.probabilities[token])
    ends = float(by_id[token]), float(by_rank[place])
    return any(end - chance - tolerance <= number <= end + tolerance for end in ends)
