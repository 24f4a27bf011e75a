"""Tokens to text as they come, without ever showing half a character.

A token's text depends on its neighbours (byte fallbacks, joined spaces), so a short tail of
tokens is decoded twice, without and with the new ones, and the difference is new text. A tail
that ends inside a UTF-8 sequence decodes to U+FFFD at its end, which is held back. The tail moves
on whenever nothing is held, so a token costs a constant amount.
"""

from collections.abc import Sequence

from tpinfer.text.tokenizer import Tokenizer

_DAMAGE = "\ufffd"
_MOST_OPEN = 3
"""Bytes of a UTF-8 character that lacks one, and as many U+FFFD at most: what may still become a
character. More of them at the end are damage."""
_COMPANY = 8
"""Tokens in front of the first new one that are decoded with it."""
_MOST_HELD = 64
"""Tokens that the tail holds back, or keeps without text (end tokens), before it lets go."""


class Detokenizer:
    """Text of one sequence, piece by piece. The pieces join to what `decode` says of all tokens.

    Only where byte tokens form no UTF-8 they may differ: `decode` then gives up a whole run of
    them, part of which has been shown.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._tail: list[int] = []
        self._num_shown = 0  # tokens of the tail that only keep the others company
        self._num_given = 0  # characters of the others that were given already

    def follow(self, token_ids: Sequence[int]) -> str:
        """Continue behind tokens that are there already, whose text is returned. What follows then
        reads as part of one text: a space between them is kept, a character that they began is
        completed. Call it first.
        """
        shown, first = list(token_ids), max(0, len(token_ids) - _MOST_OPEN)
        while first and self._text(shown[max(0, first - _COMPANY) : first]).endswith(_DAMAGE):
            first -= 1
        self._tail = shown[max(0, first - _COMPANY) : first]
        self._num_shown = len(self._tail)
        before = self._text(shown[:first])
        return before + "".join([self.push(token_id) for token_id in shown[first:]])

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come; often empty."""
        self._tail.append(token_id)
        text, given = self._new_text(), self._num_given
        num_held = len(self._tail) - self._num_shown
        num_open = min(len(text) - len(text.rstrip(_DAMAGE)), _MOST_OPEN)
        if num_open and num_held <= _MOST_HELD:
            certain = text[: len(text) - num_open]
            self._num_given = max(given, len(certain))
            return certain[given:]
        if text:
            self._tail = self._tail[self._num_shown :]
            self._num_shown, self._num_given = len(self._tail), 0
        elif num_held > _MOST_HELD:
            self._tail.pop()
        return text[given:]

    def finish(self) -> str:
        """What was held back, damage and all."""
        text = self._new_text()[self._num_given :]
        self._tail, self._num_shown, self._num_given = [], 0, 0
        return text

    def _new_text(self) -> str:
        """Text of the tokens that are not shown yet, in the company of those that are."""
        text, shown = self._text(self._tail), self._text(self._tail[: self._num_shown])
        if text.startswith(shown):
            return text[len(shown) :]
        # A byte that fits no character spoils the whole run of byte tokens it ends. What is shown
        # stays shown, and the new tokens go on by themselves.
        return self._text(self._tail[self._num_shown :])

    def _text(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)
