"""Sampling on sharded logits: distributions are right, keys alone decide, filters keep what they
say, and neither the cut of the vocabulary nor the batch changes a bit."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.sampling_ranks import (
    EMPTY,
    is_the_draw,
    ranges_of,
    rows_of,
    sample_once,
    slow_distribution,
)
from tpinfer.decoding.masses import factor_of
from tpinfer.decoding.ordered_keys import best_keys, top_keys
from tpinfer.decoding.random_numbers import uniform, uniforms
from tpinfer.layers.step_inputs import NO_TOKEN, SamplingRow
from tpinfer.steps.plan import SamplingRecord

NAN, INF = float("nan"), float("inf")
WHOLE = ranges_of(5)
LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0, 1.5]])
KINDS = {
    "greedy": SamplingRecord(0.0),
    "plain": SamplingRecord(),
    "cold": SamplingRecord(1e-3),
    "hot": SamplingRecord(3.0),
    "top-k": SamplingRecord(top_k=50),
    "large top-k": SamplingRecord(top_k=1500),
    "top-p": SamplingRecord(0.5, top_p=0.9),
    "wide top-p": SamplingRecord(3.0, top_p=0.95),
    "min-p": SamplingRecord(min_p=0.02),
    "top-k and top-p": SamplingRecord(top_k=40, top_p=0.8, min_p=0.01),
    "large top-k and top-p": SamplingRecord(2.0, top_k=1500, top_p=0.9),
    "penalties": SamplingRecord(
        repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.3, num_logprobs=3
    ),
    "masks": SamplingRecord(banned_token_ids=(3, 40), logit_bias=((7, 2.0), (9, -3.0))),
    "allowed": SamplingRecord(allowed_token_ids=(5, 9, 2000, 2999)),
    "no stop yet": SamplingRecord(0.0, min_tokens=6, stop_token_ids=(11, 12)),
    "logprobs": SamplingRecord(0.0, num_logprobs=5),
    "bare logprob": SamplingRecord(num_logprobs=0),
}


def draws(logits: torch.Tensor, record: SamplingRecord, count: int) -> Counter[int]:
    """Tokens of `count` rows that differ in their position alone."""
    rows = [SamplingRow(record, position, EMPTY, 0) for position in range(count)]
    ranges = ranges_of(logits.shape[1])
    return Counter(sample_once(logits.expand(count, -1), rows, ranges).tokens)


@pytest.mark.parametrize(
    "record", [SamplingRecord(), SamplingRecord(top_k=4), SamplingRecord(top_p=0.999, top_k=3)]
)
def test_draws_follow_the_softmax(record: SamplingRecord) -> None:
    """Chi-square of 20,000 draws stays below the 99.99 % point of its distribution."""
    count = 20_000
    expected = slow_distribution(LOGITS[0], rows_of([record], 0)[0]).probabilities * count
    found = draws(LOGITS, record, count)
    assert set(found) == {i for i in range(5) if expected[i] > 0}
    distance = sum((found[i] - float(expected[i])) ** 2 / float(expected[i]) for i in found)
    assert distance < 23.5, "4 degrees of freedom at most"


def test_a_whole_vocabulary_is_drawn_as_often_as_it_should() -> None:
    """Tokens of 3,000, pooled by probability: each pool's share within five standard errors."""
    torch.manual_seed(1)
    logits = torch.randn(1, 3000) * 2
    chances = torch.softmax(logits[0].double(), 0)
    found = draws(logits, SamplingRecord(seed=5), 4000)
    for pool in chances.argsort().chunk(6):
        share = float(chances[pool].sum())
        hits = sum(found[int(token)] for token in pool)
        assert abs(hits - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5 + 1


@pytest.mark.parametrize(
    ("filters", "allowed"),
    [
        ({"top_k": 2}, {1, 4}),
        ({"top_p": 0.5}, {1, 4}),
        ({"min_p": 0.5}, {1, 4}),
        ({"top_p": 1e-9}, {1}),
        ({"top_k": 3, "min_p": 0.9}, {1}),
        ({"min_p": 1.0}, {1}),
        ({"temperature": 1e-3}, {1}),
        ({"temperature": 5e-324}, {1}),
        ({"allowed_token_ids": (0, 3)}, {0, 3}),
        ({"banned_token_ids": (1, 2, 4)}, {0, 3}),
    ],
)
def test_filters_keep_only_what_they_say(filters: dict, allowed: set[int]) -> None:
    assert set(draws(LOGITS, SamplingRecord(**filters), 300)) == allowed


def cuts_of(vocab_size: int) -> st.SearchStrategy[list[int]]:
    inner = st.sets(st.integers(1, vocab_size - 1), min_size=1, max_size=3)
    return inner.map(sorted)


@given(cuts_of(3000), st.integers(0, 1 << 30), st.integers(0, 30), st.booleans())
@settings(max_examples=25)
def test_neither_ranks_nor_cut_nor_batch_change_a_bit(
    cuts: list[int], seed: int, position: int, is_coarse: bool
) -> None:
    """All kinds of rows together on 2 to 4 ranks, cut anywhere, give what each gives alone."""
    logits = torch.randn(len(KINDS), 3000, generator=torch.Generator().manual_seed(seed)) * 4
    if is_coarse:
        logits = logits.round()  # many equal logits
    rows = rows_of(list(KINDS.values()), position)
    together = sample_once(logits, rows, ranges_of(3000, *cuts))
    for i, row in enumerate(rows):
        alone = sample_once(logits[i : i + 1], [row], ranges_of(3000))
        assert alone.tokens == [together.tokens[i]], list(KINDS)[i]
        assert (alone.logprobs or [None]) == [together.logprobs[i]], list(KINDS)[i]


@given(st.integers(0, 1 << 30), st.integers(0, 40))
@settings(max_examples=20)
def test_every_draw_is_where_the_slow_sampler_puts_it(seed: int, position: int) -> None:
    logits = torch.randn(len(KINDS), 3000, generator=torch.Generator().manual_seed(seed)) * 3
    rows = rows_of(list(KINDS.values()), position)
    found = sample_once(logits, rows, ranges_of(3000, 1008))
    for i, (name, row) in enumerate(zip(KINDS, rows, strict=True)):
        slow = slow_distribution(logits[i], row)
        if not (slow.borderline & (slow.probabilities > 1e-9)).any():
            assert is_the_draw(found.tokens[i], row, slow, 1e-4), name


@pytest.mark.parametrize("cuts", [(), (2,), (1, 3, 4)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_numbers_get_no_token(cuts: tuple[int, ...], temperature: float) -> None:
    bad = [
        [NAN] * 5, [0, 1, 2, 3, NAN], [-NAN, 1, 0, 0, 0], [-INF] * 5, [0, INF, 0, 0, 0],
        [0, 0, 0, 0, 9],
    ]  # fmt: skip
    found = {}
    for name, filters in {
        "plain": {},
        "top-p": {"top_p": 0.5},
        "top-k": {"top_k": 2},
        "logprobs": {"num_logprobs": 1},
        "large top-k": {"top_k": 2000, "top_p": 0.5},
    }.items():
        rows = rows_of([SamplingRecord(temperature, **filters)] * len(bad), 0)
        found[name] = sample_once(torch.tensor(bad), rows, ranges_of(5, *cuts)).tokens
    infinite = NO_TOKEN if temperature else 1
    assert [tokens[:5] for tokens in found.values()] == [[NO_TOKEN] * 4 + [infinite]] * len(found)


def test_damage_in_rows_that_are_searched_harms_nobody_else() -> None:
    torch.manual_seed(4)
    logits = torch.randn(3, 3000)
    record = SamplingRecord(2.0, top_k=2000, top_p=0.9)
    alone = sample_once(logits, rows_of([record] * 3), ranges_of(3000)).tokens
    logits[1, 77] = NAN
    logits[2] = -INF
    found = sample_once(logits, rows_of([record] * 3), ranges_of(3000, 1504)).tokens
    assert found == [alone[0], NO_TOKEN, NO_TOKEN]


def test_equal_logits_are_kept_by_rising_id() -> None:
    flat = torch.zeros(1, 5000)
    sizes = {
        SamplingRecord(top_k=7): 7,
        SamplingRecord(top_k=1500): 1500,
        SamplingRecord(top_p=0.002): 10,
        SamplingRecord(top_p=0.3): 1500,
        SamplingRecord(top_k=2000, top_p=0.5): 1000,
    }
    for record, size in sizes.items():
        for ranges in (ranges_of(5000), ranges_of(5000, 16, 1008, 3008)):
            rows = [SamplingRow(record, i, EMPTY, 0) for i in range(400)]
            found = sample_once(flat.expand(400, -1), rows, ranges).tokens
            assert max(found) < size and max(found) >= size * 0.97 - 1
    greedy = rows_of([SamplingRecord(0.0)])
    assert sample_once(flat, greedy, ranges_of(5000, 2512)).tokens == [0]
    signed = torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0]])
    assert sample_once(signed, greedy, WHOLE).tokens == [0]


