"""Mistakes in a call: exit code 2 and one line with the value, the constraint and the remedy, while
nothing has started."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tpinfer.cli.main import main
from tpinfer.embedded.locate import embedded_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 331,
    "max_position_embeddings": 256,
}
PROMPT = ("--prompt", "hello")


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that gets past the checks would start ranks, or become one."""

    def refuse(*args: object, **more: object) -> int:
        raise AssertionError("the checks let it pass")

    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tpinfer.launching.ranks.launch", refuse)
    monkeypatch.setattr("tpinfer.launching.guard.guard_rank", refuse)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a config.json and nothing else: checks need no more."""
    return write_config(tmp_path / "model")


def write_config(directory: Path, **changes: object) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    return directory


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a mistake is answered with."""
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    shown = capsys.readouterr()
    assert code == 2 and shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 1, f"one line, no traceback:\n{shown.err}"
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def says(text: str, words: Sequence[str]) -> None:
    """Value, constraint and remedy are all in it."""
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tp", "two"], ["--tp", "'two'", "int", "tpinfer generate --help"]),
        (["--dtype", "int3"], ["--dtype", "int3", "float32", "bfloat16"]),
        (["--no-such-flag"], ["--no-such-flag", "tpinfer", "--help"]),
        (["--temperature"], ["--temperature", "expected one argument"]),
        (["--top-k", "-1"], ["top_k=-1", "0 (off)"]),
        (["--top-p", "0"], ["top_p=0.0", "above 0 and at most 1"]),
        (["--min-p", "1.5"], ["min_p=1.5", "0 (off) to 1"]),
        (["--temperature", "-1"], ["temperature=-1.0", "0 (greedy) or more"]),
        (["--temperature", "nan"], ["temperature=nan", "0 (greedy) or more"]),
        (["--temperature", "inf"], ["temperature=inf", "0 (greedy) or more"]),
        (["--seed", "-1"], ["seed=-1", "0 to 2**63-1"]),
        (["--max-tokens", "0"], ["max_tokens=0", "1 or more"]),
        (["--tp", "0"], ["tp=0", "1 or more"]),
        (["--tp", "-2"], ["tp=-2", "1 or more"]),
        (["--block-size", "0"], ["block_size=0", "1 or more"]),
        (["--max-num-seqs", "0"], ["max_num_seqs=0", "1 or more"]),
        (["--max-num-batched-tokens", "-5"], ["max_num_batched_tokens=-5", "1 or more"]),
        (["--max-model-len", "0"], ["max_model_len=0", "1 or more"]),
        (["--memory-utilization", "1.5"], ["memory_utilization=1.5", "at most 1", "0.9"]),
        (["--memory-utilization", "nan"], ["memory_utilization=nan", "at most 1"]),
        (["--kv-bytes", "0"], ["kv_bytes=0", "1 or more"]),
        (["--kv-bytes", "2GX"], ["--kv-bytes", "'2GX'", "a size is needed", "GB"]),
        (["--kv-host-bytes", "1e9"], ["--kv-host-bytes", "'1e9'", "80GiB", "count of bytes"]),
        (["--step-budget", "5"], ["--step-budget", "'5' has no unit", "3us"]),
        (["--logit-bias", "7=1", "--logit-bias", "7=2"], ["logit_bias", "twice", "once"]),
        (["--logprobs", "2"], ["--logprobs 2", "--json is not there", "add --json"]),
        (["--prompt-logprobs", "0"], ["--prompt-logprobs 0", "add --json"]),
        (["--echo"], ["--echo is for --json", "add --json"]),
        (["--profile-steps", "3"], ["--profile-steps 3", "add --profile DIR"]),
        (["--kv-bytes", "-2GB"], ["--kv-bytes", "expected one argument"]),
        (["--kv-bytes", "lots"], ["'lots'", "number with a unit", "80GiB"]),
        (["--wait-timeout", "0"], ["wait_timeout_s=0.0", "above 0"]),
        (["--topology", "moon"], ["moon", "neither a file nor shipped", "cpu-laptop"]),
        (["--model", "shape:huge"], ["'huge'", "does not exist", "qwen3-0.6b"]),
        (["--model", "no/such-model"], ["no/such-model", "neither a directory", "hf download"]),
        (["--tp", "99"], ["tp=99", "at least one attention head per rank", "--tp between 1 and"]),
        (["--chat", "--raw"], ["--chat and --raw exclude each other", "give one"]),
        (["--system", "be kind"], ["--system", "--chat is not there", "add it"]),
        (["--greedy", "--temperature", "0.7"], ["--greedy", "--temperature 0.7", "give one"]),
        (["--profile", "/dev/null/x"], ["--profile /dev/null/x", "name another directory"]),
        (["--profile", ".", "--profile-steps", "0"], ["--profile-steps 0", "1 or more"]),
        (["--json", "/no/such/dir/x.jsonl"], ["/no/such/dir", "--json", "make it"]),
    ],
)  # fmt: skip
def test_flags(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    says(refusal(capsys, "generate", *PROMPT, *argv), words)


def test_an_unknown_verb_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    says(refusal(capsys, "generat"), ["'generat'", "generate", "doctor", "tpinfer --help"])


@pytest.mark.parametrize("tp", ["9", "64"])
def test_more_ranks_than_heads(tp: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refusal(capsys, "generate", "--model", str(model), "--tp", tp, *PROMPT)
    says(text, [f"tp={tp}", "has 8", "use --tp between 1 and 8"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "supported are", "Qwen3For"]),
        ({"architectures": None, "model_type": "mamba"}, ["mamba", "supported are", "LlamaFor"]),
        ({"hidden_size": 0}, ["hidden_size is 0", "1 or more"]),
        ({"hidden_size": 65}, ["hidden_size is 65", "multiple of num_attention_heads 8"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads is 3", "divide num_attention_heads 8"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "original weights"]),
        ({"hidden_act": "gelu"}, ["hidden_act is \"gelu\"", "only silu"]),
    ],
)  # fmt: skip
def test_checkpoints_that_are_not_supported(
    changes: dict[str, object],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = write_config(tmp_path / "model", **changes)
    text = refusal(capsys, "generate", "--model", str(model), *PROMPT)
    says(text, [str(model / "config.json"), *words])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["does not exist", "Hugging Face's layout"]),
        ("", ["line 1", "not JSON"]),
        ('{"hidden_size": 64,}', ["not JSON"]),
        ("[]", ["holds a list", "object in braces"]),
        ("\udce9", ["cannot be read", "check the file"]),
    ],
)
def test_directories_without_a_good_config(
    content: str | None, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, errors="surrogateescape")
    text = refusal(capsys, "generate", "--model", str(tmp_path), *PROMPT)
    says(text, [str(tmp_path / "config.json"), *words])


