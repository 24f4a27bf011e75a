"""What clumsy and hostile callers do to an engine: the next caller must not notice."""

import asyncio
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from tests.cpu.engine_program import _break_op
from tpinfer import LLM, AsyncEngine, SamplingParams
from tpinfer.config.errors import ConfigError, RankError

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("story", dtype="float32") as opened:
        yield opened


@contextmanager
def interrupts(*after_s: float) -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread after so many seconds, as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, *after_s)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


NO_PROMPTS: list[Any] = [
    None, 5, math.nan, b"Once", {"a": 1}, {5}, [1.5], ["a", 5], [math.nan], [True], [b"x"], [["a"]],
    [[1, [2]]], [[-1]], [[2**70]], "\ud800", "", [], [[]],
]  # fmt: skip
NO_PRIORITIES: list[Any] = ["x", 1.5, math.nan, True, [1], 2**70, -(2**70)]


@pytest.mark.parametrize("prompts", NO_PROMPTS, ids=ascii)
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(ConfigError):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize("priority", NO_PRIORITIES, ids=repr)
def test_what_is_no_priority_is_refused(llm: LLM, priority: Any) -> None:
    """A list or text would be multiplied: gigabytes, and the engine with them."""
    with pytest.raises(ConfigError, match="priorit"):
        llm.generate("Once", GREEDY, priorities=[priority])


@pytest.mark.parametrize("params", [{"n": 2}, "x", 0.7, [None, 5], [{"n": 2}]], ids=repr)
def test_what_are_no_parameters_is_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(ConfigError, match="params"):
        llm.generate("Once", params)


@pytest.mark.parametrize("salt", [None, b"x", 5, "\ud800"], ids=ascii)
def test_what_is_no_salt_is_refused(llm: LLM, salt: Any) -> None:
    with pytest.raises(ConfigError, match="cache_salt"):
        llm.generate("Once", GREEDY, cache_salt=salt)


@pytest.mark.parametrize(
    "messages", [None, 5, "x", [], [5], [{"role": "user", "content": "\ud800"}]], ids=ascii
)
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(ConfigError):
        llm.chat(messages, GREEDY)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": 5}, {"topology": 5}, {"memory_utilization": "x"}, {"seed": "x"},
        {"prefix_caching": "no"}, {"wait_timeout_s": "x"}, {"step_budget_s": "25ms"},
        {"steps_in_flight": 10**9}, {"memory_utilization": math.nan}, {"tp": "2"},
        {"memory_utilization": None}, {"wait_timeout_s": None}, {"model": ""},
        {"model": "x" * 5000},
    ],
    ids=repr,
)  # fmt: skip
def test_wrong_settings_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LLM(**settings)


def test_an_asyncio_engine_refuses_the_same_and_goes_on() -> None:
    async def run() -> None:
        async with await AsyncEngine.start("story", dtype="float32") as engine:
            for prompt in (None, 5, b"x", ["a"], [True], "\ud800"):
                with pytest.raises(ConfigError):
                    await engine.complete(prompt, GREEDY)  # pyright: ignore[reportArgumentType]
            for priority in NO_PRIORITIES:
                with pytest.raises(ConfigError):
                    await engine.complete("Once", GREEDY, priority=priority)
            assert len((await engine.complete("Once", GREEDY)).token_ids) == 6

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize("depth", [1, 2])
def test_an_interrupted_call_leaves_a_working_engine(depth: int) -> None:
    with LLM("story", dtype="float32", steps_in_flight=depth) as llm:
        wanted = llm.generate("Once", GREEDY)[0].token_ids
        for number in range(5):
            with interrupts(0.03 + 0.0137 * number), pytest.raises(KeyboardInterrupt):
                llm.generate(["Once"] * 8, LONG)
            assert llm.generate("Once", GREEDY)[0].token_ids == wanted
        llm._opened.engine.scheduler.check_idle()


@pytest.mark.ranks
def test_a_second_interrupt_leaves_a_rank_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpinfer.engine.llm.CLOSE_GRACE_S", 0.3)
    llm = LLM("story", tp=2, dtype="float32")
    followers = llm._opened._followers
    assert followers is not None
    followers._processes[0].send_signal(signal.SIGSTOP)
    with interrupts(0.3, 0.3), pytest.raises(KeyboardInterrupt):
        llm.generate("Once", LONG)
    began = time.monotonic()
    llm.close()
    assert time.monotonic() - began < 5, "the rank that hangs was waited for"


