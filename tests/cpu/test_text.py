"""Text to tokens and back, held to transformers: byte-level and byte-fallback tokenizers, text that
comes token by token, chat templates."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.cpu.tiny_tokenizers import CHAT_TEMPLATE, byte_fallback, byte_level
from tpinfer.config.errors import CheckpointError, ConfigError
from tpinfer.text.chat_template import MAX_TEMPLATE_CHARACTERS, ChatTemplate, find_template
from tpinfer.text.detokenizer import Detokenizer
from tpinfer.text.stop_strings import StopMatcher, StopStrings
from tpinfer.text.tokenizer import Tokenizer

KINDS = {"byte level": byte_level, "byte fallback": byte_fallback}
TEXTS = st.text(max_size=40) | st.text(alphabet="the fox 日é😀👩\u200d🚀\n<s>|user", max_size=40)
FAMILY = "👩\u200d👩\u200d👧"
"""One emoji of 18 bytes: three joined characters of four bytes each."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: make(root / kind) for kind, make in KINDS.items()}


@pytest.fixture(scope="module")
def ours(directories: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer(directory) for kind, directory in directories.items()}


@pytest.fixture(scope="module")
def theirs(directories: dict[str, Path]):
    from transformers import AutoTokenizer

    return {kind: AutoTokenizer.from_pretrained(path) for kind, path in directories.items()}


def pieces(tokenizer: Tokenizer, token_ids: list[int], keep_special: bool = False) -> list[str]:
    """What a detokenizer gives for each token, and at the end."""
    writer = Detokenizer(tokenizer, skip_special_tokens=not keep_special)
    return [*(writer.push(token) for token in token_ids), writer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@example(text=FAMILY)
@example(text="")
@example(text=" a  b\t\n")
def test_encoding_and_decoding_equal_transformers(ours, theirs, kind: str, text: str) -> None:
    for special in (True, False):
        ids = ours[kind].encode(text, add_special_tokens=special)
        assert ids == theirs[kind].encode(text, add_special_tokens=special)
        for skip in (True, False):
            assert ours[kind].decode(ids, skip) == theirs[kind].decode(
                ids, skip_special_tokens=skip
            )


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@example(text=FAMILY)
def test_text_survives_the_way_there_and_back(ours, kind: str, text: str) -> None:
    ids = ours[kind].encode(text, add_special_tokens=False)
    if "<" not in text and "\u2581" not in text:  # neither a special token nor the mark for spaces
        assert ours[kind].decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@example(text=FAMILY)
@example(text="🚀🚀é🚀")
def test_pieces_of_text_join_to_the_whole(ours, kind: str, text: str) -> None:
    ids = ours[kind].encode(text)
    found = pieces(ours[kind], ids)
    if "\ufffd" not in text:
        assert "".join(found) == ours[kind].decode(ids)
        assert not any("\ufffd" in piece for piece in found), "half a character was shown"


@given(draw=st.data())
def test_pieces_of_any_bytes_join_to_the_whole(ours, draw: st.DataObject) -> None:
    """A model may write damage: bytes that begin no character, special tokens, anything."""
    tokenizer = ours["byte level"]
    ids = draw.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert "".join(pieces(tokenizer, ids, keep_special=True)) == whole


@given(draw=st.data())
def test_pieces_of_any_tokens_lose_nothing_around_damaged_bytes(ours, draw: st.DataObject) -> None:
    tokenizer = ours["byte fallback"]
    is_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    byte_ids = {tokenizer.token_id(name) for name in is_byte}
    ids = draw.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    plain = [token for token in ids if token not in byte_ids]
    assert "".join(pieces(tokenizer, plain)) == tokenizer.decode(plain)
    remaining = iter("".join(pieces(tokenizer, ids)))
    assert all(character in remaining for character in tokenizer.decode(plain))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "damage", [b"\xf0\x9f\x9a\x80\xf0", b"\xef\xbf\xbd\xef\xbf\xbd", b"\xff" * 9]
)
def test_text_goes_on_behind_damage(ours, kind: str, damage: bytes) -> None:
    """Not only at the end: whoever watches sees it come."""
    tokenizer = ours[kind]
    names = [f"<0x{byte:02X}>" for byte in damage]
    if kind == "byte level":
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        names = [bytes_to_unicode()[byte] for byte in damage]
    broken = [tokenizer.token_id(name) for name in names]
    text = tokenizer.encode(" the fox" if kind == "byte level" else "the fox", False)
    *found, _ = pieces(tokenizer, [*text, *broken, *text])  # type: ignore[list-item]
    assert "".join(found).endswith("\ufffd the fox")


def test_tokens_without_text_cost_no_more_and_no_less(ours) -> None:
    """--ignore-eos may bring thousands of end tokens; the space behind them must stay."""
    tokenizer = ours["byte fallback"]
    fox = tokenizer.encode("fox", add_special_tokens=False)
    ids = [*fox, *[2] * 500, *fox]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == "fox fox"


@pytest.mark.parametrize("kind", KINDS)
def test_long_damage_comes_as_it_is_written(ours, kind: str) -> None:
    tokenizer = ours[kind]
    byte = next(t for t in range(7, 263) if tokenizer.decode([t, t]) == "\ufffd\ufffd")
    found = pieces(tokenizer, [byte] * 300)
    assert "".join(found) == tokenizer.decode([byte] * 300) == "\ufffd" * 300
    assert max(map(len, found)) <= 5, "it came all at once"


