"""Prompts of given lengths from a seed. Tokens are drawn alike over the vocabulary: what they mean
does not matter for speed, as long as every prompt differs and nothing ends early."""

import random

from tpinfer.config.errors import ConfigError


def random_prompts(count: int, input_len: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` prompts of `input_len` token ids. Raises ConfigError for counts below 1."""
    for name, value in (("number of prompts", count), ("--input-len", input_len)):
        if value < 1:
            raise ConfigError(f"{name} {value} must be 1 or more")
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(input_len)] for _ in range(count)]
