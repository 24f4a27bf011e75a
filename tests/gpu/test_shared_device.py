"""Two ranks on one GPU: the tokens of one rank, by every route that needs nothing to be brought."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu
CALL = ["generate", "--greedy", "--max-tokens", "12", "--dtype", "float32", "--json", "-"]
CALL += ["--prompt", "Once upon a time", "--device", "cuda", "--kv-bytes", "64MB", "--explain"]


def generated(*flags: str) -> tuple[list[int], str]:
    done = subprocess.run(
        [sys.executable, "-m", "tpinfer", *CALL, *flags], capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["token_ids"], done.stderr


@pytest.mark.parametrize("collective", ["auto", "nccl"])
def test_tokens_of_two_ranks_are_those_of_one(collective: str) -> None:
    expected, _ = generated()
    found, said = generated("--tp", "2", "--share-device", "--collective", collective)
    assert found == expected
    assert "emulation: no speed claim" in said
    assert ("own one-shot" if collective == "auto" else "sockets") in said
