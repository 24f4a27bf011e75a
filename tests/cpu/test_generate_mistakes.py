"""What a user can get wrong with `tpinfer generate`: every mistake ends with one line that names
the value and the remedy, without a traceback, and leaves nothing running."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cpu.cli_program import assert_one_line, quick_generate
from tests.cpu.tiny_models import write_checkpoint
from tests.cpu.tiny_tokenizers import byte_level
from tests.cpu.tpinfer_command import GENERATE, REPOSITORY, user_environment
from tpinfer.cli.main import main
from tpinfer.config.environment import read_environment
from tpinfer.launching.seat import count_gpus


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint("llama-tied-gqa", tmp_path_factory.mktemp("models") / "tiny")
    return byte_level(directory)


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The line that a call without any rank started answers with."""
    assert main(["generate", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tp 0", "tp=0 must be a whole number of 1 or more"),
        ("--tp -1", "tp=-1 must be a whole number of 1 or more"),
        ("--tp 9", "but LlamaForCausalLM has 8; use --tp between 1 and 8"),
        ("--max-tokens 0", "max_tokens=0 is out of range; use 1 or more"),
        ("--temperature nan", "temperature=nan is out of range"),
        ("--temperature -1", "temperature=-1.0 is out of range"),
        ("--top-p 0", "top_p=0.0 is out of range"),
        ("--top-k 99999999999999999999", "use 0 (off) to 2**31-1"),
        ("--seed -1", "use 0 to 2**63-1"),
        ("--kv-bytes lots", "write it like 80GiB"),
        ("--kv-bytes 0", "kv_bytes=0 must be a whole number of 1 or more"),
        ("--block-size 0", "block_size=0"),
        ("--memory-utilization nan", "memory_utilization=nan must be above 0"),
        ("--wait-timeout inf", "at most 1e+06 seconds"),
        ("--max-model-len 257", "beyond the 256 positions the model was made for"),
        ("--chat --raw", "--chat and --raw exclude each other"),
        ("--json /none/out.jsonl", "there is no directory /none; make it first"),
        ("--json /dev", "--json /dev is a directory; name a file in it"),
        ("--topology nowhere.yaml", "nowhere.yaml"),
        ("--profile-steps 0 --profile x", "--profile-steps 0"),
        ("--model shape:huge", "shape 'huge' does not exist; there are"),
        ("--model /none", "neither a directory nor in the hub cache"),
    ],
)
def test_settings_that_cannot_work(model: Path, capsys, flags: str, words: str) -> None:
    assert words in mistake(capsys, "--model", model, "--prompt", "hi", *flags.split())


