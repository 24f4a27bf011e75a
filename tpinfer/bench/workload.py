"""Prompts of given lengths from a seed. Tokens are drawn alike over the vocabulary: what they mean
does not matter for speed, as long as every prompt differs and nothing ends early.

Every run of a benchmark has prompts of its own, or from the second run on the prefix cache would
know them all.
"""

import random
from dataclasses import dataclass
from math import ceil, floor

from tpinfer.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sample:
    """One request to be timed."""

    prompt_token_ids: list[int]
    output_len: int
    """Tokens to generate."""


@dataclass(frozen=True, slots=True)
class RandomWorkload:
    """Prompts that share nothing, or `prefix_len` tokens in front. Raises ConfigError for lengths
    and counts that cannot be."""

    num_prompts: int
    input_len: int
    """Tokens behind the prefix, give or take."""
    output_len: int
    prefix_len: int = 0
    """Tokens that all prompts of a run begin with."""
    range_ratio: float = 0.0
    """Lengths are drawn from length * (1 - ratio) to length * (1 + ratio), ends included."""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (("the number of prompts", self.num_prompts), ("--output-len", self.output_len))
        for name, value in counts:
            if value < 1:
                raise ConfigError(f"{name} {value} must be 1 or more")
        for name, value in (("--input-len", self.input_len), ("--prefix-len", self.prefix_len)):
            if value < 0:
                raise ConfigError(f"{name} {value} must be 0 or more")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(
                f"--random-range-ratio {self.range_ratio} must be 0 or more and below 1; 0 gives "
                "every prompt the same length"
            )
        shortest = self.prefix_len + self._input_range[0]
        if shortest < 1:
            raise ConfigError(
                f"--input-len {self.input_len} with --random-range-ratio {self.range_ratio} gives "
                "prompts without a token; raise --input-len or --prefix-len to 1 or more"
            )

    @property
    def longest(self) -> int:
        """Most tokens that a sequence comes to, prompt and output."""
        return self.prefix_len + self._input_range[1] + self._output_range[1]

    def samples(self, vocab_size: int, run: int = 0) -> list[Sample]:
        """The requests of one run; another run has others."""
        draw = _drawer(self.seed, run)
        prefix = _tokens(draw, self.prefix_len, vocab_size)
        lengths = [
            (draw.randint(*self._input_range), draw.randint(*self._output_range))
            for _ in range(self.num_prompts)
        ]
        return [
            Sample(prefix + _tokens(draw, input_len, vocab_size), output_len)
            for input_len, output_len in lengths
        ]

    @property
    def _input_range(self) -> tuple[int, int]:
        return _around(self.input_len, self.range_ratio)

    @property
    def _output_range(self) -> tuple[int, int]:
        shortest, longest = _around(self.output_len, self.range_ratio)
        return max(1, shortest), longest


@dataclass(frozen=True, slots=True)
class PrefixWorkload:
    """Prompts that begin with one of a few prefixes, in random order: what a prefix cache is good
    for. Raises ConfigError for counts that cannot be."""

    num_prompts: int
    num_prefixes: int
    prefix_len: int
    suffix_len: int
    output_len: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prefixes", "prefix_len", "suffix_len", "output_len"):
            if getattr(self, name) < 1:
                flag = f"--prefix-repetition-{name.replace('_', '-')}"
                raise ConfigError(f"{flag} {getattr(self, name)} must be 1 or more")
        if self.num_prompts < self.num_prefixes:
            raise ConfigError(
                f"--num-prompts {self.num_prompts} is below --prefix-repetition-num-prefixes "
                f"{self.num_prefixes}; raise the one or lower the other"
            )

    @property
    def longest(self) -> int:
        """Tokens that every sequence comes to, prompt and output."""
        return self.prefix_len + self.suffix_len + self.output_len

    def samples(self, vocab_size: int, run: int = 0) -> list[Sample]:
        """The requests of one run, num_prompts // num_prefixes a prefix; another run has others."""
        draw = _drawer(self.seed, run)
        found = []
        for _ in range(self.num_prefixes):
            prefix = _tokens(draw, self.prefix_len, vocab_size)
            for _ in range(self.num_prompts // self.num_prefixes):
                suffix = _tokens(draw, self.suffix_len, vocab_size)
                found.append(Sample(prefix + suffix, self.output_len))
        draw.shuffle(found)
        return found


def random_prompts(count: int, input_len: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` prompts of `input_len` token ids. Raises ConfigError for counts below 1."""
    workload = RandomWorkload(count, input_len, 1, seed=seed)
    return [sample.prompt_token_ids for sample in workload.samples(vocab_size)]


def _around(length: int, ratio: float) -> tuple[int, int]:
    return floor(length * (1 - ratio)), ceil(length * (1 + ratio))


def _drawer(seed: int, run: int) -> random.Random:
    return random.Random(f"{seed} {run}")


def _tokens(draw: random.Random, count: int, vocab_size: int) -> list[int]:
    return [draw.randrange(vocab_size) for _ in range(count)]
