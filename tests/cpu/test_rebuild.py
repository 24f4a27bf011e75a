"""A rank of two dies or hangs while an engine answers: the engine goes on with new ranks."""

import asyncio
import signal
import time
from typing import Any

import pytest

from tpinfer import LLM, AsyncEngine, SamplingParams
from tpinfer.config.errors import RankError
from tpinfer.engine.requests import TokenEvent

PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=7, max_tokens=60, ignore_eos=True),
]
PROMPTS = ["Once upon a time", "The fox"]
WITHIN_S = 10.0
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    """Tokens of an undisturbed run."""
    with LLM("story", tp=2, dtype="float32") as llm:
        return [one.token_ids for one in llm.generate(PROMPTS, PARAMS)]


async def _disturbed(number: int, **settings: Any) -> tuple[list[list[int]], float]:
    """Tokens of each request, and the longest wait for one, with `number` sent to rank 1 when the
    tenth token of the first has come."""
    async with await AsyncEngine.start("story", tp=2, dtype="float32", **settings) as engine:
        followers = engine._opened._followers
        assert followers is not None
        longest_s = 0.0

        async def tokens(place: int) -> list[int]:
            nonlocal longest_s
            found: list[int] = []
            last_s = time.monotonic()
            async for event in engine.generate(PROMPTS[place], PARAMS[place]):
                assert isinstance(event, TokenEvent)
                found.append(event.token_id)
                longest_s = max(longest_s, time.monotonic() - last_s)
                last_s = time.monotonic()
                if place == 0 and len(found) == 10:
                    followers._processes[0].send_signal(number)
            return found

        found = list(await asyncio.gather(tokens(0), tokens(1)))
        assert engine._opened._followers is not followers, "the ranks were not started anew"
        engine._opened.engine.scheduler.check_idle()
        return found, longest_s


@pytest.mark.parametrize(
    ("number", "collective", "depth"),
    [
        (signal.SIGKILL, "shared_memory", 1),
        (signal.SIGKILL, "gloo", 2),
        (signal.SIGSTOP, "shared_memory", 2),
        (signal.SIGSTOP, "gloo", 1),
    ],
)
def test_requests_go_on_with_the_same_tokens(
    wanted: list[list[int]],
    number: int,
    collective: str,
    depth: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    found, longest_s = asyncio.run(
        _disturbed(number, collective=collective, steps_in_flight=depth, step_timeout_s=1.0)
    )
    assert found == wanted
    assert longest_s < WITHIN_S
    told = capfd.readouterr().err
    assert "starting ranks anew (generation 1)" in told
    if number == signal.SIGSTOP:
        assert "not reported by rank 1" in told and "Thread 0x" in told


def test_a_rank_that_dies_idle_is_replaced_before_the_next_call(wanted: list[list[int]]) -> None:
    with LLM("story", tp=2, dtype="float32") as llm:
        followers = llm._opened._followers
        assert followers is not None
        followers._processes[0].kill()
        until_s = time.monotonic() + WITHIN_S
        while llm._opened._followers is followers:
            assert time.monotonic() < until_s, "nobody noticed"
            time.sleep(0.02)
        assert [one.token_ids for one in llm.generate(PROMPTS, PARAMS)] == wanted


def test_a_call_goes_on_when_a_rank_dies_in_it(wanted: list[list[int]]) -> None:
    """Its measures are those of the new ranks."""
    with LLM("story", tp=2, dtype="float32") as llm:
        opened = llm._opened
        followers, step = opened._followers, opened.engine.step
        assert followers is not None
        num_steps = 0

        def counted() -> list[TokenEvent]:
            nonlocal num_steps
            num_steps += 1
            if num_steps == 12:
                followers._processes[0].kill()
            return step()

        opened.engine.step = counted
        results = llm.generate(PROMPTS, PARAMS)
        assert opened._followers is not followers
        assert [one.token_ids for one in results] == wanted
        assert all(one.attribution is not None for one in results)


def test_an_engine_whose_ranks_always_die_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM("story", tp=2, dtype="float32", max_rebuilds=2) as llm:
        opened = llm._opened

        def fail(_error: RankError) -> None:
            raise RankError("rank 1 failed: no memory")

        assert opened.engine.rebuilds is not None and opened._followers is not None
        monkeypatch.setattr(opened.engine.rebuilds, "_open_next", fail)
        opened._followers._processes[0].kill()
        with pytest.raises(RankError, match="no memory; the engine was rebuilt 2 times in a row"):
            llm.generate(PROMPTS, PARAMS)
