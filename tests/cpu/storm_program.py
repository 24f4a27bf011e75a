"""Rank programs of the storms: random requests of a tiny model through caches that are far too
small, so that blocks are shared, forked, slid over, moved to the host and back."""

import random
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.cpu.engine_program import tokens_of, vars_of
from tpinfer.launching.seat import Seat

BLOCK = 4
MOST_TOKENS = 60
"""Prompt and output of the longest request: 15 blocks."""


def requests_of(seed: int, count: int, logprobs: int | None = None) -> list[Any]:
    """Prompts with beginnings in common and without; greedy and sampled, 1 to 4 continuations,
    three priorities, log-probabilities of some prompts."""
    from tpinfer.config.sampling import SamplingParams
    from tpinfer.engine.requests import GenerationRequest

    draw = random.Random(seed)
    shared = [draw.randrange(3, 331) for _ in range(24)]
    requests = []
    for number in range(count):
        length = draw.choice((1, 2, 4, 7, 8, 13, 20))
        prompt = shared[: draw.choice((0, 0, 4, 11, 16, 24))]
        prompt += [draw.randrange(3, 331) for _ in range(length)]
        room = MOST_TOKENS - len(prompt)
        params = SamplingParams(
            temperature=draw.choice((0.0, 0.0, 0.7)),
            top_k=draw.choice((0, 5)),
            seed=number,
            max_tokens=min(room, draw.choice((1, 2, 5, 9, 16, 40))),
            ignore_eos=True,
            n=draw.choice((1, 1, 1, 2, 4)),
            prompt_logprobs=draw.choice((None, None, None, 2)),
            logprobs=logprobs,
        )
        requests.append(GenerationRequest(prompt, params, priority=draw.randrange(3)))
    return requests


def tiny_config(seat: Seat, directory: str, **settings: Any) -> Any:
    """An engine's configuration in float32, with blocks of 4 tokens."""
    from tpinfer.config.dtypes import DType
    from tpinfer.config.engine import EngineConfig

    return EngineConfig(
        model_dir=Path(directory),
        tp=seat.world,
        dtype=DType.FLOAT32,
        block_size=BLOCK,
        wait_timeout_s=60,
        **settings,
    )


def alone(
    seat: Seat, directory: str, seed: int, count: int, logprobs: int | None = None, **settings: Any
) -> Any:
    """What each request gets when it has the engine to itself."""
    from tpinfer.engine.rank_engine import open_engine

    config = tiny_config(
        seat, directory, prefix_caching=False, max_model_len=MOST_TOKENS, kv_bytes=2**22, **settings
    )
    with closing(open_engine(config, seat)) as engine:
        if seat.rank:
            engine.serve()
            return None
        return [told_of(engine, [one])[0] for one in requests_of(seed, count, logprobs)]


def told_of(engine: Any, requests: list[Any]) -> list[list[Any]]:
    """By request and continuation: tokens, or where they were asked for the log-probabilities of
    tokens with the likeliest ones."""
    tokens = tokens_of(engine, requests)
    if requests[0].params.logprobs is None:
        return tokens
    return [
        [
            [[one.token_id, list(one.top_token_ids), list(one.top_logprobs)] for one in o.logprobs]
            for o in live.outputs
        ]
        for live in engine._finished
    ]


def together(
    seat: Seat,
    directory: str,
    seed: int,
    count: int,
    runs: list[dict[str, Any]],
    logprobs: int | None = None,
) -> list[dict[str, Any]] | None:
    """All at once, once for each of `runs`: settings of the engine, `num_blocks` and
    `num_host_blocks` of each rank among them."""
    from tpinfer.engine.rank_engine import open_engine

    found = []
    for generation, run in enumerate(runs):
        settings = dict(run)
        one_block = block_bytes(directory, seat.world, settings)
        config = tiny_config(
            seat,
            directory,
            kv_bytes=settings.pop("num_blocks") * one_block,
            kv_host_bytes=settings.pop("num_host_blocks") * one_block,
            max_model_len=MOST_TOKENS,
            **settings,
        )
        with closing(open_engine(config, replace(seat, generation=generation))) as engine:
            if seat.rank:
                engine.serve()
                continue
            tokens = told_of(engine, requests_of(seed, count, logprobs))
            engine.scheduler.check_idle()
            limits = engine.scheduler.limits
            counted = {"num_blocks": limits.num_blocks, "num_groups": limits.num_groups}
            stats = vars_of(engine.scheduler.stats()) | counted
            found.append({"tokens": tokens, "stats": stats})
    return found if seat.rank == 0 else None


def block_bytes(directory: str, tp: int, settings: dict[str, Any]) -> int:
    """Cache bytes of a block on a rank that holds it."""
    from tpinfer.config.dtypes import DType
    from tpinfer.config.huggingface import read_model_spec
    from tpinfer.costs.ledger import CostLedger
    from tpinfer.sharding.partition import partition_model

    spec = read_model_spec(Path(directory))
    partition = partition_model(spec, tp, None, settings.get("kv_layout", "auto"))
    kv_dtype = DType.INT8 if settings.get("kv_cache_dtype") == "int8" else DType.FLOAT32
    ledger = CostLedger(spec, partition, 0, DType.FLOAT32, kv_dtype)
    return BLOCK * ledger.kv_bytes_per_token
