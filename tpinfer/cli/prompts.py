"""What the user wants continued: from flags, a file, a file of JSON lines or standard input."""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpinfer.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: text, or token ids where the user tokenized."""

    text: str | None
    token_ids: tuple[int, ...] | None = None


def reads_stdin(args: argparse.Namespace) -> bool:
    """Whether the prompt will come from standard input."""
    named = args.prompt or args.file or args.prompts
    return "-" in (args.file, args.prompts) or (not named and not sys.stdin.isatty())


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """All prompts in order. Raises ConfigError naming file and line."""
    found = [Prompt(argument_text("--prompt", text)) for text in args.prompt or ()]
    if args.file:
        found.append(Prompt(_read_text(args.file)))
    if args.prompts:
        found += _read_lines(args.prompts)
    if not found and reads_stdin(args):
        found.append(Prompt(_read_text("-")))
    if not found:
        raise ConfigError(
            'there is no prompt; pass --prompt "...", --file FILE, --prompts FILE.jsonl, or pipe '
            "text in"
        )
    return found


def argument_text(flag: str, text: str) -> str:
    """The text of a command-line argument. Raises ConfigError where it is not UTF-8.

    A locale that cannot hold an argument's bytes leaves them in half surrogates.
    """
    try:
        return os.fsencode(text).decode() if _has_surrogates(text) else text
    except UnicodeError as error:
        raise ConfigError(f"{flag}: the text is not UTF-8; convert it") from error


def _read_text(name: str) -> str:
    """A file, or for `-` standard input, as UTF-8 whatever the locale says."""
    place = "standard input" if name == "-" else name
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: is not UTF-8 at byte {error.start}; convert it") from error


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _read_lines(name: str) -> list[Prompt]:
    lines = _read_text(name).split("\n")  # JSON may hold what splitlines takes for line ends
    found = [_parse_line(f"{name}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ConfigError(
            f'{name}: has no lines; put one object a line, such as {{"prompt": "Hello"}}'
        )
    return found


def _parse_line(place: str, line: str) -> Prompt:
    expected = '{"prompt": "text"} or {"prompt_token_ids": [1, 2]}'
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: is not JSON ({error}); expected {expected}") from error
    if (
        isinstance(value, dict)
        and isinstance(value.get("prompt"), str)
        and "prompt_token_ids" not in value
    ):
        if _has_surrogates(value["prompt"]):
            raise ConfigError(
                f"{place}: the prompt holds half a surrogate pair (\\ud800 to \\udfff alone), "
                "which is no character; write both halves or the character itself"
            )
        return Prompt(value["prompt"])
    ids = (
        value.get("prompt_token_ids") if isinstance(value, dict) and "prompt" not in value else None
    )
    if isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids):
        return Prompt(None, tuple(ids))
    raise ConfigError(f"{place}: {line.strip()[:60]!r} is not a prompt; expected {expected}")
