"""Tokens to text as they come, without ever showing half a character.

A token's text depends on its neighbours (byte fallbacks, joined spaces), so a short tail of
tokens is decoded twice, without and with the new one, and the difference is new text. A tail
that ends inside a UTF-8 sequence decodes to U+FFFD and is held back. The tail moves on whenever
text comes out, so a token costs a constant amount.
"""

from tpinfer.text.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"
_LONGEST_CHARACTER = 4
"""Bytes of the longest UTF-8 character: more tokens than that at the end are damage, not a
character to wait for."""


class Detokenizer:
    """Text of one sequence, piece by piece. The pieces join to what `decode` says of all tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._tail: list[int] = []
        self._num_shown = 0

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come; often empty."""
        self._tail.append(token_id)
        text = self._text(self._tail)
        shown = self._text(self._tail[: self._num_shown])
        num_held = len(self._tail) - self._num_shown
        if text.endswith(_INCOMPLETE) and num_held <= _LONGEST_CHARACTER:
            return ""
        if not text.startswith(shown):
            return ""
        self._advance()
        return text[len(shown) :]

    def finish(self) -> str:
        """What was held back, damage and all."""
        text = self._text(self._tail)
        shown = self._text(self._tail[: self._num_shown])
        self._tail, self._num_shown = [], 0
        return text[len(shown) :]

    def _advance(self) -> None:
        """All of the tail is shown now; keep the last tokens as the neighbours of the next."""
        self._tail = self._tail[self._num_shown :]
        self._num_shown = len(self._tail)

    def _text(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)
