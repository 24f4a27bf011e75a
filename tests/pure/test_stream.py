"""What a person sees of a run: progress, and the text of several prompts in their order."""

import errno
import io
import random
from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpinfer.cli.stream import Progress, TextStream
from tpinfer.config.errors import ConfigError
from tpinfer.text.tokenizer import Tokenizer


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode(errors="replace")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    """An output that takes nothing more."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self._code = code

    def write(self, text: str) -> int:
        raise OSError(self._code, "full")


def stream(out: io.StringIO, *echoes: str | None, has_text: bool = True) -> TextStream:
    return TextStream(out, cast(Tokenizer, Bytes()) if has_text else None, echoes)


def show_all(shown: TextStream, index: int, text: str) -> None:
    """All tokens of a prompt's continuation; the last one ends it."""
    content = text.encode()
    for place, token in enumerate(content, 1):
        shown.show(index, token, "length" if place == len(content) else None)


def test_one_prompt_is_continued_where_it_stands() -> None:
    out = io.StringIO()
    shown = stream(out, "Once")
    for token in b" upon":
        shown.show(0, token, None)
    assert out.getvalue() == "Once upon", "text appears before the run is over"
    shown.show(0, ord("!"), "stop")
    assert out.getvalue() == "Once upon!\n"
    shown.finish()
    assert out.getvalue() == "Once upon!\n"


def test_half_a_character_waits_for_the_other_half() -> None:
    out = io.StringIO()
    shown = stream(out, None)
    first, second = "é".encode()
    shown.show(0, first, None)
    assert out.getvalue() == ""
    shown.show(0, second, None)
    assert out.getvalue() == "é"
    shown.show(0, first, "length")
    assert out.getvalue() == "é\ufffd\n", "what stays half at the end is shown as damage"


def test_without_a_tokenizer_tokens_are_numbers() -> None:
    out = io.StringIO()
    shown = stream(out, "echo", has_text=False)
    shown.show(0, 17, None)
    shown.show(0, 4, "length")
    assert out.getvalue() == "tokens: 17 4 \n"


def test_a_later_prompt_waits_until_its_turn() -> None:
    out = io.StringIO()
    shown = stream(out, None, "B:", None)
    shown.show(1, ord("b"), None)
    assert out.getvalue() == "[1/3] ", "prompt 2 has text, but it is prompt 1's turn"
    shown.show(0, ord("a"), None)
    assert out.getvalue() == "[1/3] a"
    shown.show(0, ord("a"), "length")
    assert out.getvalue() == "[1/3] aa\n[2/3] B:b"
    shown.show(1, ord("b"), "length")
    shown.show(2, ord("c"), "stop")
    assert out.getvalue() == "[1/3] aa\n[2/3] B:bb\n[3/3] c\n"


@given(
    st.lists(
        st.text(min_size=1, max_size=6).map(lambda t: t.encode(errors="replace").decode()),
        min_size=1,
        max_size=4,
    ),
    st.randoms(use_true_random=False),
)
def test_any_interleaving_gives_the_same_page(texts: list[str], order: random.Random) -> None:
    """Tokens of all prompts come mixed; the page is as if each had run alone."""
    out = io.StringIO()
    shown = stream(out, *(f"<{i}>" for i in range(len(texts))))
    waiting = [list(text.encode()) for text in texts]
    while any(waiting):
        index = order.choice([i for i, tokens in enumerate(waiting) if tokens])
        token = waiting[index].pop(0)
        shown.show(index, token, None if waiting[index] else "length")
    shown.finish()
    many = len(texts) > 1
    page = [
        (f"[{i + 1}/{len(texts)}] " if many else "") + f"<{i}>{text}\n"
        for i, text in enumerate(texts)
    ]
    assert out.getvalue() == "".join(page)


def test_a_stopped_run_prints_what_was_waiting() -> None:
    out = io.StringIO()
    shown = stream(out, None, None, None)
    shown.show(0, ord("a"), None)
    shown.show(2, ord("c"), None)
    shown.finish()
    assert out.getvalue() == "[1/3] a\n[2/3] \n[3/3] c\n"


def test_a_run_stopped_before_its_first_token_prints_nothing() -> None:
    out = io.StringIO()
    stream(out, "Once").finish()
    assert out.getvalue() == ""


def test_a_full_disk_is_told_and_a_closed_pipe_is_not_our_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    redirected: list[tuple[int, int]] = []
    monkeypatch.setattr("tpinfer.cli.stream.os.dup2", lambda a, b: redirected.append((a, b)))
    monkeypatch.setattr(Broken, "fileno", lambda self: 1)
    with pytest.raises(ConfigError, match=r"standard output cannot be written \(full\); send it"):
        stream(Broken(errno.ENOSPC), "Once").show(0, 65, None)
    assert [target for _, target in redirected] == [1], "what is still buffered has to go somewhere"
    with pytest.raises(BrokenPipeError):
        stream(Broken(errno.EPIPE), "Once").show(0, 65, None)


def test_progress_on_a_terminal_is_one_line_that_changes() -> None:
    out = Terminal()
    progress = Progress(out)
    progress.show("loading weights 1 of 2 MB")
    progress.show("loading weights 2 of 2 MB")
    progress.finish()
    clear = "\r\x1b[K"
    assert out.getvalue() == (
        f"{clear}loading weights 1 of 2 MB{clear}loading weights 2 of 2 MB{clear}"
    )


def test_progress_in_a_log_is_a_line_a_phase() -> None:
    out = io.StringIO()
    progress = Progress(out)
    for text in ("connecting the ranks", "loading weights 1 of 2 MB", "loading weights 2 of 2 MB"):
        progress.show(text)
    progress.finish()
    assert out.getvalue() == "connecting the ranks ...\nloading weights ...\n"
