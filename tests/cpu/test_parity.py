"""The whole engine against transformers: greedy tokens of every family, on 1 to 4 real ranks."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu.parity_program import MAX_TOKENS
from tests.cpu.tiny_models import SHAPES, greedy_oracle, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random checkpoints of all families, prompts of mixed lengths, transformers' continuations."""
    root = tmp_path_factory.mktemp("parity")
    draw = random.Random(7)
    prompts = [[draw.randrange(331) for _ in range(length)] for length in (41, 5, 1, 17, 16)]
    (root / "prompts.json").write_text(json.dumps(prompts))
    expected = {}
    for name in SHAPES:
        directory = write_checkpoint(name, root / name)
        expected[name] = greedy_oracle(directory, prompts, MAX_TOKENS)
    (root / "expected.json").write_text(json.dumps(expected))
    return root


def generate(root: Path, tp: int, collective: str = "auto") -> dict[str, object]:
    """Tokens by checkpoint name, from `tp` real ranks."""
    out = root / f"found-{tp}-{collective}.json"
    command = [sys.executable, "-m", "tests.cpu.parity_program", str(root), str(out), str(tp)]
    done = subprocess.run(
        [*command, collective], cwd=REPOSITORY, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_tokens_equal_transformers(checkpoints: Path, tp: int) -> None:
    found = generate(checkpoints, tp)
    expected = json.loads((checkpoints / "expected.json").read_text())
    assert sorted(found) == sorted(expected)
    wrong = {name: found[name] for name in expected if found[name] != expected[name]}
    assert not wrong, f"tp={tp} differs from transformers: {wrong}"


def test_oracle_is_not_degenerate(checkpoints: Path) -> None:
    """Tokens that never change would let a broken model pass."""
    expected = json.loads((checkpoints / "expected.json").read_text())
    for name, continuations in expected.items():
        assert len({token for tokens in continuations for token in tokens}) > 8, name


def test_gloo_gives_the_same_tokens(checkpoints: Path) -> None:
    found = generate(checkpoints, 2, "gloo")
    expected = json.loads((checkpoints / "expected.json").read_text())
    assert found["llama-tied-gqa"] == expected["llama-tied-gqa"]
    assert found["qwen3-norms"] == expected["qwen3-norms"]
    assert found["llama-mqa-bias"] == expected["llama-mqa-bias"], "both ranks share its KV head"
