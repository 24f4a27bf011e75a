"""Prompts from flags, files, JSON lines and standard input: order, and what each bad one is
told."""

import argparse
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpinfer.cli.prompts import Prompt, read_prompts, reads_stdin
from tpinfer.config.errors import ConfigError

EXPECTED = '{"prompt": "text"} or {"prompt_token_ids": [1, 2]}'


class Terminal(io.TextIOWrapper):
    """A standard input that a person sits at."""

    def isatty(self) -> bool:
        return True


def wishes(
    prompt: list[str] | None = None, file: str | None = None, prompts: str | None = None
) -> argparse.Namespace:
    return argparse.Namespace(prompt=prompt, file=file, prompts=prompts)


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """Pipe `content` in; None puts a terminal there."""
    raw = io.BytesIO(content or b"")
    wrapped = io.TextIOWrapper(raw) if content is not None else Terminal(raw)
    monkeypatch.setattr("sys.stdin", wrapped)


def read_lines(tmp_path: Path, content: str | bytes) -> list[Prompt]:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts(wishes(prompts=str(path)))


def refusal(tmp_path: Path, content: str | bytes) -> str:
    """The message, which is one line."""
    with pytest.raises(ConfigError) as caught:
        read_lines(tmp_path, content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flags_then_file_then_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("from a file\nwith two lines\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}\n\n  \n{"prompt_token_ids": [3, 0]}\n')
    found = read_prompts(wishes(["one", "two"], str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")))
    assert found == [
        Prompt("one"),
        Prompt("two"),
        Prompt("from a file\nwith two lines\n"),
        Prompt("x"),
        Prompt(None, (3, 0)),
    ]


def test_a_pipe_is_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, "once upon\r\na time, é".encode())
    assert reads_stdin(wishes())
    assert read_prompts(wishes()) == [Prompt("once upon\na time, é")]


@pytest.mark.parametrize("named", ["file", "prompts"])
def test_a_dash_is_standard_input(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b'{"prompt": "x"}')
    args = wishes(file="-") if named == "file" else wishes(prompts="-")
    assert reads_stdin(args)
    assert read_prompts(args) == [Prompt("x" if named == "prompts" else '{"prompt": "x"}')]


def test_a_pipe_is_left_alone_when_a_prompt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"not this")
    assert not reads_stdin(wishes(["this"]))
    assert read_prompts(wishes(["this"])) == [Prompt("this")]


def test_a_terminal_without_a_prompt_is_told_all_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, None)
    assert not reads_stdin(wishes())
    with pytest.raises(ConfigError) as caught:
        read_prompts(wishes())
    for way in ("there is no prompt", "--prompt", "--file", "--prompts", "pipe"):
        assert way in str(caught.value)


def test_a_pipe_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"caf\xe9")
    with pytest.raises(ConfigError, match="standard input: is not UTF-8 at byte 3; convert it"):
        read_prompts(wishes())


def test_an_argument_that_is_not_utf8() -> None:
    """Such bytes arrive as half surrogates; whole characters come back from them."""
    with pytest.raises(ConfigError, match="--prompt: the text is not UTF-8"):
        read_prompts(wishes(["caf\udce9"]))
    split = "é".encode().decode("ascii", "surrogateescape")
    assert read_prompts(wishes([f"caf{split}"])) == [Prompt("café")]


@pytest.mark.parametrize("named", ["file", "prompts"])
def test_files_that_cannot_be_read(named: str, tmp_path: Path) -> None:
    missing, folder, latin = tmp_path / "no.txt", tmp_path, tmp_path / "latin.txt"
    latin.write_bytes(b"ab\xff")
    for path, words in (
        (missing, "cannot be read (No such file or directory); check the path"),
        (folder, "cannot be read (Is a directory); check the path"),
        (latin, "is not UTF-8 at byte 2; convert it"),
    ):
        with pytest.raises(ConfigError) as caught:
            name = str(path)
            read_prompts(wishes(file=name) if named == "file" else wishes(prompts=name))
        assert str(caught.value) == f"{path}: {words}"


@pytest.mark.parametrize("content", ["", "\n", " \n\t\n"])
def test_a_file_without_lines(content: str, tmp_path: Path) -> None:
    text = refusal(tmp_path, content)
    assert "lines.jsonl: has no lines" in text and '{"prompt": "Hello"}' in text


@pytest.mark.parametrize(
    "line",
    ["hello", '{"prompt": "x"', "{'prompt': 'x'}", '{"prompt": "x"} {"prompt": "y"}', "1" * 5000,
     "[" * 100_000],
)  # fmt: skip
def test_lines_that_are_not_json(line: str, tmp_path: Path) -> None:
    text = refusal(tmp_path, f'{{"prompt": "fine"}}\n{line}\n')
    assert "lines.jsonl:2: is not JSON (" in text and text.endswith(f"; expected {EXPECTED}")


@pytest.mark.parametrize(
    "line",
    [
        "[]", "3", "null", '"hello"', "{}",
        '{"text": "x"}',
        '{"prompt": 3}',
        '{"prompt": null}',
        '{"prompt": ["x"]}',
        '{"prompt": "x", "prompt_token_ids": [1]}',
        '{"prompt": null, "prompt_token_ids": [1]}',
        '{"prompt_token_ids": []}',
        '{"prompt_token_ids": 5}',
        '{"prompt_token_ids": "1 2"}',
        '{"prompt_token_ids": [1, -1]}',
        '{"prompt_token_ids": [1.0]}',
        '{"prompt_token_ids": [true]}',
        '{"prompt_token_ids": [[1]]}',
    ],
)  # fmt: skip
def test_lines_that_are_no_prompt(line: str, tmp_path: Path) -> None:
    text = refusal(tmp_path, f'\n{{"prompt": "fine"}}\n\n  {line}  \n')
    assert f"lines.jsonl:4: {line!r} is not a prompt; expected {EXPECTED}" in text


def test_a_long_line_is_quoted_in_part(tmp_path: Path) -> None:
    text = refusal(tmp_path, json.dumps({"text": "word " * 1000}))
    assert len(text) < 250 and "is not a prompt" in text


def test_half_a_surrogate_pair_is_no_character(tmp_path: Path) -> None:
    text = refusal(tmp_path, '{"prompt": "x \\ud83d y"}')
    assert "lines.jsonl:1: the prompt holds half a surrogate pair" in text
    assert read_lines(tmp_path, '{"prompt": "\\ud83d\\ude00"}') == [Prompt("😀")]


json_prompts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])).map(Prompt),
    st.lists(st.integers(0, 1 << 20), min_size=1).map(lambda ids: Prompt(None, tuple(ids))),
)


@given(
    st.lists(json_prompts, min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_json_writes_comes_back(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[Prompt], is_ascii: bool, line_end: str
) -> None:
    """Whatever characters a text has: JSON leaves line separators of Unicode as they are."""
    values = [
        {"prompt": p.text} if p.text is not None else {"prompt_token_ids": p.token_ids}
        for p in prompts
    ]
    lines = "".join(json.dumps(value, ensure_ascii=is_ascii) + line_end for value in values)
    assert read_lines(tmp_path_factory.mktemp("prompts"), lines) == prompts
