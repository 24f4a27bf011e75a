"""Log-probabilities that the engine reports are transformers', and those of a request alone: in a
crowd, with prompts in chunks, and for sequences that were preempted on the way."""

from functools import cache
from typing import Any

import pytest

from tests.cpu.logprob_program import requests_of
from tests.cpu.ranks import rank_values
from tests.cpu.tiny_models import write_checkpoint

pytestmark = pytest.mark.ranks
PROGRAM = "tests.cpu.logprob_program:run"
COUNT = 10
NEAR = 5e-5
"""Nats by which float32 may differ where sums are taken in another order; measured: 8e-6."""
RUNS = [
    {"num_blocks": 15, "num_host_blocks": 0, "max_num_batched_tokens": 5, "max_num_seqs": 16},
    {"num_blocks": 16, "num_host_blocks": 60, "max_num_batched_tokens": 16, "steps_in_flight": 2},
]
"""By recompute; by host memory, overlapped."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Directory of a family's checkpoint, written when first asked for."""
    root = tmp_path_factory.mktemp("logprobs")
    return cache(lambda name: str(write_checkpoint(name, root / name)))


def oracle(directory: str, sequences: list[list[int]]) -> list[Any]:
    """float64 [len, V] of each: log_softmax of transformers' float32 logits."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [
            model(torch.tensor([tokens])).logits[0].double().log_softmax(-1) for tokens in sequences
        ]


def check_one(reported: list[Any], expected: Any, token: int, num_top: int) -> None:
    """One position's report against float64 [V]."""
    token_id, logprob, top_ids, top_logprobs = reported
    assert token_id == token
    assert logprob == pytest.approx(float(expected[token]), abs=NEAR)
    assert len(top_ids) == len(set(top_ids)) == len(top_logprobs) == num_top
    top = expected.topk(num_top)
    assert top_logprobs == pytest.approx(top.values.tolist(), abs=NEAR)
    # Equal ones may stand in either order; each has its own value, and it is among the largest.
    assert expected[top_ids].tolist() == pytest.approx(top_logprobs, abs=NEAR)


def check_request(request: Any, told: dict[str, Any], expected: list[Any]) -> None:
    """All that a request was told against the oracle of each of its continuations."""
    length, params = len(request.prompt_token_ids), request.params
    for tokens, reported, values in zip(told["tokens"], told["logprobs"], expected, strict=True):
        if params.logprobs is None:
            assert reported is None
            continue
        assert len(reported) == len(tokens) == params.max_tokens
        for i, one in enumerate(reported):
            check_one(one, values[length + i - 1], tokens[i], params.logprobs)
    prompt = told["prompt_logprobs"]
    if params.prompt_logprobs is None:
        assert prompt is None
        return
    assert len(prompt) == length and prompt[0] is None
    for i, one in enumerate(prompt[1:], 1):
        token = request.prompt_token_ids[i]
        check_one(one, expected[0][i - 1], token, params.prompt_logprobs)


@pytest.mark.parametrize(
    ("name", "tp"), [("llama-tied-gqa", 1), ("llama-tied-gqa", 2), ("llama-mqa-bias", 2)]
)
def test_a_crowd_is_told_what_each_would_be_told_alone(
    name: str, tp: int, checkpoint, run_name: str
) -> None:
    directory, group = checkpoint(name), 2 if name == "llama-mqa-bias" else 1
    runs = [{**one, "num_blocks": -(-one["num_blocks"] // group)} for one in RUNS]
    asked = {"directory": directory, "seed": 4, "count": COUNT, "runs": runs}
    alone, *together = rank_values(PROGRAM, tp, run_name, asked, timeout_s=120)[0]
    requests = requests_of(4, COUNT)
    sequences = [
        [*request.prompt_token_ids, *tokens]
        for request, told in zip(requests, alone["told"], strict=True)
        for tokens in told["tokens"]
    ]
    values = iter(oracle(directory, sequences))
    expected = [[next(values) for _ in told["tokens"]] for told in alone["told"]]
    for run in (alone, *together):
        assert [one["tokens"] for one in run["told"]] == [one["tokens"] for one in alone["told"]]
        for request, told, of_request in zip(requests, run["told"], expected, strict=True):
            check_request(request, told, of_request)
    recomputed, moved = (run["stats"] for run in together)
    assert recomputed["num_recomputed"] > 0 and moved["num_moved_out"] > 0
    met = [
        request.params
        for run in together
        for request, told in zip(requests, run["told"], strict=True)
        if told["num_preemptions"]
    ]
    assert any(params.logprobs is not None for params in met)
    assert any(params.prompt_logprobs is not None for params in met)
