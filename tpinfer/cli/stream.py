"""What a person sees while a run goes on: progress of loading, then text as it comes."""

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from tpinfer.config.errors import ConfigError

if TYPE_CHECKING:
    from tpinfer.engine.requests import TokenEvent


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
        """Say what goes on now: the words before the first number name the phase. A whole sentence,
        with its full stop, is a fact and stays."""
        if text.endswith("."):
            self.finish()
            print(text, file=self._out, flush=True)
            return
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
    """Prints each continuation's text in order, live: what comes later waits until its turn."""

    def __init__(self, out: TextIO, has_text: bool, echoes: Sequence[str | None], n: int) -> None:
        """echoes: per prompt, the text to print in front of what it is continued with. n:
        continuations of each prompt. Without text, token ids are printed."""
        self._out = out
        self._has_text = has_text
        self._echoes = [echo for echo in echoes for _ in range(n)]
        self._n = n
        self._waiting = [""] * len(self._echoes)
        self._ended = [False] * len(self._echoes)
        self._turn = -1

    def show(self, event: "TokenEvent") -> None:
        """What one step brought to one continuation."""
        if self._turn < 0:
            self._begin(0)
        place = event.index * self._n + event.sample
        text = event.text
        if not self._has_text and event.token_id >= 0:
            text = f"{event.token_id} "
        if event.finish_reason:
            self._ended[place] = True
        if place == self._turn:
            self._write(text)
            if event.finish_reason:
                self._next()
        else:
            self._waiting[place] += text

    def finish(self) -> None:
        """Print what is still waiting: the run was stopped, or is over."""
        while 0 <= self._turn < len(self._echoes):
            self._next()

    def _begin(self, turn: int) -> None:
        self._turn = turn
        if turn == len(self._echoes):
            return
        if len(self._echoes) > 1:
            self._write(self._label(turn))
        if not self._has_text:
            self._write("tokens: ")
        elif self._echoes[turn]:
            self._write(str(self._echoes[turn]))
        self._write(self._waiting[turn])

    def _label(self, turn: int) -> str:
        prompt, sample = divmod(turn, self._n)
        num_prompts = len(self._echoes) // self._n
        which = f"{prompt + 1}/{num_prompts}" if num_prompts > 1 else ""
        if self._n > 1:
            which += f"{', ' if which else ''}sample {sample + 1} of {self._n}"
        return f"[{which}] "

    def _next(self) -> None:
        self._write("\n")
        self._begin(self._turn + 1)
        while self._turn < len(self._echoes) and self._ended[self._turn]:
            self._write("\n")
            self._begin(self._turn + 1)

    def _write(self, text: str) -> None:
        if text:
            write_out(self._out, text)