def test_a_gpu_that_is_not_there(model: Path, capsys) -> None:
    if count_gpus(read_environment().visible_gpus):
        pytest.skip("there is a GPU")
    for tp in ("1", "2"):
        found = mistake(capsys, "--model", model, "--prompt", "x", "--device", "cuda", "--tp", tp)
        assert "use --device cpu" in found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "config.json does not exist; give a directory with a checkpoint"),
        (b"\xb8\xff\x00", "config.json cannot be read"),
        (b"{", "config.json, line 1: not JSON"),
        (b"[" * 100_000, "config.json: not JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "config.json: not JSON"),
        (b"{}", "architectures is missing; supported are LlamaForCausalLM"),
        (b'{"architectures": ["GPT2LMHeadModel"]}', "supported are LlamaForCausalLM"),
        (b'{"architectures": [{}]}', "supported are LlamaForCausalLM"),
    ],
)
def test_config_json_missing_or_garbled(
    tmp_path: Path, capsys, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert words in mistake(capsys, "--model", tmp_path, "--prompt", "hi")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no lines; put one object a line"),
        (b"\n \n", "has no lines; put one object a line"),
        (b'{"prompt": "a"}\nhello\n', ":2: is not JSON"),
        (b'{"prompt": "a"}\n\xff\xfe\n', "is not UTF-8 at byte 16; convert it"),
        (b"[" * 100_000, ":1: is not JSON"),
        (b'{"prompt": "half \\ud83d"}', ":1: the prompt holds half a surrogate pair"),
        (b'{"text": "a"}', ':1: \'{"text": "a"}\' is not a prompt; expected'),
        (b'{"prompt": "a", "prompt_token_ids": [1]}', "is not a prompt"),
        (b'{"prompt_token_ids": []}', "is not a prompt"),
        (b'{"prompt_token_ids": [-1]}', "is not a prompt"),
        (b'{"prompt_token_ids": [true]}', "is not a prompt"),
    ],
)
def test_prompt_files(model: Path, tmp_path: Path, capsys, content: bytes, words: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    found = mistake(capsys, "--model", model, "--prompts", path)
    assert str(path) in found and words in found


def test_prompts_that_cannot_be_read(model: Path, tmp_path: Path, capsys) -> None:
    for flag in ("--file", "--prompts"):
        found = mistake(capsys, "--model", model, flag, tmp_path / "none")
        assert "cannot be read (No such file or directory); check the path" in found
        assert "(Is a directory)" in mistake(capsys, "--model", model, flag, tmp_path)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    found = mistake(capsys, "--model", model, "--file", tmp_path / "latin.txt")
    assert "is not UTF-8 at byte 3; convert it" in found
    assert "--prompt: the text is not UTF-8" in mistake(
        capsys, "--model", model, "--prompt", "caf\udce9"
    )


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("flags", "line", "words"),
    [
        (
            "--tp 2",
            json.dumps({"prompt_token_ids": [7] * 300}).encode(),
            "a prompt of 300 tokens and --max-tokens 128 make 428, but 256 is the limit",
        ),
        (
            "--max-model-len 16 --max-tokens 99999999999999999999",
            b'{"prompt": "hi"}',
            "but 16 is the limit (--max-model-len, at most the model's own); shorten one",
        ),
        (
            "--kv-bytes 7000",
            b'{"prompt": "hi"}',
            "the request needs 9 KV blocks of 16 tokens, but the cache has 1; shorten it",
        ),
        ("--kv-bytes 1", b'{"prompt": "hi"}', "raise --kv-bytes to at least 6144"),
        ("--kv-bytes 100TB --tp 2", b'{"prompt": "hi"}', "--kv-bytes 100000000000000 exceeds"),
        ("", b'{"prompt_token_ids": [330, 331]}', "token 331 is outside the model's vocabulary"),
        ("", b'{"prompt": ""}', "prompt 1 has no tokens; give it at least one character"),
        ("", b'{"prompt": "caf\xe9"}', "standard input: is not UTF-8 at byte 15; convert it"),
    ],
)
def test_prompts_that_cannot_run(
    model: Path, tmp_path: Path, run_name: str, flags: str, line: bytes, words: str
) -> None:
    """From a pipe, where nothing can be checked before the ranks start."""
    (tmp_path / "stdin").write_bytes(line)
    arguments = ("--model", model, "--prompts", "-", *flags.split())
    done = quick_generate(run_name, *arguments, stdin=tmp_path / "stdin")
    assert_one_line(done.value, done.output, words)


@pytest.mark.ranks
@pytest.mark.parametrize("flags", ["--tp 2", "--tp 2 --temperature 1", "", "--temperature 1"])
def test_weights_that_are_not_numbers(
    model: Path, tmp_path: Path, run_name: str, flags: str
) -> None:
    broken = shutil.copytree(model, tmp_path / "nan")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors")
    done = quick_generate(run_name, "--model", broken, "--prompt", "hi", *flags.split())
    assert_one_line(done.value, done.output, "the model's logits are not numbers (NaN)")


@pytest.mark.ranks
def test_a_closed_output_and_a_full_one(model: Path, tmp_path: Path) -> None:
    """Without any standard stream the file is written; a full one is named; a reader that has seen
    enough (`| head`) ends the run without a word.
    """
    out = tmp_path / "out.jsonl"
    call = f"{' '.join(GENERATE)} --model {model} --prompt hi --ignore-eos --max-tokens 99"
    environment = user_environment()

    def shell(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=100,
            errors="replace",
        )  # fmt: skip

    assert shell(f"{call} --tp 2 --json {out} <&- >&- 2>&-").returncode == 0
    assert len(json.loads(out.read_text())["token_ids"]) == 99
    done = shell(f"{call} > /dev/full")
    words = "standard output cannot be written (No space left on device)"
    assert_one_line(done.returncode, done.stderr, words)
    done = shell(f"{call} --tp 2 | head -c 3")
    assert done.returncode == 141
    assert "Traceback" not in done.stderr and "failed" not in done.stderr
