"""Sampling: distributions are right, keys alone decide, filters keep what they say."""

from collections import Counter

import pytest
import torch

from tpinfer.decoding.sampler import pick, uniform
from tpinfer.layers.step_inputs import SamplingRow


def row(position: int = 0, **changes: float) -> SamplingRow:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3, "index": 0}
    return SamplingRow(position=position, **(values | changes))  # pyright: ignore[reportArgumentType]


LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])


def test_greedy_takes_the_first_maximum() -> None:
    assert pick(torch.tensor([1.0, 5.0, 5.0]), row(temperature=0.0)) == 1


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.999}])
def test_draws_follow_the_softmax(filters: dict[str, float]) -> None:
    drawn = Counter(pick(LOGITS, row(position, **filters)) for position in range(6000))
    expected = torch.softmax(LOGITS, 0)
    kept = [i for i in range(5) if not (filters.get("top_k") == 4 and i == 3)]
    mass = sum(float(expected[i]) for i in kept)
    for token in kept:
        assert abs(drawn[token] / 6000 - float(expected[token]) / mass) < 0.02


@pytest.mark.parametrize(
    ("filters", "allowed"),
    [
        ({"top_k": 2}, {1, 4}),
        ({"top_p": 0.5}, {1, 4}),
        ({"min_p": 0.5}, {1, 4}),
        ({"top_p": 1e-9}, {1}),
        ({"top_k": 3, "min_p": 0.9}, {1}),
        ({"temperature": 1e-3}, {1}),
    ],
)
def test_filters_keep_only_the_likeliest(filters: dict[str, float], allowed: set[int]) -> None:
    assert {pick(LOGITS, row(position, **filters)) for position in range(300)} == allowed


def test_keys_alone_decide() -> None:
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    seen = {
        uniform(s, i, p, q) for s in range(5) for i in range(5) for p in range(5) for q in range(5)
    }
    assert len(seen) == 625 and all(0 < value < 1 for value in seen)


def test_huge_seeds_and_extreme_logits_still_draw() -> None:
    extreme = torch.tensor([-1e30, 1e30, float("-inf")])
    assert pick(extreme, row(seed=(1 << 63) - 1)) == 1