def test_threads_take_turns(llm: LLM) -> None:
    wanted, found = llm.generate("Once", GREEDY)[0].token_ids, []

    def ask() -> None:
        found.append(llm.generate("Once", GREEDY)[0].token_ids)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [wanted] * 8


def test_a_closed_engine_says_so() -> None:
    llm = LLM("story", dtype="float32")
    llm.close()
    with pytest.raises(RankError, match="closed"):
        llm.generate("Once", GREEDY)
    llm.close()


def test_a_stop_text_may_come_with_the_last_token(llm: LLM) -> None:
    whole = llm.generate("Once upon a time", GREEDY)[0].outputs[0].text
    assert whole is not None
    stopping = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, stop=(whole[-3:],))
    output = llm.generate("Once upon a time", stopping)[0].outputs[0]
    assert output.text is not None and whole.startswith(output.text)
    assert (output.finish_reason, output.stop_reason) == ("stop", whole[-3:])


def test_a_stop_text_may_begin_before_the_least_number_of_tokens(llm: LLM) -> None:
    [result] = llm.generate("Once upon a time", GREEDY)
    tokenizer = llm._opened.tokenizer
    assert tokenizer is not None
    first, whole = (tokenizer.decode(result.token_ids[:count]) for count in (2, 3))
    over_the_border = whole[len(first) - 2 : len(first) + 1]
    stopping = SamplingParams(
        temperature=0.0, max_tokens=6, ignore_eos=True, stop=(over_the_border,), min_tokens=3
    )
    output = llm.generate("Once upon a time", stopping)[0].outputs[0]
    assert (output.finish_reason, output.text) == ("stop", whole[: len(first) - 2])
    assert len(output.token_ids) == 3


def test_each_caller_raises_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        engine = await AsyncEngine.start("story", dtype="float32")

        def fail() -> None:
            raise OSError("made up")

        monkeypatch.setattr(engine._opened.engine, "step", fail)
        calls = [engine.complete("Once", GREEDY) for _ in range(3)]
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert len(set(map(id, errors))) == 3
        assert all(isinstance(error, RankError) and "made up" in str(error) for error in errors)
        await engine.close()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_closing_may_be_given_up_and_asked_for_by_many() -> None:
    async def run() -> None:
        engine = await AsyncEngine.start("story", dtype="float32")
        running = asyncio.create_task(engine.complete("Once", LONG))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(engine.close(), engine.close())
        assert not engine._thread.is_alive()
        assert (await running).finish_reason == "abort"

    asyncio.run(asyncio.wait_for(run(), 30))


def test_every_event_of_continuations_that_end_together_is_streamed() -> None:
    async def run() -> None:
        params = SamplingParams(temperature=0.9, n=3, max_tokens=5, ignore_eos=True, seed=1)
        async with await AsyncEngine.start("story", dtype="float32") as engine:
            events = [event async for event in engine.generate("Once", params)]
            assert len(events) == 15
            assert sorted(e.sample for e in events if e.finish_reason) == [0, 1, 2]

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("at_step", [1, 4])
def test_a_step_without_memory_ends_its_own_requests_alone(depth: int, at_step: int) -> None:
    """Steps behind it are on their way and feed tokens that were never drawn."""

    async def run() -> None:
        settings = {"dtype": "float32", "steps_in_flight": depth, "max_num_seqs": 4}
        async with await AsyncEngine.start("story", **settings) as engine:
            inner = engine._opened.engine
            worker = inner._assembly.worker
            worker.rows._tokens._flat.fill_(1 << 40)  # what memory that nobody wrote may hold
            _break_op(worker, "embed", at_step)
            params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, n=2)
            calls = [engine.complete("Once", params) for _ in range(6)]
            results = await asyncio.gather(*calls)
            reasons = [result.finish_reason for result in results]
            assert set(reasons) == {"error", "length"}
            assert reasons.count("error") <= 4, "more than a step's rows ended"
            inner.scheduler.check_idle()
            assert not inner._live and not engine._streams

    asyncio.run(asyncio.wait_for(run(), 30))
