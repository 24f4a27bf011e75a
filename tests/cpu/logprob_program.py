"""Rank program of test_logprobs: requests that want log-probabilities beside others that do not,
each alone and all together through small caches."""

import random
from contextlib import closing
from dataclasses import replace
from typing import Any

from tests.cpu.storm_program import MOST_TOKENS, block_bytes, tiny_config, vars_of
from tpinfer.launching.seat import Seat


def requests_of(seed: int, count: int) -> list[Any]:
    """Prompts with and without a beginning in common, greedy and sampled, with what changes logits
    and with continuations; none, few and many log-probabilities of output and prompt."""
    from tpinfer.config.sampling import SamplingParams
    from tpinfer.engine.requests import GenerationRequest

    draw = random.Random(seed)
    shared = [draw.randrange(3, 331) for _ in range(24)]
    requests = []
    for number in range(count):
        prompt = shared[: draw.choice((0, 9, 16, 24))]
        prompt += [draw.randrange(3, 331) for _ in range(draw.choice((1, 2, 6, 13)))]
        params = SamplingParams(
            temperature=(0.0, 0.0, 0.8)[number % 3],
            repetition_penalty=(1.0, 1.3)[number % 2],
            seed=number,
            max_tokens=min(MOST_TOKENS - len(prompt), draw.choice((3, 9, 20))),
            ignore_eos=True,
            n=draw.choice((1, 1, 2)),
            logprobs=(5, 0, None, 17)[number % 4],
            prompt_logprobs=(3, None, 0, None, 8)[number % 5],
        )
        requests.append(GenerationRequest(prompt, params))
    return requests


def run(
    seat: Seat, directory: str, seed: int, count: int, runs: list[dict[str, Any]]
) -> list[dict[str, Any]] | None:
    """What requests got, one after the other in a roomy cache, then together once for each of
    `runs`: settings with `num_blocks` and `num_host_blocks` of each rank."""
    from tpinfer.engine.rank_engine import open_engine

    roomy = {"num_blocks": 200, "num_host_blocks": 0, "prefix_caching": False}
    found = []
    for generation, settings in enumerate([roomy, *runs]):
        size = block_bytes(directory, seat.world, settings)
        more = {k: v for k, v in settings.items() if k not in ("num_blocks", "num_host_blocks")}
        config = tiny_config(
            seat,
            directory,
            kv_bytes=settings["num_blocks"] * size,
            kv_host_bytes=settings["num_host_blocks"] * size,
            max_model_len=MOST_TOKENS,
            **more,
        )
        with closing(open_engine(config, replace(seat, generation=generation))) as engine:
            if seat.rank:
                engine.serve()
                continue
            requests = requests_of(seed, count)
            batches = [[one] for one in requests] if settings is roomy else [requests]
            told = [one for batch in batches for one in _told(engine, batch)]
            engine.scheduler.check_idle()
            found.append({"told": told, "stats": vars_of(engine.scheduler.stats())})
    return found if seat.rank == 0 else None


def _told(engine: Any, requests: list[Any]) -> list[dict[str, Any]]:
    """Of each request: tokens and log-probabilities of its continuations and of its prompt, and
    how often they were preempted."""
    from tpinfer.engine.metrics import make_result

    for event in engine.generate(requests):
        wanted = requests[event.index].params.logprobs
        assert (event.logprobs is None) == (wanted is None)
    results = [(live, make_result(live, None)) for live in engine._finished]
    return [
        {
            "tokens": [output.token_ids for output in result.outputs],
            "logprobs": [_plain(output.logprobs) for output in result.outputs],
            "prompt_logprobs": _plain(result.prompt_logprobs),
            "num_preemptions": sum(one.sequence.num_preemptions for one in live.outputs),
        }
        for live, result in results
    ]


def _plain(reported: Any) -> Any:
    """Lists of (token, its log-probability, likeliest tokens, theirs)."""
    if reported is None:
        return None
    return [
        one and [one.token_id, one.logprob, list(one.top_token_ids), list(one.top_logprobs)]
        for one in reported
    ]
