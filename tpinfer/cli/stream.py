"""What a person sees while a run goes on: progress of loading, then text as it comes."""

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from tpinfer.config.errors import ConfigError

if TYPE_CHECKING:
    from tpinfer.text.tokenizer import Tokenizer


def write_out(out: TextIO, text: str) -> None:
    """Write to standard output at once. Raises ConfigError when it takes no more, BrokenPipeError
    when nobody reads it.
    """
    try:
        out.write(text)
        out.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())  # takes what is still buffered
        raise ConfigError(
            f"standard output cannot be written ({error.strerror}); send it elsewhere"
        ) from error


class Progress:
    """One line that changes on a terminal; elsewhere a line per phase, numbers left out."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._phase = ""

    def show(self, text: str) -> None:
        """Say what goes on now. The words before the first number name the phase."""
        if self._is_terminal:
            self._out.write(f"\r\x1b[K{text}")
            self._out.flush()
            return
        phase = re.split(r"\s*\d", text, maxsplit=1)[0]
        if phase != self._phase:
            self._phase = phase
            print(f"{phase} ...", file=self._out, flush=True)

    def finish(self) -> None:
        """Clear the line."""
        if self._is_terminal:
            self._out.write("\r\x1b[K")
            self._out.flush()


class TextStream:
    """Prints each prompt's text in order, live: a later prompt's tokens wait until its turn."""

    def __init__(
        self, out: TextIO, tokenizer: "Tokenizer | None", echoes: Sequence[str | None]
    ) -> None:
        """echoes: per prompt, the text to print in front of what it is continued with."""
        from tpinfer.text.detokenizer import Detokenizer

        self._out = out
        self._has_text = tokenizer is not None
        self._echoes = echoes
        self._writers = [Detokenizer(tokenizer) if tokenizer else None for _ in echoes]
        self._waiting = [""] * len(echoes)
        self._ended = [False] * len(echoes)
        self._turn = -1

    def show(self, index: int, token_id: int, finish_reason: str | None) -> None:
        """One token of prompt `index`."""
        if self._turn < 0:
            self._begin(0)
        writer = self._writers[index]
        text = writer.push(token_id) if writer else f"{token_id} "
        if finish_reason:
            text += writer.finish() if writer else ""
            self._ended[index] = True
        if index == self._turn:
            self._write(text)
            if finish_reason:
                self._next()
        else:
            self._waiting[index] += text

    def finish(self) -> None:
        """Print what is still waiting: the run was stopped, or is over."""
        while 0 <= self._turn < len(self._echoes):
            self._next()

    def _begin(self, turn: int) -> None:
        self._turn = turn
        if turn == len(self._echoes):
            return
        if len(self._echoes) > 1:
            self._write(f"[{turn + 1}/{len(self._echoes)}] ")
        if not self._has_text:
            self._write("tokens: ")
        elif self._echoes[turn]:
            self._write(str(self._echoes[turn]))
        self._write(self._waiting[turn])

    def _next(self) -> None:
        self._write("\n")
        self._begin(self._turn + 1)
        while self._turn < len(self._echoes) and self._ended[self._turn]:
            self._write("\n")
            self._begin(self._turn + 1)

    def _write(self, text: str) -> None:
        if text:
            write_out(self._out, text)
