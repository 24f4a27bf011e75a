"""The engine for asyncio: many callers, each streaming its own request, any of which may leave.

Steps run on one thread; what callers want reaches it through an inbox that is read before each
plan, so a cancelled request's blocks are free within one step. Events go back to each caller's own
event loop, one hand-over a step.
"""

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from tpinfer.config.engine import EngineConfig
from tpinfer.config.environment import read_environment
from tpinfer.config.errors import ConfigError, RankError
from tpinfer.config.sampling import SamplingParams
from tpinfer.engine.live import LiveRequest
from tpinfer.engine.metrics import make_result
from tpinfer.engine.opened import OpenedEngine, PromptInput, engine_settings
from tpinfer.engine.requests import GenerationRequest, GenerationResult, TokenEvent


class _Stream:
    """One caller's end: events, then the result, or an error."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.arrived: asyncio.Queue[TokenEvent | GenerationResult | BaseException] = asyncio.Queue()


@dataclass(frozen=True, slots=True)
class _Add:
    index: int
    request: GenerationRequest
    stream: _Stream


@dataclass(frozen=True, slots=True)
class _Abort:
    index: int


@dataclass(frozen=True, slots=True)
class _Close:
    """No more will come."""


@dataclass(frozen=True, slots=True)
class _Look:
    """A rank has ended, perhaps while nothing ran."""


_Item = TokenEvent | GenerationResult | BaseException
_Message = _Add | _Abort | _Close | _Look


class AsyncEngine:
    """Made by `await AsyncEngine.start(...)`, ended by `await close()`; also an async context
    manager."""

    def __init__(self, opened: OpenedEngine) -> None:
        self._opened = opened
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._indexes = itertools.count()
        self._error: BaseException | None = None
        self._is_closed = False
        self._lock = threading.Lock()  # callers of any thread: nothing comes in behind _Close
        self._streams: dict[int, tuple[LiveRequest, _Stream]] = {}  # the thread's own
        self._thread = threading.Thread(
            target=self._work, args=(opened.num_threads,), name="tpinfer-steps", daemon=True
        )
        opened.on_rank_end = lambda: self._inbox.put(_Look())
        self._thread.start()

    @classmethod
    async def start(
        cls, model: str = "story", *, tp: int | None = None, **settings: Any
    ) -> "AsyncEngine":
        """Load a model over `tp` ranks, which are started here. `settings` are fields of
        `EngineConfig`. Raises ConfigError, CheckpointError or RankError; ConfigError too where a
        launcher started more ranks than this one: each would answer callers of its own.
        """
        launched = read_environment().rank
        if launched is not None and launched.world > 1:
            raise ConfigError(
                f"AsyncEngine starts its ranks itself, and a launcher started this process as rank "
                f"{launched.rank} of {launched.world}; run the script with plain python and pass "
                f"tp={launched.world}, or use LLM"
            )
        config, nobody_waits = engine_settings(model, tp, **settings), threading.Event()
        try:
            return cls(await asyncio.to_thread(_open, config, nobody_waits))
        except asyncio.CancelledError:
            nobody_waits.set()
            raise

    async def generate(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[TokenEvent]:
        """Each token as it comes, of all n continuations. Leaving early cancels the request.

        Raises ConfigError for a request that can never run, RankError once the engine has failed.
        """
        async with aclosing(self._items(prompt, params, priority, cache_salt)) as items:
            async for item in items:
                if isinstance(item, TokenEvent):
                    yield item

    async def complete(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> GenerationResult:
        """The whole result at once. Cancelling the call cancels the request."""
        result: GenerationResult | None = None
        async with aclosing(self._items(prompt, params, priority, cache_salt)) as items:
            async for item in items:
                if isinstance(item, GenerationResult):
                    result = item
        assert result is not None, "a stream ends with its result or an error"
        return result

    async def close(self) -> None:
        """End every request with `abort`, and the ranks. Twice is fine; each call returns when all
        is over."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._inbox.put(_Close())
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _items(
        self, prompt: PromptInput, params: SamplingParams | None, priority: int, cache_salt: str
    ) -> AsyncGenerator[TokenEvent | GenerationResult]:
        request = self._opened.request(prompt, params, priority, cache_salt)
        index, stream = next(self._indexes), _Stream()
        with self._lock:
            if self._is_closed:
                raise RankError("the engine was closed; start a new one")
            self._inbox.put(_Add(index, request, stream))
        is_over = False
        try:
            while not is_over:
                item = await stream.arrived.get()
                is_over = not isinstance(item, TokenEvent)
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            if not is_over:
                self._inbox.put(_Abort(index))

    # What follows runs on the thread.

    def _work(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)  # a new thread's own pool would take the default size
        is_open, engine = True, self._opened.engine
        try:
            while is_open:
                is_open = self._read_inbox(wait=not engine.has_work)
                if is_open and engine.has_work:
                    self._deliver(engine.step())
            self._end_all()
        except BaseException as error:
            self._error = self._opened.explain(error)
            for _, stream in self._streams.values():
                _hand_over([(stream, _failed(self._error))])
            self._streams.clear()
        try:
            self._opened.close()
        except BaseException as error:
            self._error = self._error or error
        while is_open:  # an engine that failed still answers
            message = self._inbox.get()
            is_open = not isinstance(message, _Close)
            if isinstance(message, _Add):
                _hand_over([(message.stream, _failed(self._error))])

    def _read_inbox(self, wait: bool) -> bool:
        """Do what callers asked for since the last plan; with nothing else to do, wait for them.
        False once the engine is to close."""
        while wait or not self._inbox.empty():
            message = self._inbox.get()
            wait = False
            if isinstance(message, _Close):
                return False
            if isinstance(message, _Look):
                self._opened.look()
                continue
            if isinstance(message, _Abort):
                if message.index in self._streams:
                    self._opened.engine.abort(self._streams.pop(message.index)[0])
                continue
            try:
                live = self._opened.engine.add(message.request, message.index)
            except Exception as error:
                _hand_over([(message.stream, error)])
            else:
                self._streams[message.index] = live, message.stream
        return True

    def _deliver(self, events: list[TokenEvent]) -> None:
        mine = [event for event in events if event.index in self._streams]  # others have left
        items: list[tuple[_Stream, _Item]] = [(self._streams[e.index][1], e) for e in mine]
        # A result ends its stream, so it comes behind the events of all continuations.
        for index in dict.fromkeys(e.index for e in mine if e.finish_reason is not None):
            live, stream = self._streams[index]
            if live.is_finished:
                items.append((stream, make_result(live, None)))
                del self._streams[index]
        _hand_over(items)

    def _end_all(self) -> None:
        for live, _ in list(self._streams.values()):
            self._deliver(self._opened.engine.abort(live))
        while self._opened.engine.has_work:  # what is on its way
            self._opened.engine.step()


def _open(config: EngineConfig, nobody_waits: threading.Event) -> OpenedEngine:
    opened = OpenedEngine(config)
    if nobody_waits.is_set():
        opened.close()
    return opened


def _failed(cause: BaseException | None) -> RankError:
    """One caller's own error: one raised by all would gather all their tracebacks."""
    error = RankError(
        str(cause) if isinstance(cause, RankError) else f"the engine failed: {cause!r}"
    )
    error.__cause__ = cause
    return error


def _hand_over(items: "list[tuple[_Stream, _Item]]") -> None:
    """Put items into their streams, with one wake-up for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, _Item]]] = {}
    for stream, item in items:
        by_loop.setdefault(stream.loop, []).append((stream, item))
    for loop, mine in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, mine)
        except RuntimeError:
            continue  # that loop was closed: nobody waits any more


def _put(items: "list[tuple[_Stream, _Item]]") -> None:
    for stream, item in items:
        stream.arrived.put_nowait(item)
