"""The asyncio engine: streams, cancellation and errors, each without touching the other callers."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from tpinfer.config.errors import ConfigError, RankError
from tpinfer.config.sampling import SamplingParams
from tpinfer.engine.async_engine import AsyncEngine

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


def with_engine(body: Callable[[AsyncEngine], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        async with await AsyncEngine.start("story", dtype="float32", **settings) as engine:
            await asyncio.wait_for(body(engine), 60)

    asyncio.run(run())


def test_streams_of_many_callers_are_their_own() -> None:
    async def body(engine: AsyncEngine) -> None:
        async def stream(prompt: str) -> str:
            return "".join([event.text async for event in engine.generate(prompt, GREEDY)])

        prompts = ["Once upon a time", "The fox", "A little girl"] * 4
        together = await asyncio.gather(*(stream(prompt) for prompt in prompts))
        for prompt, text in zip(prompts[:3], together[:3], strict=True):
            result = await engine.complete(prompt, GREEDY)
            assert result.outputs[0].text == text
            assert result.outputs[0].finish_reason == "length"
        assert together[:3] * 4 == list(together)

    with_engine(body)


def test_leaving_frees_the_blocks_within_a_step() -> None:
    async def body(engine: AsyncEngine) -> None:
        scheduler = engine._opened.engine.scheduler
        async with aclosing(engine.generate("Once", ENDLESS)) as events:
            async for _ in events:
                assert scheduler.num_running == 1
                break
        task = asyncio.create_task(engine.complete("The fox", ENDLESS))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        result = await engine.complete("Once", GREEDY)  # runs after the aborts were read
        assert len(result.outputs[0].token_ids) == 12
        assert scheduler.num_running == scheduler.num_waiting == 0
        scheduler.check_idle()

    with_engine(body)


def test_a_request_that_cannot_run_disturbs_nobody() -> None:
    async def body(engine: AsyncEngine) -> None:
        good = asyncio.create_task(engine.complete("Once", GREEDY))
        with pytest.raises(ConfigError, match="--max-model-len"):
            await engine.complete("Once", SamplingParams(max_tokens=10**6))
        with pytest.raises(ConfigError, match="outside the vocabulary"):
            await engine.complete([10**7], GREEDY)
        assert len((await good).outputs[0].token_ids) == 12

    with_engine(body)


def test_closing_ends_streams_with_abort_and_refuses_more() -> None:
    async def run() -> None:
        engine = await AsyncEngine.start("story", dtype="float32")
        task = asyncio.create_task(engine.complete("Once", ENDLESS))
        await asyncio.sleep(0.1)
        await engine.close()
        result = await asyncio.wait_for(task, 10)
        assert result.outputs[0].finish_reason == "abort"
        with pytest.raises(RankError, match="closed"):
            await engine.complete("Once", GREEDY)
        await engine.close()

    asyncio.run(run())


@pytest.mark.ranks
def test_a_killed_rank_is_told_to_every_caller() -> None:
    async def body(engine: AsyncEngine) -> None:
        followers = engine._opened._followers
        assert followers is not None
        task = asyncio.create_task(engine.complete("Once", ENDLESS))
        await asyncio.sleep(0.1)
        followers._processes[0].kill()
        with pytest.raises(RankError, match="rank 1 failed: killed by SIGKILL"):
            await asyncio.wait_for(task, 20)
        with pytest.raises(RankError):
            await engine.complete("Once", GREEDY)

    with_engine(body, tp=2, max_rebuilds=0)


@pytest.mark.ranks
@pytest.mark.parametrize("depth", [1, 2])
def test_two_ranks_give_what_one_gives(depth: int) -> None:
    texts: list[str | None] = []

    async def body(engine: AsyncEngine) -> None:
        result = await engine.complete("Once upon a time", GREEDY)
        texts.append(result.outputs[0].text)

    with_engine(body)
    with_engine(body, tp=2, steps_in_flight=depth)
    assert texts[0] == texts[1]
