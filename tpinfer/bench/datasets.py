"""Prompts from a file of the user's: conversations in ShareGPT's form, or lines of prompts. Nothing
is downloaded.

Which conversations count, and how many times one is taken, follows vLLM's benchmark, so that
figures can be set side by side.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpinfer.bench.workload import Sample
from tpinfer.config.errors import ConfigError

Encode = Callable[[str], list[int]]
_SHORTEST, _LONGEST_PROMPT, _LONGEST = 4, 1024, 2048
"""Tokens: a conversation with fewer in its prompt or answer, or more than that, is left out."""
_SHAREGPT = '[{"conversations": [{"value": "question"}, {"value": "answer"}]}]'
_CUSTOM = '{"prompt": "text"}, with "output_tokens": N if it is to differ'


@dataclass(frozen=True, slots=True)
class TextSample:
    """One request before it is tokenized."""

    prompt: str
    answer: str | None = None
    """Its length is how much to generate, unless `output_len` says."""
    output_len: int | None = None


def read_sharegpt(path: Path) -> list[TextSample]:
    """First question and answer of every conversation that has both, in file order. Raises
    ConfigError naming the file."""
    try:
        value: Any = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON ({error}); expected {_SHAREGPT}") from error
    entries = value if isinstance(value, list) else []
    found = []
    for entry in entries:
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or len(turns) < 2:
            continue
        texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
        if isinstance(texts[0], str) and isinstance(texts[1], str):
            found.append(TextSample(texts[0], answer=texts[1]))
    if not found:
        raise ConfigError(f"{path}: holds no conversation of two turns; expected {_SHAREGPT}")
    return found


def read_custom(path: Path) -> list[TextSample]:
    """One request a line, in file order. Raises ConfigError naming file and line."""
    found = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}:{number}: is not JSON ({error})") from error
        prompt = value.get("prompt") if isinstance(value, dict) else None
        output_len = value.get("output_tokens") if isinstance(value, dict) else None
        is_count = output_len is None or (type(output_len) is int and output_len >= 1)
        if not isinstance(prompt, str) or not prompt or not is_count:
            raise ConfigError(f"{path}:{number}: is no request; expected {_CUSTOM}")
        found.append(TextSample(prompt, output_len=output_len))
    if not found:
        raise ConfigError(f"{path}: has no lines; put one request a line, {_CUSTOM}")
    return found


def sharegpt_samples(
    found: Sequence[TextSample], encode: Encode, count: int, output_len: int | None, seed: int
) -> list[Sample]:
    """`count` requests in random order, some more than once where there are too few. `output_len`
    None generates as much as each answer has. Raises ConfigError where none is short enough."""
    draw = random.Random(seed)
    order = list(found)
    draw.shuffle(order)
    samples: list[Sample] = []
    for one in order:
        if len(samples) == count:
            break
        prompt = encode(one.prompt)
        wanted = output_len or len(encode(one.answer or ""))
        is_short = len(prompt) < _SHORTEST or (output_len is None and wanted < _SHORTEST)
        if is_short or len(prompt) > _LONGEST_PROMPT or len(prompt) + wanted > _LONGEST:
            continue
        samples.append(Sample(prompt, wanted))
    if not samples:
        raise ConfigError(
            f"of {len(found)} conversations none has {_SHORTEST} to {_LONGEST_PROMPT} tokens in "
            f"its prompt and {_LONGEST} at most with its answer; give another file"
        )
    return samples + draw.choices(samples, k=count - len(samples))


def custom_samples(
    found: Sequence[TextSample], encode: Encode, count: int, output_len: int
) -> list[Sample]:
    """The first `count` requests, from the start again where there are too few. `output_len` is for
    those that say none themselves."""
    samples = [Sample(encode(one.prompt), one.output_len or output_len) for one in found[:count]]
    return [samples[place % len(samples)] for place in range(count)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 at byte {error.start}; convert it") from error