def test_a_file_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    path = embedded_model() / "config.json"
    text = refusal(capsys, "generate", "--model", str(path), *PROMPT)
    says(text, [str(path), "is a file", "the directory that holds config.json"])


LAPTOP = "version: 1\nname: mine\nhosts:\n  me:\n    cpu: {sku: cpu-avx2, cores: 4}\n    ranks: 4\n"


def test_shares_that_are_not_one_a_rank(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topology = tmp_path / "mine.yaml"
    topology.write_text(
        LAPTOP + "    links: [{kind: SHM, ids: 0..3}]\nplacement: {tp: 2, shares: [3, 1]}\n"
    )
    argv = ["generate", "--model", str(model), "--topology", str(topology), *PROMPT]
    says(refusal(capsys, *argv, "--tp", "3"), ["2 shares for tp=3", "one share per rank"])


@pytest.mark.parametrize("verb", [["generate", *PROMPT], ["bench", "latency"]])
def test_more_ranks_than_the_topology_has_places(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_config(tmp_path / "model", num_attention_heads=16)
    text = refusal(capsys, *verb, "--model", str(model), "--topology", "pcie-2numa", "--tp", "9")
    says(text, ["pcie-2numa.yaml has 8 devices", "9 ranks", "fewer ranks"])


def test_ranks_that_nothing_joins(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topology = tmp_path / "mine.yaml"
    topology.write_text(LAPTOP)
    argv = ["--model", str(model), "--topology", str(topology), "--tp", "2", *PROMPT]
    says(refusal(capsys, "generate", *argv), ["mine.yaml", "nothing joins", "add a link"])


def test_a_topology_with_a_mistake_names_its_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topology = tmp_path / "mine.yaml"
    topology.write_text(LAPTOP + "    colour: red\n")
    text = refusal(capsys, "generate", "--model", str(model), "--topology", str(topology), *PROMPT)
    says(text, ["mine.yaml, line 7", "colour"])


def test_prompts_are_read_before_anything_starts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "x"}\n{"text": "y"}\n')
    text = refusal(capsys, "generate", "--model", str(model), "--prompts", str(lines))
    says(text, [f"{lines}:2", "is not a prompt", '"prompt_token_ids"'])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["what", "required"]),
        (["speed"], ["'speed'", "latency", "throughput"]),
        (["latency", "--input-len", "0"], ["--input-len 0", "1 or more"]),
        (["latency", "--num-iters-warmup", "-1"], ["--num-iters-warmup -1", "0 or more"]),
        (["throughput", "--tp", "99"], ["tp=99", "--tp between 1 and"]),
        (["latency", "--output-len", "0"], ["--output-len 0", "1 or more"]),
        (["throughput", "--num-prompts", "0"], ["--num-prompts 0", "1 or more"]),
        (["throughput", "--batch-size", "3"], ["--batch-size 3", "throughput", "--num-prompts"]),
        (["latency", "--num-prompts", "3"], ["--num-prompts 3", "latency", "give --batch-size"]),
        (["latency", "--n", "0"], ["--n 0", "1 or more"]),
        (["latency", "--n", "500"], ["n=500", "1 to 128"]),
        (["latency", "--input-len", "9000"], ["9128 tokens", "lower --input-len"]),
        (
            ["latency", "--max-model-len", "50", "--input-len", "40", "--output-len", "11"],
            ["51 tokens", "--max-model-len is 50", "lower"],
        ),
        (["throughput", "--random-range-ratio", "1"], ["--random-range-ratio 1.0", "below 1"]),
        (["throughput", "--prefix-len", "-1"], ["--prefix-len -1", "0 or more"]),
        (["throughput", "--dataset-name", "hf"], ["hf", "downloaded", "--dataset-path"]),
        (["throughput", "--dataset-name", "c4"], ["c4", "not known", "random", "sharegpt"]),
        (["throughput", "--dataset-name", "sharegpt"], ["sharegpt", "needs --dataset-path"]),
        (["throughput", "--dataset-name", "random", "--dataset-path", "x"], ["not for", "random"]),
        (["throughput", "--dataset", "/no/such.json"], ["/no/such.json", "cannot be read"]),
        (["latency", "--dataset-name", "prefix_repetition"], ["latency times one batch"]),
        (
            ["throughput", "--dataset-name", "prefix_repetition", "--num-prompts", "9"],
            ["--num-prompts 9", "num-prefixes 10", "lower"],
        ),
        (["throughput", "--backend", "hf"], ["--backend hf", "own engine"]),
        (["latency", "--use-beam-search"], ["--use-beam-search", "no beam search", "leave it out"]),
        (["throughput", "--hf-subset", "x"], ["--hf-subset", "nothing is downloaded"]),
        (["throughput", "--async-engine"], ["--async-engine", "leave it out"]),
        (["latency", "--temperature", "-1"], ["temperature=-1.0", "0 (greedy) or more"]),
    ],
)
def test_bench(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    says(refusal(capsys, "bench", *argv), words)


def test_a_dataset_of_texts_needs_a_tokenizer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "x"}\n')
    argv = ["--model", str(model), "--dataset-name", "custom", "--dataset-path", str(lines)]
    text = refusal(capsys, "bench", "throughput", *argv)
    says(text, [str(lines), "is text", "no tokenizer.json", "random prompts"])


def test_a_failure_that_is_no_mistake_in_the_call_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only what tpinfer raises on purpose is shortened; a bug keeps its traceback."""

    def fail(args: object, argv: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr("tpinfer.cli.doctor.run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


def test_ctrl_c_says_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(args: object, argv: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("tpinfer.cli.doctor.run", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "stopped\n"
