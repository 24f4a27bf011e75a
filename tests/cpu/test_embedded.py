"""The models that ship: transformers loads them, says the same, and they stay small."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cpu.cli_program import quick_generate
from tests.cpu.tiny_models import greedy_oracle
from tests.cpu.tpinfer_command import json_lines
from tpinfer.config.huggingface import read_generation_defaults, read_model_spec
from tpinfer.embedded.locate import MODELS, embedded_model, shape_directory, shape_names
from tpinfer.text.chat_template import ChatTemplate, find_template
from tpinfer.text.tokenizer import Tokenizer

LARGEST_BYTES = 10 << 20
PRESENT = [name for name in MODELS if (embedded_model(name) / "config.json").is_file()]
PROMPTS = ["Once upon a time", "The old clock", "Mia had a small red boat."]
NUM_TOKENS = 40


@pytest.fixture(scope="module", params=PRESENT)
def directory(request: pytest.FixtureRequest) -> Path:
    return embedded_model(request.param)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def prompt_lines(directory: Path, entries: list[dict[str, Any]]) -> Path:
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_the_default_model_is_there_and_all_of_them_are_small() -> None:
    assert "story" in PRESENT
    files = [path for name in PRESENT for path in embedded_model(name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= LARGEST_BYTES
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
              "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
    for name in PRESENT:
        assert {path.name for path in embedded_model(name).iterdir()} == needed


def test_a_draft_speaks_the_language_of_the_model_it_drafts_for() -> None:
    if "story-draft" not in PRESENT:
        pytest.skip("story-draft does not ship yet")
    story, draft = embedded_model("story"), embedded_model("story-draft")
    weights = [path.joinpath("model.safetensors").stat().st_size for path in (story, draft)]
    assert 4 <= weights[0] / weights[1] <= 10
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (story / name).read_bytes() == (draft / name).read_bytes()
    assert read_model_spec(story).vocab_size == read_model_spec(draft).vocab_size


def test_tokenizer_and_model_belong_together(directory: Path, theirs) -> None:
    spec, ours = read_model_spec(directory), Tokenizer(directory)
    assert ours.vocab_size == len(theirs) <= spec.vocab_size
    for prompt in [*PROMPTS, "Ünïcode 日本 😀", ""]:
        assert ours.encode(prompt) == theirs.encode(prompt)
        assert ours.decode(ours.encode(prompt)) == prompt
    names = {theirs.convert_ids_to_tokens(token) for token in spec.eos_token_ids}
    assert {ours.eos_token, "<|end|>"} <= names, "a story and an answer both come to an end"


@pytest.mark.parametrize("system", [None, "You are terse."])
def test_chats_render_as_in_transformers(directory: Path, theirs, system: str | None) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": " Tell me of a fox. "}]
    source = find_template(directory)
    assert source is not None
    text = ChatTemplate(source, {"bos_token": theirs.bos_token}).render(messages)
    options = {"tokenize": False, "add_generation_prompt": True}
    assert text == theirs.apply_chat_template(messages, **options)
    ids = Tokenizer(directory).encode(text, add_special_tokens=False)
    role = theirs.convert_tokens_to_ids("<|user|>")
    assert ids.count(role) == 1, "roles are single tokens"


@pytest.mark.ranks
@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_tokens_equal_transformers(
    directory: Path, theirs, tp: int, tmp_path: Path, run_name: str
) -> None:
    prompts = prompt_lines(tmp_path, [{"prompt": prompt} for prompt in PROMPTS])
    done = quick_generate(
        run_name, "--model", directory.name, "--prompts", prompts, "--greedy", "--ignore-eos",
        "--max-tokens", NUM_TOKENS, "--dtype", "float32", "--tp", tp,
        "--json", tmp_path / "out.jsonl",
    )  # fmt: skip
    assert done.value == 0, done.output
    ids = [theirs.encode(prompt) for prompt in PROMPTS]
    expected = greedy_oracle(directory, ids, NUM_TOKENS)
    assert [entry["token_ids"] for entry in json_lines(tmp_path / "out.jsonl")] == expected


@pytest.mark.ranks
def test_generation_config_holds_until_a_flag_says_otherwise(
    directory: Path, tmp_path: Path, run_name: str
) -> None:
    """Sampling and end tokens come from the checkpoint; --seed makes it repeatable."""
    defaults = read_generation_defaults(directory)
    assert defaults.do_sample and defaults.temperature and defaults.top_p
    own = ("--temperature", defaults.temperature, "--top-p", defaults.top_p)
    tokens = []
    for number, flags in enumerate([(), own, ("--greedy",), ("--temperature", "1.5")]):
        out = tmp_path / f"{number}.jsonl"
        done = quick_generate(
            f"{run_name}-{number}", "--model", directory.name, "--prompt", PROMPTS[0],
            "--seed", "11", "--max-tokens", "200", "--json", out, *flags,
        )  # fmt: skip
        assert done.value == 0, done.output
        (entry,) = json_lines(out)
        ends = set(read_model_spec(directory).eos_token_ids)
        assert (entry["token_ids"][-1] in ends) == (entry["finish_reason"] == "stop")
        assert not ends & set(entry["token_ids"][:-1])
        tokens.append(entry["token_ids"])
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2] and tokens[0] != tokens[3]


@pytest.mark.ranks
def test_stories_are_words(directory: Path, tmp_path: Path, run_name: str) -> None:
    """Readable: sentences of letters, with an end, and not one word again and again."""
    done = quick_generate(
        run_name, "--model", directory.name, "--prompt", PROMPTS[0], "--seed", "3",
        "--max-tokens", "200", "--json", tmp_path / "out.jsonl",
    )  # fmt: skip
    assert done.value == 0, done.output
    (entry,) = json_lines(tmp_path / "out.jsonl")
    words = entry["text"].split()
    assert entry["text"].isascii() and entry["text"].rstrip()[-1] in '.!?"'
    assert len(words) >= 10 and len(set(words)) >= len(words) / 3


@pytest.mark.parametrize("name", shape_names())
def test_shapes_are_shapes_transformers_knows(name: str) -> None:
    from transformers import AutoConfig

    directory = shape_directory(name)
    assert [path.name for path in directory.iterdir()] == ["config.json"]
    spec, config = read_model_spec(directory), AutoConfig.from_pretrained(directory)
    assert (spec.hidden_size, spec.num_layers) == (config.hidden_size, config.num_hidden_layers)
    assert spec.vocab_size == config.vocab_size


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"embedded model 'poem' does not exist; there are story"):
        embedded_model("poem")
    with pytest.raises(ValueError, match=r"shape 'x' does not exist; there are .*qwen3-0\.6b"):
        shape_directory("x")
