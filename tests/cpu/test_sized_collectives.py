"""Two backends side by side, chosen by the size of each sum: right sums, the same tokens, and an
end where a rank dies."""

from pathlib import Path

import pytest

from tests.cpu.ranks import rank_values, run_ranks
from tests.cpu.tpinfer_command import generate, json_lines
from tpinfer.collectives.deepspeed_shm import library_path

CASES = "tests.cpu.collective_cases"
TOPOLOGY = """
version: 1
name: two-paths
hosts:
  box:
    cpu: {cores: 2, mem: 8GB}
    ranks: 2
    links:
      - {kind: SHM, ids: 0..1, bw: 20MB/s, latency: 4us, per_peer: 1us, attainable: 0.5}
      - {kind: GLOO, ids: 0..1, bw: 2GB/s, latency: 400us, per_peer: 100us, attainable: 0.5}
"""
PROMPT = "Once upon a time there was a girl who had a red ball and a dog that liked to run"
pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("size", [2, 3])
def test_each_size_goes_its_own_way_and_sums_are_right(size: int, run_name: str) -> None:
    arguments = {"from_bytes": 4096, "pair": ["shared_memory", "gloo"]}
    found = rank_values(f"{CASES}:sized_sums", size, run_name, arguments)
    assert found == [["shared_memory+gloo", [], True, True]] * size


@pytest.mark.skipif(not library_path().is_file(), reason="DeepSpeed's op is not built")
@pytest.mark.parametrize("pair", [["shared_memory", "deepspeed"], ["deepspeed", "shared_memory"]])
def test_deepspeeds_op_and_the_ring_inside_it(pair: list[str], run_name: str) -> None:
    arguments = {"from_bytes": 4096, "pair": pair}
    found = rank_values(f"{CASES}:sized_sums", 2, run_name, arguments)
    assert [(name, wrong, same) for name, wrong, same, _ in found] == [
        ("shared_memory", [], True)
    ] * 2


def test_a_rank_that_dies_ends_the_second_backend_too(run_name: str) -> None:
    first, second = run_ranks(f"{CASES}:die_in_a_large_sum", 2, run_name, {"from_bytes": 4096})
    assert second.exit_status == -9 and not first.timed_out
    assert "gloo: a collective failed" in first.value
    assert first.seconds < 15


def test_tokens_are_those_of_one_backend(tmp_path: Path) -> None:
    topology = tmp_path / "two.yaml"
    topology.write_text(TOPOLOGY)
    call = ("--tp", "2", "--dtype", "float32", "--greedy", "--max-tokens", "24", "--json", "-")
    call += ("--prompt", PROMPT, "--device", "cpu")
    both = generate(*call, "--topology", topology, "--explain")
    assert both.returncode == 0, both.stderr
    explained = " ".join(both.stderr.split())
    assert "shared_memory native; for" in explained and "and more gloo" in explained
    tokens = [row for row in json_lines(both.stdout)]
    for alone in ("shared_memory", "gloo"):
        one = generate(*call, "--collective", alone)
        assert one.returncode == 0, one.stderr
        assert [row["token_ids"] for row in json_lines(one.stdout)] == [
            row["token_ids"] for row in tokens
        ]