CHATS = (
    [{"role": "user", "content": "  Hello, fox!\n\nHow are you?  "}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "日本 <s> {{ x }}"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": ""},
    ],
)


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_render_and_encode_as_in_transformers(
    directories, ours, theirs, messages, add_generation_prompt: bool
) -> None:
    for kind, directory in directories.items():
        source = find_template(directory)
        assert source == CHAT_TEMPLATE
        template = ChatTemplate(source, {"bos_token": ours[kind].bos_token, "eos_token": None})
        text = template.render(messages, add_generation_prompt)
        options = {"add_generation_prompt": add_generation_prompt}
        assert text == theirs[kind].apply_chat_template(messages, tokenize=False, **options)
        ids = ours[kind].encode(text, add_special_tokens=False)
        encoded = theirs[kind].apply_chat_template(messages, return_dict=True, **options)
        assert ids == encoded["input_ids"]


FEATURES = """
{%- generation %}kept{% endgeneration %}
{%- for n in [1, 2, 3, 4] %}{% if n == 3 %}{% break %}{% endif %}{{ n }}{% endfor %}
{{- {'b': 'é<&', 'a': [1, none]} | tojson }}
{{- messages[0].content | tojson(indent=2) }}
{%- if tools is not none or documents is not none %}wrong{% endif %}
{{- strftime_now('%Y') | length }}"""


def test_what_templates_may_use_is_what_transformers_offers(theirs) -> None:
    messages = [{"role": "user", "content": "x"}]
    expected = theirs["byte level"].apply_chat_template(
        messages, chat_template=FEATURES, tokenize=False
    )
    assert ChatTemplate(FEATURES).render(messages, False) == expected
    assert expected.startswith("kept12") and '"é<&"' in expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "refused the messages"),
        ("{{ ''.__class__.__mro__ }}", "refused the messages"),
        ("{{ 1 + 'a' }}", "refused the messages"),
        ("{{ 1 // messages[1:] | length }}", "refused the messages"),
        ("{% for n in range(10 ** 9) %}{% endfor %}", "refused the messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refused the messages"),
    ],
)
def test_a_strangers_template_can_refuse_but_not_reach_out(source: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_templates_that_cannot_be_compiled_are_the_checkpoints_fault() -> None:
    for source in ("{% for %}", "{{ 9 ** 99 ** 99 }}", "{{ " + "(" * 3000):
        with pytest.raises(CheckpointError, match="cannot be compiled"):
            ChatTemplate(source)
    with pytest.raises(CheckpointError, match=f"more than {MAX_TEMPLATE_CHARACTERS}"):
        ChatTemplate(" " * (MAX_TEMPLATE_CHARACTERS + 1))


def test_templates_are_found_where_checkpoints_keep_them(tmp_path: Path) -> None:
    settings_file = tmp_path / "tokenizer_config.json"
    assert find_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    for value, expected in (("text", "text"), (named, "d"), (named[:1], "t"), (7, None)):
        settings_file.write_text(json.dumps({"chat_template": value}))
        assert find_template(tmp_path) == expected
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert find_template(tmp_path) == "from the file"


def test_a_beginning_token_is_put_in_front_once(tmp_path: Path) -> None:
    """add_bos_token counts where the post-processor is silent; one that adds it is not doubled."""
    silent = Tokenizer(byte_level(tmp_path / "silent", add_bos_token=True))
    assert silent.encode("fox")[:2] == [1, *silent.encode("fox", False)[:1]]
    assert silent.encode("fox", add_special_tokens=False).count(1) == 0
    adds = Tokenizer(byte_fallback(tmp_path / "adds", add_bos_token=True))
    assert adds.encode("fox").count(1) == 1
    unknown = byte_level(tmp_path / "unknown", add_bos_token=True, bos_token="<none>")
    assert Tokenizer(unknown).encode("fox") == silent.encode("fox", False)


def test_special_tokens_are_read_in_both_notations(ours) -> None:
    for tokenizer in ours.values():
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
        assert (tokenizer.token_id("<s>"), tokenizer.token_id("nothing")) == (1, None)


def test_damaged_tokenizer_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; give prompts as token ids"):
        Tokenizer(tmp_path)
    byte_level(tmp_path)
    for content, words in (("{", "is not JSON"), ("[]", "expected an object")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: .*{words}"):
            Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read .*; copy it again"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        (f"the {FAMILY} fox", FAMILY, "the "),
        ("cafe\u0301 naive", "e\u0301", "caf"),
        ("old 🚀🚀 wood", "🚀 w", "old 🚀"),
        ("日本語 café", "本", "日"),
    ],
)
def test_stop_texts_are_found_in_characters_of_many_tokens(
    ours, kind: str, text: str, stop: str, shown: str
) -> None:
    """No part of a character or of a stop text is shown, wherever tokens end."""
    writer, matcher = Detokenizer(ours[kind]), StopMatcher(StopStrings([stop, "\ufffd"]))
    found = [matcher.push(writer.push(token)) for token in ours[kind].encode(text, False)]
    assert matcher.matched == stop
    assert "".join(found) == shown


@pytest.mark.parametrize("kind", KINDS)
def test_text_behind_a_prompt_reads_as_one_text(kind: str, ours: dict[str, Tokenizer]) -> None:
    """Wherever the prompt ends: at a space that sentencepiece's kind drops from the beginning of a
    text, or in the middle of a character."""
    tokenizer = ours[kind]
    whole = tokenizer.encode("The fox said: hello, 日本😀 there! It's 3 o'clock.")
    for end in range(1, len(whole)):
        writer = Detokenizer(tokenizer)
        pieces = [writer.follow(whole[:end]), *map(writer.push, whole[end:]), writer.finish()]
        assert "".join(pieces) == tokenizer.decode(whole), f"behind {end} tokens"
