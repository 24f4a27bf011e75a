"""Checkpoints on real ranks: what a rank reads and holds, files in parts, uneven shares, and damage
that ends the run with names. The slices themselves are `test_checkpoint_loader`'s."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cpu.cli_program import assert_one_line, quick_generate
from tests.cpu.ranks import rank_values
from tests.cpu.tiny_models import greedy_oracle, write_checkpoint
from tests.cpu.tpinfer_command import json_lines

pytestmark = pytest.mark.ranks
SCRATCH_BYTES = 8 << 20
"""What loading may hold beside the parameters: the conversion's 4 MiB, and as much for pages."""
PROMPT = [7, 300, 12, 1, 45, 8]
NUM_TOKENS = 8
OUT = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 MB of bfloat16, most of it in three tensors: one of them whole would show."""
    directory = tmp_path_factory.mktemp("wide")
    hidden, inner, vocab = 1024, 16384, 1024
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": 1, "num_attention_heads": 16, "vocab_size": vocab,
        "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    shapes = {f"{layer}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
    shapes |= {f"{layer}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    shapes |= {f"{layer}mlp.down_proj.weight": (hidden, inner), "model.norm.weight": (hidden,)}
    shapes |= {f"{layer}{name}_layernorm.weight": (hidden,)
               for name in ("input", "post_attention")}  # fmt: skip
    shapes["model.embed_tokens.weight"] = (vocab, hidden)
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_rank_reads_its_share_and_holds_no_more(wide: Path, size: int, run_name: str) -> None:
    """By the system's own count of bytes, headers included; 3 ranks cut 16 heads unevenly."""
    header_bytes = int.from_bytes((wide / "model.safetensors").read_bytes()[:8], "little")
    target, whole = "tests.cpu.loading_program:load", 0
    for found in rank_values(target, size, run_name, {"directory": str(wide)}, timeout_s=60):
        assert found["share_bytes"] <= found["read_bytes"]
        assert found["read_bytes"] <= found["share_bytes"] * 1.02 + header_bytes + 8192
        assert found["kept_bytes"] <= found["grown_bytes"] + (1 << 20)
        assert found["grown_bytes"] <= found["kept_bytes"] + SCRATCH_BYTES
        whole += found["share_bytes"]
    assert whole == pytest.approx((wide / "model.safetensors").stat().st_size, rel=0.02)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in several files, as transformers writes it, and one tensor per file."""
    directory = write_checkpoint("llama-tied-gqa", tmp_path_factory.mktemp("parts") / "m")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = {name: f"model-{i:05d}-of-{len(tensors):05d}.safetensors"
             for i, name in enumerate(sorted(tensors), 1)}  # fmt: skip
    for name, file in names.items():
        save_file({name: tensors[name]}, directory / file)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "p.jsonl").write_text(json.dumps({"prompt_token_ids": PROMPT}))
    return directory


@pytest.fixture(scope="module")
def expected(parts: Path) -> list[int]:
    return greedy_oracle(parts, [PROMPT], NUM_TOKENS)[0]


UNEVEN = """version: 1
name: uneven
hosts:
  here:
    cpu: {sku: cpu-avx2, cores: 2, mem: 16GB, mem_bw: 40GB/s}
    ranks: 3
    links:
      - {kind: SHM, ids: 0..2, bw: 10GB/s}
placement: {tp: 3, shares: [4, 1, 2]}
"""


@pytest.mark.parametrize("shares", ["", UNEVEN])
def test_files_in_parts_and_uneven_shares(
    parts: Path, expected: list[int], shares: str, tmp_path: Path, run_name: str
) -> None:
    flags: list[object] = ["--tp", 3, "--greedy", "--ignore-eos", "--max-tokens", NUM_TOKENS]
    if shares:
        (tmp_path / "uneven.yaml").write_text(shares)
        flags += ["--topology", tmp_path / "uneven.yaml"]
    out = tmp_path / "out.jsonl"
    done = quick_generate(
        run_name, "--model", parts, "--prompts", parts / "p.jsonl", "--json", out, *flags
    )
    assert done.value == 0, done.output
    assert json_lines(out)[0]["token_ids"] == expected


def test_as_many_shares_as_ranks(parts: Path, tmp_path: Path, run_name: str) -> None:
    (tmp_path / "uneven.yaml").write_text(UNEVEN)
    done = quick_generate(
        run_name, "--model", parts, "--prompts", parts / "p.jsonl", "--tp", 2,
        "--topology", tmp_path / "uneven.yaml",
    )  # fmt: skip
    assert done.value == 2
    assert "the placement names 3 shares for tp=2; give one share per rank" in done.output


def file_of(directory: Path, tensor: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][tensor]


def truncate(directory: Path) -> None:
    path = file_of(directory, OUT)
    os.truncate(path, path.stat().st_size - 1)


def lose_a_file(directory: Path) -> None:
    file_of(directory, OUT).unlink()


def garble_a_header(directory: Path) -> None:
    path = file_of(directory, OUT)
    path.write_bytes(b"\xff" * path.stat().st_size)


def reshape(directory: Path) -> None:
    save_file({OUT: torch.zeros(64, 60)}, file_of(directory, OUT))


def make_integers(directory: Path) -> None:
    save_file({OUT: torch.zeros(64, 64, dtype=torch.int8)}, file_of(directory, OUT))


def rename(directory: Path) -> None:
    save_file({"other": torch.zeros(64, 64)}, file_of(directory, OUT))


def forget_a_tensor(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][OUT]
    path.write_text(json.dumps(index))


def reach_outside(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {OUT: "../../etc/passwd"}}))


def break_the_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("[" * 100_000)


def only_pickles(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    torch.save({OUT: torch.zeros(2)}, directory / "pytorch_model.bin")


def nothing_at_all(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate, f"tensor {OUT}: expected to end at byte"),
    (lose_a_file, "which is missing; download it again"),
    (garble_a_header, "it is truncated or not a safetensors file - copy it again"),
    (reshape, f"tensor {OUT}: expected shape (64, 64) from config.json, found (64, 60)"),
    (make_integers, f"tensor {OUT}: expected float32, bfloat16, float16, found int8"),
    (rename, f"places tensor {OUT} in"),
    (forget_a_tensor, f"tensor {OUT} is missing; config.json and weights are of different models"),
    (reach_outside, "'../../etc/passwd' outside its own directory; refused"),
    (break_the_index, "is not a weight index"),
    (only_pickles, "has only pickle weights (pytorch_model.bin), which can run code when opened"),
    (nothing_at_all, "has neither model.safetensors nor model.safetensors.index.json"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[d.__name__ for d, _ in DAMAGES])
def test_damage_ends_all_ranks_with_one_line(
    parts: Path, damage: Callable[[Path], None], words: str, tmp_path: Path, run_name: str
) -> None:
    directory = shutil.copytree(parts, tmp_path / "damaged")
    damage(directory)
    done = quick_generate(
        run_name, "--model", directory, "--prompts", directory / "p.jsonl", "--tp", 2
    )
    assert_one_line(done.value, done.output, words)
    assert str(directory) in done.output
