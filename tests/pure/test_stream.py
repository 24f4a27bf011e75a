"""What a person sees of a run: progress, and the text of several prompts in their order."""

import errno
import io
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpinfer.cli.stream import Progress, TextStream
from tpinfer.config.errors import ConfigError
from tpinfer.engine.requests import TokenEvent


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


def stream(out: io.StringIO, *echoes: str | None, has_text: bool = True, n: int = 1) -> TextStream:
    return TextStream(out, has_text, echoes, n)


def show(shown: TextStream, index: int, text: str, reason: str | None, sample: int = 0) -> None:
    """One token whose text is `text`."""
    token = ord(text[0]) if text else 0
    shown.show(TokenEvent(index, token, reason, sample, text))


def test_one_prompt_is_continued_where_it_stands() -> None:
    out = io.StringIO()
    shown = stream(out, "Once")
    for character in " upon":
        show(shown, 0, character, None)
    assert out.getvalue() == "Once upon", "text appears before the run is over"
    show(shown, 0, "!", "stop")
    assert out.getvalue() == "Once upon!\n"
    shown.finish()
    assert out.getvalue() == "Once upon!\n"


def test_several_continuations_of_a_prompt_are_told_apart() -> None:
    out = io.StringIO()
    shown = stream(out, "A", None, n=2)
    show(shown, 0, "y", "stop", sample=1)
    show(shown, 0, "x", "length")
    show(shown, 1, "p", "length")
    show(shown, 1, "q", None, sample=1)
    shown.finish()
    labels = [f"{p}/2, sample {k} of 2" for p in (1, 2) for k in (1, 2)]
    texts = ("Ax", "Ay", "p", "q")
    page = [f"[{label}] {text}\n" for label, text in zip(labels, texts, strict=True)]
    assert out.getvalue() == "".join(page)


def test_without_a_tokenizer_tokens_are_numbers() -> None:
    out = io.StringIO()
    shown = stream(out, "echo", has_text=False)
    shown.show(TokenEvent(0, 17, None))
    shown.show(TokenEvent(0, 4, "length"))
    assert out.getvalue() == "tokens: 17 4 \n"


def test_a_later_prompt_waits_until_its_turn() -> None:
    out = io.StringIO()
    shown = stream(out, None, "B:", None)
    show(shown, 1, "b", None)
    assert out.getvalue() == "[1/3] ", "prompt 2 has text, but it is prompt 1's turn"
    show(shown, 0, "a", None)
    assert out.getvalue() == "[1/3] a"
    show(shown, 0, "a", "length")
    assert out.getvalue() == "[1/3] aa\n[2/3] B:b"
    show(shown, 1, "b", "length")
    show(shown, 2, "c", "stop")
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
    waiting = [list(text) for text in texts]
    while any(waiting):
        index = order.choice([i for i, tokens in enumerate(waiting) if tokens])
        character = waiting[index].pop(0)
        show(shown, index, character, None if waiting[index] else "length")
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
    show(shown, 0, "a", None)
    show(shown, 2, "c", None)
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
        show(stream(Broken(errno.ENOSPC), "Once"), 0, "A", None)
    assert [target for _, target in redirected] == [1], "what is still buffered has to go somewhere"
    with pytest.raises(BrokenPipeError):
        show(stream(Broken(errno.EPIPE), "Once"), 0, "A", None)


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


def test_a_fact_stays_on_a_terminal_and_in_a_log() -> None:
    for out in (Terminal(), io.StringIO()):
        progress = Progress(out)
        progress.show("sizing the KV cache")
        progress.show("KV cache: 32 tokens: room for 2 requests of 16 tokens.")
        progress.finish()
        assert "KV cache: 32 tokens: room for 2 requests of 16 tokens.\n" in out.getvalue()


def test_progress_in_a_log_is_a_line_a_phase() -> None:
    out = io.StringIO()
    progress = Progress(out)
    for text in ("connecting the ranks", "loading weights 1 of 2 MB", "loading weights 2 of 2 MB"):
        progress.show(text)
    progress.finish()
    assert out.getvalue() == "connecting the ranks ...\nloading weights ...\n"
