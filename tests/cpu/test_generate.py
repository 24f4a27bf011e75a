"""`tpinfer generate` from the outside: what goes in, what comes out, and what it says when it
cannot."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cpu.tiny_models import greedy_oracle, write_checkpoint
from tests.cpu.tiny_tokenizers import byte_level
from tests.cpu.tpinfer_command import generate, json_lines

pytestmark = pytest.mark.ranks
KEYS = [
    *("prompt_token_ids", "token_ids", "text", "finish_reason", "stop_reason", "timing"),
    *("attribution", "num_cached_tokens"),
]
WORDS = ("compute", "memory", "communication", "small_kernels", "host", "queue")
NUM_TOKENS = 12
PROMPTS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time"},
    {"prompt_token_ids": [5, 200, 17, 1, 330]},
    {"prompt": "日本 \u2028 😀"},
]
"""The last holds U+2028, which many a reader of lines takes for the end of one."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with tokenizer and chat template, in a place with an awkward name."""
    directory = tmp_path_factory.mktemp("models") / "tiny modèle 模型"
    write_checkpoint("llama-tied-gqa", directory)
    byte_level(directory)
    # An end token of its own: one that the greedy text of the first prompt comes to.
    config = directory / "generation_config.json"
    ends = [2, expected_tokens(directory)[0][4]]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": ends}))
    return directory


def hugging_face(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def prompt_ids(directory: Path) -> list[list[int]]:
    tokenizer = hugging_face(directory)
    return [entry.get("prompt_token_ids") or tokenizer.encode(entry["prompt"]) for entry in PROMPTS]


def expected_tokens(directory: Path) -> list[list[int]]:
    return greedy_oracle(directory, prompt_ids(directory), NUM_TOKENS)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    lines = [json.dumps(entry, ensure_ascii=False) for entry in PROMPTS]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")  # empty lines do not count
    return path


@pytest.fixture(scope="module")
def contract(
    model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], str]:
    """The stable command on two ranks, in a locale that knows ASCII: its objects and its output."""
    out = tmp_path_factory.mktemp("out") / "out ü.jsonl"
    done = generate(
        *("--model", model, "--prompts", prompts, "--max-tokens", str(NUM_TOKENS)),
        *("--temperature", "0", "--ignore-eos", "--dtype", "float32", "--json", out, "--tp", "2"),
        LC_ALL="C",
    )
    assert done.returncode == 0, done.stderr
    return json_lines(out), done.stdout


def test_one_object_a_prompt_in_order(contract, model: Path) -> None:
    objects, _ = contract
    assert [list(entry) for entry in objects] == [KEYS] * len(PROMPTS)
    assert [entry["prompt_token_ids"] for entry in objects] == prompt_ids(model)
    assert {entry["finish_reason"] for entry in objects} == {"length"}


def test_tokens_and_text_equal_transformers(contract, model: Path) -> None:
    objects, _ = contract
    assert [entry["token_ids"] for entry in objects] == expected_tokens(model)
    tokenizer = hugging_face(model)
    for entry in objects:
        assert entry["text"] == tokenizer.decode(entry["token_ids"], skip_special_tokens=True)


def test_the_stream_shows_the_same_text_in_order(contract) -> None:
    objects, shown = contract
    expected = "".join(f"[{i}/3] {entry['text']}\n" for i, entry in enumerate(objects, 1))
    assert shown == expected


def test_times_add_up(contract) -> None:
    for entry in contract[0]:
        timing = entry["timing"]
        assert list(timing) == ["ttft_s", "tpot_s", "e2e_s", "itl_s"]
        assert len(timing["itl_s"]) == NUM_TOKENS - 1 and min(timing["itl_s"]) > 0
        assert timing["e2e_s"] == pytest.approx(timing["ttft_s"] + sum(timing["itl_s"]))
        assert timing["tpot_s"] == pytest.approx(sum(timing["itl_s"]) / (NUM_TOKENS - 1))


def assert_sums(split: dict[str, Any]) -> None:
    """Integers, and every grouping adds up to the wall."""
    assert sum(split["leaves"].values()) == split["wall_ns"] > 0
    assert list(split["rollup"]) == list(WORDS)
    assert sum(split["rollup"].values()) == split["wall_ns"]
    numbers = [*split["leaves"].values(), *split["rollup"].values(), split["wall_ns"]]
    assert all(type(number) is int and number >= 0 for number in numbers)


