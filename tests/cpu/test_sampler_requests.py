"""What a request may ask of its tokens, any two things together: penalties as transformers does
them, masks, and log-probabilities of drawn and of prompt tokens."""

from collections.abc import Iterator, Mapping
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.sampling_ranks import (
    edited,
    is_the_draw,
    ranges_of,
    rows_of,
    sample_once,
    slow_distribution,
)
from tpinfer.decoding.logit_edits import edit_logits
from tpinfer.layers.step_inputs import PromptRow, SamplingRow
from tpinfer.steps.plan import SamplingRecord

V = 1504
CHOICES: dict[str, tuple[dict[str, Any], ...]] = {
    "temperature": ({"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 2.5}),
    "top_k": ({}, {"top_k": 20}, {"top_k": 1200}),
    "top_p": ({}, {"top_p": 0.5}, {"top_p": 0.97}),
    "min_p": ({}, {"min_p": 0.03}),
    "repetition": ({}, {"repetition_penalty": 1.4}),
    "frequency": ({}, {"frequency_penalty": -0.7}),
    "presence": ({}, {"presence_penalty": 1.1}),
    "bias": ({}, {"logit_bias": ((3, 4.0), (9, -5.0), (1500, 2.0))}),
    "allowed": ({}, {"allowed_token_ids": tuple(range(2, V, 3))}),
    "banned": ({}, {"banned_token_ids": (2, 7, 8, 900)}),
    "min_tokens": ({}, {"min_tokens": 20, "stop_token_ids": (5, 11, 1400)}),
    "logprobs": ({}, {"num_logprobs": 0}, {"num_logprobs": 4}),
}
"""One or more values of every parameter."""


def covering_rows(choices: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Few combinations that hold every pair of two parameters' values: each is filled greedily with
    the values that cover most pairs still missing."""
    names = list(choices)
    missing = {
        ((one, i), (other, j))
        for one, other in combinations(names, 2)
        for i, j in product(range(len(choices[one])), range(len(choices[other])))
    }
    while missing:
        (one, i), (other, j) = min(missing)
        picked = {one: i, other: j}
        for name in names:
            if name not in picked:
                picked[name] = max(
                    range(len(choices[name])),
                    key=lambda k, name=name: len(pairs_with(picked, name, k, names) & missing),
                )
        missing -= {((a, picked[a]), (b, picked[b])) for a, b in combinations(names, 2)}
        yield {key: value for name in names for key, value in choices[name][picked[name]].items()}


def pairs_with(picked: dict[str, int], name: str, k: int, names: list[str]) -> set[Any]:
    """The pairs that value `k` of `name` makes with what is picked already."""
    order = names.index
    return {
        ((a, picked[a]), (name, k)) if order(a) < order(name) else ((name, k), (a, picked[a]))
        for a in picked
    }


PAIRS = list(covering_rows(CHOICES))
ALL = [
    {key: value for one in chosen for key, value in one.items()}
    for chosen in product(*CHOICES.values())
]


def check_requests(requests: list[dict[str, Any]], seed: int) -> None:
    """Draw for all requests in one batch on three ranks, and hold every one to the slow sampler, to
    what it draws alone on one rank, and to torch's log-softmax."""
    logits = torch.randn(len(requests), V, generator=torch.Generator().manual_seed(seed)) * 3
    rows = rows_of([SamplingRecord(**one, seed=seed + i) for i, one in enumerate(requests)], 17)
    found = sample_once(logits, rows, ranges_of(V, 496, 1008))
    for i, (request, row) in enumerate(zip(requests, rows, strict=True)):
        slow = slow_distribution(logits[i], row)
        if not (slow.borderline & (slow.probabilities > 1e-9)).any():
            assert is_the_draw(found.tokens[i], row, slow, 1e-4), request
        told = found.logprobs[i] if found.logprobs else None
        assert (told is None) == ("num_logprobs" not in request)
        if told is not None:
            expected = torch.log_softmax(logits[i].double(), 0)
            assert told.token_id == found.tokens[i]
            assert told.logprob == pytest.approx(float(expected[told.token_id]), abs=1e-6)
            top = expected.topk(row.record.num_logprobs)
            assert told.top_token_ids == tuple(top.indices.tolist())
            assert told.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-6)
        if i % 7 == 0:
            alone = sample_once(logits[i : i + 1], [row], ranges_of(V))
            assert (alone.tokens, alone.logprobs or [None]) == ([found.tokens[i]], [told]), request


def test_the_suite_covers_every_pair() -> None:
    assert len(PAIRS) < 40 < len(ALL)
    for one, other in combinations(CHOICES, 2):
        for a, b in product(CHOICES[one], CHOICES[other]):
            wanted = {**a, **b}.items()
            assert any(wanted <= request.items() for request in PAIRS), wanted


@pytest.mark.parametrize("seed", range(4))
def test_any_two_parameters_together(seed: int) -> None:
    check_requests(PAIRS, 1000 * seed)


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(32))
def test_all_parameters_together(part: int) -> None:
    requests = ALL[part::32]
    for start in range(0, len(requests), 64):
        check_requests(requests[start : start + 64], 10_000 * part + start)


@given(
    st.lists(st.integers(0, 59), min_size=1, max_size=40),
    st.sampled_from([0.5, 1.0, 1.3]),
    st.sampled_from([-1.5, 0.0, 0.8]),
    st.sampled_from([-0.5, 0.0, 2.0]),
    st.integers(0, 60),
)
@settings(max_examples=60)
def test_penalties_are_transformers_and_openais(
    history: list[int], repetition: float, frequency: float, presence: float, cut: int
) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    num_prompt = len(history) // 2
    logits = torch.randn(60, generator=torch.Generator().manual_seed(len(history)))
    record = SamplingRecord(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence
    )
    row = SamplingRow(record, len(history), torch.tensor(history), num_prompt)
    theirs: Any = RepetitionPenaltyLogitsProcessor(repetition)
    expected = theirs(torch.tensor([history]), logits.clone().unsqueeze(0))[0]
    counts = torch.bincount(torch.tensor(history[num_prompt:], dtype=torch.int64), minlength=60)
    expected = expected - frequency * counts - presence * (counts > 0)
    found = [logits[:cut].clone(), logits[cut:].clone()]
    for part, first in zip(found, (0, cut), strict=True):
        edit_logits(part, row, first)
    torch.testing.assert_close(torch.cat(found), expected.float(), atol=1e-5, rtol=1e-5)


@given(st.integers(0, 1 << 20), st.integers(1, V - 1))
@settings(max_examples=20)
def test_edits_do_not_depend_on_the_cut(seed: int, cut: int) -> None:
    logits = torch.randn(V, generator=torch.Generator().manual_seed(seed))
    for request in PAIRS:
        [row] = rows_of([SamplingRecord(**request)], 17)
        whole, left, right = logits.clone(), logits[:cut].clone(), logits[cut:].clone()
        edit_logits(whole, row, 0)
        edit_logits(left, row, 0)
        edit_logits(right, row, cut)
        assert torch.equal(torch.cat((left, right)), whole)
        torch.testing.assert_close(whole.double(), edited(logits, row), atol=1e-5, rtol=1e-5)


def test_stop_tokens_may_come_once_enough_were_generated() -> None:
    logits = torch.zeros(1, 50)
    logits[0, 11] = 9
    record = SamplingRecord(0.0, min_tokens=4, stop_token_ids=(11,))
    found = [
        sample_once(logits, rows_of([record], position), ranges_of(50, 16)).tokens[0]
        for position in (5, 8, 9, 10)
    ]
    assert found == [0, 0, 11, 11], "the prompt has 5 tokens"


@pytest.mark.parametrize("cuts", [(), (496,), (16, 496, 1008)])
def test_prompt_tokens_have_the_log_probabilities_of_the_softmax(cuts: tuple[int, ...]) -> None:
    """Two prompts of one step, more tokens than one pass of the head takes."""
    torch.manual_seed(3)
    logits = torch.randn(100, V) * 3
    logits[90, 7] = float("nan")
    targets = torch.randint(0, V, (96,))
    prompts = [PromptRow(0, 1, 2, targets[:70], 3), PromptRow(1, 1, 74, targets[70:], 0)]
    found = sample_once(
        torch.zeros(1, V), rows_of([SamplingRecord(0.0)]), ranges_of(V, *cuts), prompts, logits
    )
    assert [len(one) for one in found.prompt_logprobs] == [70, 26]
    places = [*range(2, 72), *range(74, 100)]
    told = [one for row in found.prompt_logprobs for one in row]
    assert [one.token_id for one in told] == targets.tolist()
    for i, (place, one) in enumerate(zip(places, told, strict=True)):
        if place == 90:
            assert one.logprob != one.logprob, "NaN is told, and harms no other token"
            continue
        expected = torch.log_softmax(logits[place].double(), 0)
        assert one.logprob == pytest.approx(float(expected[one.token_id]), abs=1e-6)
        top = expected.topk(3 if i < 70 else 0)
        assert one.top_token_ids == tuple(top.indices.tolist())
        assert one.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-6)


def test_log_probabilities_are_the_same_bits_for_any_cut() -> None:
    torch.manual_seed(8)
    logits, prompt = torch.randn(6, V) * 5, torch.randn(9, V) * 5
    rows = rows_of([SamplingRecord(num_logprobs=4, seed=i) for i in range(6)])
    prompts = [PromptRow(0, 1, 1, torch.arange(8), 5)]
    found = [
        sample_once(logits, rows, ranges_of(V, *cuts), prompts, prompt)
        for cuts in ((), (16,), (777,), (1, 400, 1501))
    ]
    assert found[1:] == found[:-1]
