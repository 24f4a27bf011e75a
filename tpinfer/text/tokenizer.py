"""A checkpoint's tokenizer: text to token ids and back. The `tokenizers` library does the work.

What tokenizer.json says holds (normaliser, merges, special tokens, post-processor);
tokenizer_config.json adds which tokens begin and end a text, and whether one is put in front
where the post-processor does not.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpinfer.config.errors import CheckpointError, ConfigError


class Tokenizer:
    """Encode and decode. Raises CheckpointError when the files are missing or damaged."""

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{directory}: has no tokenizer.json; give prompts as token ids "
                "(prompt_token_ids), or save the "
                "tokenizer there with transformers' save_pretrained"
            )
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise ConfigError(f"{error}; pip install 'tpinfer[run]'") from error
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every kind of damage
            raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from error
        self.settings = read_settings(directory)
        self.bos_token = _token_text(self.settings.get("bos_token"))
        self.eos_token = _token_text(self.settings.get("eos_token"))
        self._prefix = self._missing_bos()

    @property
    def vocab_size(self) -> int:
        """Tokens it knows, added ones included."""
        return self._backend.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        """Id of a token's exact text."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the checkpoint's own beginning token where it wants one."""
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self._prefix + ids if add_special_tokens else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids the tokenizer does not know decode to nothing."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def _missing_bos(self) -> list[int]:
        """The beginning token, where the settings ask for it and the post-processor does not add
        it."""
        if not self.settings.get("add_bos_token") or self.bos_token is None:
            return []
        bos = self.token_id(self.bos_token)
        added = self._backend.encode("", add_special_tokens=True).ids
        return [] if bos is None or bos in added else [bos]


def read_settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, empty where there is none."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); copy it again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: holds a {type(settings).__name__}, expected an object")
    return settings


def _token_text(token: object) -> str | None:
    """A special token is written as text or as {"content": text}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