def test_attribution_sums_to_the_wall_in_integers(contract) -> None:
    for entry in contract[0]:
        found = entry["attribution"]
        for part in (found, found["ttft"], found["decode"]):
            assert_sums(part)
            assert [split["rank"] for split in part["ranks"]] == [0, 1]
            for split in part["ranks"]:
                assert_sums(split)
                assert sum(split["host_parts"].values()) == split["leaves"].get("host", 0)
                assert split["rollup"]["communication"] > 0
        assert found["wall_ns"] == found["ttft"]["wall_ns"] + found["decode"]["wall_ns"]
        assert found["wall_ns"] == round(entry["timing"]["e2e_s"] * 1e9)
        assert found["method"] == "counters" and found["ceilings_origin"]


def test_an_end_token_stops_and_standard_output_holds_nothing_but_json(
    contract, model: Path, prompts: Path
) -> None:
    """--ignore-eos gave the whole texts; without it they end at the first end token."""
    done = generate(
        *("--model", model, "--prompts", "-", "--max-tokens", str(NUM_TOKENS), "--greedy"),
        *("--dtype", "float32", "--json", "-", "--table", "--explain"),
        text_in=prompts.read_text(encoding="utf-8"),
    )
    assert done.returncode == 0, done.stderr
    objects = json_lines(done.stdout)
    ends = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    assert len(objects) == len(PROMPTS)
    for entry, whole in zip(objects, contract[0], strict=True):
        tokens = whole["token_ids"]
        place = next((i for i, token in enumerate(tokens) if token in ends), None)
        assert entry["finish_reason"] == ("length" if place is None else "stop")
        assert entry["token_ids"] == (tokens if place is None else tokens[: place + 1])
    assert objects[0]["finish_reason"] == "stop"
    assert "What was chosen here, and why" in done.stderr


def test_a_chat_from_a_file_with_table_and_reasons(model: Path, tmp_path: Path) -> None:
    (tmp_path / "question.txt").write_text("Who is the fox?\r\n", encoding="utf-8")
    done = generate(
        *("--model", model, "--file", tmp_path / "question.txt", "--chat", "--system", "Be brief."),
        *("--max-tokens", "4", "--greedy", "--ignore-eos", "--json", tmp_path / "out.jsonl"),
        *("--table", "--explain"),
    )
    assert done.returncode == 0, done.stderr
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who is the fox?\n"},
    ]
    ids = hugging_face(model).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )
    (entry,) = json_lines(tmp_path / "out.jsonl")
    assert entry["prompt_token_ids"] == ids["input_ids"]
    assert_table_sums(done.stdout)
    reasons = done.stdout.partition("What was chosen here, and why")[2]
    for word in ("device", "dtype", "attention", "threads", "collective"):
        assert re.search(rf"^  {word} .*\(.+\)$", reasons, re.MULTILINE), word


def assert_table_sums(shown: str) -> None:
    """Cells of each row add up to its wall as far as their digits show; one row a rank."""
    table = shown.partition("Where the time went")[2]
    rows = re.findall(r"^ +rank (\d+) +([\d.]+)(.+)$", table, re.MULTILINE)
    assert [rank for rank, _, _ in rows] == ["0", "0"], "time to first token, per output token"
    for _, wall, cells in rows:
        values = [float(value) for value in re.findall(r"([\d.]+) +\d+%", cells)]
        assert sum(values) == pytest.approx(float(wall), rel=0.01, abs=0.003)
    assert "measured at start-up" in table and "fits its" in table


def test_seeds_give_the_same_text_on_one_rank_and_two(tmp_path: Path) -> None:
    """Also: standard input is the prompt, the checkpoint's own sampling holds where no flag does,
    and a locale without a character shows another instead of failing.
    """
    tokens = []
    own = ("--temperature", "0.8", "--top-p", "0.95")
    for number, (flags, tp) in enumerate([(("--seed", "5"), 2), ((*own, "--seed", "5"), 1),
                                          (("--seed", "6"), 1)]):  # fmt: skip
        out = tmp_path / f"{number}.jsonl"
        done = generate(
            *flags, *("--tp", str(tp), "--max-tokens", "24", "--ignore-eos", "--json", out),
            text_in="The café", PYTHONIOENCODING="ascii",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (entry,) = json_lines(out)
        tokens.append(entry["token_ids"])
    assert tokens[0] == tokens[1] != tokens[2]
