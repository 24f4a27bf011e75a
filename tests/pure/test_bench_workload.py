"""Prompts to time: lengths as asked for, the same from the same seed, others in every run."""

import json
from math import ceil, floor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpinfer.bench.datasets import (
    TextSample,
    custom_samples,
    read_custom,
    read_sharegpt,
    sharegpt_samples,
)
from tpinfer.bench.workload import PrefixWorkload, RandomWorkload, random_prompts
from tpinfer.config.errors import ConfigError

VOCAB = 331


def words(text: str) -> list[int]:
    """A token a word."""
    return [len(word) for word in text.split()]


@given(
    st.integers(1, 20), st.integers(1, 60), st.integers(1, 60), st.integers(0, 9),
    st.floats(0, 0.99), st.integers(),
)  # fmt: skip
def test_random_lengths_lie_in_their_range(
    count: int, input_len: int, output_len: int, prefix_len: int, ratio: float, seed: int
) -> None:
    try:
        workload = RandomWorkload(count, input_len, output_len, prefix_len, ratio, seed)
    except ConfigError as error:
        assert prefix_len + floor(input_len * (1 - ratio)) == 0 and "without a token" in str(error)
        return
    samples = workload.samples(VOCAB)
    assert len(samples) == count
    prefix = samples[0].prompt_token_ids[:prefix_len]
    for sample in samples:
        assert sample.prompt_token_ids[:prefix_len] == prefix
        length = len(sample.prompt_token_ids) - prefix_len
        assert floor(input_len * (1 - ratio)) <= length <= ceil(input_len * (1 + ratio))
        assert max(1, floor(output_len * (1 - ratio))) <= sample.output_len
        assert sample.output_len <= ceil(output_len * (1 + ratio))
        assert len(sample.prompt_token_ids) + sample.output_len <= workload.longest
        assert all(0 <= token < VOCAB for token in sample.prompt_token_ids)
    assert workload.samples(VOCAB) == samples


def test_every_run_and_every_seed_has_prompts_of_its_own() -> None:
    first, other = RandomWorkload(4, 8, 1), RandomWorkload(4, 8, 1, seed=1)
    made = [first.samples(VOCAB), first.samples(VOCAB, 1), other.samples(VOCAB)]
    prompts = [tuple(sample.prompt_token_ids) for samples in made for sample in samples]
    assert len(set(prompts)) == 12
    assert len(set(map(tuple, random_prompts(3, 5, VOCAB, 0)))) == 3


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 5))
def test_prefixes_are_shared_by_as_many_prompts_each(
    num_prefixes: int, each: int, more: int
) -> None:
    count = num_prefixes * each + min(more, num_prefixes - 1)
    samples = PrefixWorkload(count, num_prefixes, 20, 3, 4).samples(VOCAB)
    assert len(samples) == num_prefixes * each
    prefixes = [tuple(sample.prompt_token_ids[:20]) for sample in samples]
    assert {prefixes.count(prefix) for prefix in prefixes} == {each}
    assert all(len(one.prompt_token_ids) == 23 and one.output_len == 4 for one in samples)


def test_counts_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="the number of prompts 0 must be 1 or more"):
        random_prompts(0, 5, VOCAB, 0)
    with pytest.raises(ConfigError, match="--prefix-repetition-suffix-len 0 must be 1 or more"):
        PrefixWorkload(4, 2, 3, 0, 4)


def conversation(*texts: object) -> dict[str, object]:
    return {"id": "x", "conversations": [{"from": "human", "value": text} for text in texts]}


def test_sharegpt_takes_the_first_two_turns_and_leaves_out_what_is_not_one(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    entries = [
        conversation("one two three four", "a b c d e", "more"),
        conversation("alone"),
        {"id": "y"},
        conversation(3, "a"),
        "text",
        conversation("größer", "b"),
    ]
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    found = read_sharegpt(path)
    assert [(one.prompt, one.answer) for one in found] == [
        ("one two three four", "a b c d e"),
        ("größer", "b"),
    ]


def test_sharegpt_leaves_out_the_short_and_the_long_and_fills_up() -> None:
    def text(count: int) -> str:
        return " ".join(["w"] * count)

    lengths = [(4, 4), (3, 50), (50, 3), (1024, 1024), (1025, 4), (1000, 1049)]
    found = [TextSample(text(prompt), answer=text(answer)) for prompt, answer in lengths]
    samples = sharegpt_samples(found, words, 6, None, 0)
    kept = sorted((len(one.prompt_token_ids), one.output_len) for one in samples)
    assert len(kept) == 6 and set(kept) == {(4, 4), (1024, 1024)}
    given_len = sharegpt_samples(found, words, 9, 2, 0)
    assert {one.output_len for one in given_len} == {2}
    assert {len(one.prompt_token_ids) for one in given_len} == {4, 50, 1024, 1000}
    assert sharegpt_samples(found, words, 6, None, 0) == samples
    with pytest.raises(ConfigError, match="of 1 conversations none has 4 to 1024 tokens"):
        sharegpt_samples(found[1:2], words, 2, None, 0)


def test_custom_lines_say_how_much_to_generate_or_the_flag_does(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"prompt": "a b", "output_tokens": 7}\n\n{"prompt": "a\\u2028b c"}\n')
    samples = custom_samples(read_custom(path), words, 3, 9)
    found = [(len(one.prompt_token_ids), one.output_len) for one in samples]
    assert found == [(2, 7), (3, 9), (2, 7)]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("custom", "", "has no lines"),
        ("custom", '{"prompt": "a"}\n{"text": "b"}', r":2: is no request"),
        ("custom", '{"prompt": ""}', "is no request"),
        ("custom", '{"prompt": "a", "output_tokens": 0}', "is no request"),
        ("custom", '{"prompt": "a", "output_tokens": true}', "is no request"),
        ("custom", "{", r":1: is not JSON"),
        ("custom", "[" * 100_000, r":1: is not JSON"),
        ("sharegpt", "{", "is not JSON"),
        ("sharegpt", "{}", "holds no conversation of two turns"),
        ("sharegpt", "[[1], {}]", "holds no conversation of two turns"),
        ("sharegpt", "\udce9", "is not UTF-8 at byte 0"),
    ],
)
def test_files_that_hold_no_requests(name: str, content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "given"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=told) as caught:
        (read_sharegpt if name == "sharegpt" else read_custom)(path)
    assert str(path) in str(caught.value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["conversations", "value", "id"]), inner),
                    max_leaves=12))  # fmt: skip
def test_any_json_is_conversations_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    path = tmp_path_factory.mktemp("talk") / "talk.json"
    path.write_text(json.dumps(value))
    try:
        found = read_sharegpt(path)
    except ConfigError:
        return
    assert all(isinstance(one.prompt, str) and isinstance(one.answer, str) for one in found)


def test_the_draw_is_the_same_on_every_python() -> None:
    """What `explain` compares over ranks, and results files over machines, is the same work."""
    assert RandomWorkload(1, 3, 1, seed=7).samples(VOCAB, 1)[0].prompt_token_ids == [256, 181, 141]