def test_extreme_logits_still_draw() -> None:
    extreme = torch.tensor([[-1e30, 3e38, -INF, -3.4e38, 1e-45]])
    for temperature in (1e-300, 1.0, 1e30, 1e300):
        record = SamplingRecord(temperature, seed=(1 << 63) - 1)
        [token] = sample_once(extreme, rows_of([record]), WHOLE).tokens
        assert token == 1 or (temperature >= 1e30 and token in (0, 3, 4))
    assert factor_of(5e-324) < 3.1e38 and factor_of(0.0) == 1 and factor_of(0.5) == 2


def test_a_huge_vocabulary_does_not_overflow_the_masses() -> None:
    flat = torch.zeros(1, 1 << 20)
    rows = rows_of([SamplingRecord()])
    [token] = sample_once(flat, rows, ranges_of(1 << 20, 1 << 19)).tokens
    assert token == int(uniform(0, 0, 9) * (1 << 20))


def test_exp_is_the_same_number_wherever_it_is_taken() -> None:
    """What cut independence rests on."""
    values = -torch.rand(5000) * 40
    whole = values.exp()
    for start in range(70):
        for length in (1, 2, 7, 16, 33, 128, 1001):
            part = values[start : start + length].clone()
            assert torch.equal(part.exp_(), whole[start : start + length])


def test_keys_alone_decide() -> None:
    keys = [(s, i, p, q) for s in range(5) for i in range(5) for p in range(5) for q in range(5)]
    seen = [uniform(*key) for key in keys]
    assert len(set(seen)) == 625 and all(0 < value < 1 for value in seen)
    keys += [((1 << 63) - 1, 127, 1 << 40, 3)]
    assert np.array_equal(uniforms(keys), [uniform(*key) for key in keys])


def test_a_step_without_logit_rows_draws_nothing() -> None:
    for ranges in (WHOLE, ranges_of(5, 3)):
        assert sample_once(torch.empty(0, 5), [], ranges).tokens == []


def test_the_best_key_is_the_first_of_the_top_keys() -> None:
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(40, 97, generator=draw).mul(3).round()  # with many ties
    logits[3, 5], logits[4] = float("nan"), float("-inf")
    logits[5, 7], logits[6, :2] = float("inf"), torch.tensor([0.0, -0.0])
    assert torch.equal(best_keys(logits, 11), top_keys(logits, 11, 1))
