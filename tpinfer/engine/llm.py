"""The offline API: prompts in, results out.

    with LLM("story", tp=2) as llm:
        for result in llm.generate(["Once upon a time"], SamplingParams(max_tokens=40)):
            print(result.outputs[0].text)

From a plain script it starts the other ranks itself. Under torchrun or another launcher every rank
runs the same script; results are on rank 0, the others get empty lists.
"""

import reprlib
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from operator import index
from typing import Any

from tpinfer.config.errors import ConfigError, RankError
from tpinfer.config.sampling import SamplingParams
from tpinfer.engine.opened import NO_LISTS, OpenedEngine, PromptInput, engine_settings
from tpinfer.engine.own_thread import OwnThread
from tpinfer.engine.requests import GenerationRequest, GenerationResult, which_prompt
from tpinfer.engine.run_report import RunReport

CLOSE_GRACE_S = 5.0
"""How long a run that nobody waits for any more may take to its end when the engine is closed."""


class LLM:
    """A model, loaded over `tp` ranks. Threads may share it: their calls take turns."""

    def __init__(
        self,
        model: str = "story",
        *,
        tp: int | None = None,
        topology: str | None = None,
        progress: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> None:
        """model: directory, hub id in the local cache, `story`, or `shape:NAME`. `settings` are
        fields of `EngineConfig` such as dtype, kv_bytes, max_num_seqs.

        Raises ConfigError, CheckpointError or RankError; the message says what to change.
        """
        config = engine_settings(model, tp, topology=topology, **settings)
        self._opened = OpenedEngine(config, progress)
        self._thread = OwnThread("tpinfer-steps") if self._opened.rank == 0 else None
        if self._thread is not None:
            self._opened.on_rank_end = partial(self._thread.post, self._look)
        self._report: RunReport | None = None
        self._is_cut_off = False  # closed while a call ran
        self._is_over = False  # for ranks other than 0: rank 0 has closed

    @property
    def rank(self) -> int:
        """This process's rank; 0 in a plain script."""
        return self._opened.rank

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priorities: Sequence[int] | None = None,
        cache_salt: str = "",
    ) -> list[GenerationResult]:
        """Run all prompts together; results in their order.

        A prompt is text or token ids. `params` is one for all or one each; None takes the
        checkpoint's own defaults. Raises ConfigError for a request that can never run, before any
        runs, RankError once a rank is gone or after `close`. Ctrl-C ends the call after the step
        in progress; the next call works.
        """
        listed = _listed(prompts)
        chosen = _per_prompt(params, len(listed), "params")
        ranks = _per_prompt(priorities, len(listed), "priorities")
        opened = self._opened
        if self._thread is None:
            if self._is_over:
                raise RankError("the engine was closed; start a new one")
            self._is_over = not opened.engine.serve()
            return []
        leave = threading.Event()

        def run() -> list[GenerationResult]:
            try:
                return self._run(self._requests(listed, chosen, ranks, cache_salt), leave)
            finally:
                if opened.engine.rebuilds is None:  # they serve nobody else
                    opened.engine.release_followers()

        return self._thread.run(run, leave.set)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        params: SamplingParams | None = None,
    ) -> list[GenerationResult]:
        """Answer a conversation of {"role": ..., "content": ...} through the chat template."""
        return self.generate([self._opened.chat_text(messages)], params)

    @property
    def report(self) -> RunReport | None:
        """Where the time of the last `generate` went; None before it, and on ranks other than
        0."""
        return self._report

    def close(self) -> None:
        """Let go of ranks and memory. Twice is fine."""
        if self._thread is None:
            while not self._is_over:
                self._is_over = not self._opened.engine.serve()
        elif not self._thread.close(CLOSE_GRACE_S):
            self._is_cut_off = True
            self._opened.end_followers()  # what waits for them notices
            self._thread.close(self._opened.config.wait_timeout_s)
        self._opened.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _look(self) -> None:
        with suppress(RankError):  # the next call tells it
            self._opened.look()

    def _requests(
        self, prompts: list[PromptInput], params: list[Any], priorities: list[Any], cache_salt: str
    ) -> list[GenerationRequest]:
        """One each. Raises ConfigError, naming the prompt where there are several."""
        requests = []
        for number, prompt in enumerate(prompts):
            one, priority = params[number], priorities[number]
            with which_prompt(number, len(prompts)):
                requests.append(
                    self._opened.request(
                        prompt, one, 0 if priority is None else priority, cache_salt
                    )
                )
        return requests

    def _run(
        self, requests: Sequence[GenerationRequest], leave: threading.Event
    ) -> list[GenerationResult]:
        engine = self._opened.engine
        try:
            for _ in engine.generate(requests, leave.is_set):
                continue
            results = engine.results()
            self._report = engine.report()
            return results
        except Exception as error:
            if self._is_cut_off:
                raise RankError("the engine was closed while requests ran") from error
            cause = self._opened.explain(error)
            if cause is not error:
                raise cause from error
            raise


def _listed(prompts: PromptInput | Sequence[PromptInput]) -> list[PromptInput]:
    """One prompt alone or a list of them, as a list. Raises ConfigError for none."""
    if isinstance(prompts, str):
        return [prompts]
    found: list[Any] | None = None
    if isinstance(prompts, Iterable) and not isinstance(prompts, NO_LISTS):
        with suppress(TypeError):  # an array of no dimension is iterable by its type alone
            found = list(prompts)
    if found is None:
        raise ConfigError(f"prompts={reprlib.repr(prompts)} is no list; give text or a list of it")
    if not found:
        raise ConfigError("there are no prompts; give at least one")
    if all(_is_whole(one) for one in found):
        return [found]
    for number, one in enumerate(found, 1):
        is_list = isinstance(one, Iterable) and not isinstance(one, NO_LISTS)
        if not isinstance(one, str) and (not is_list or _is_whole(one)):
            raise ConfigError(
                f"prompt {number} of {len(found)} is neither text nor a list of token ids"
            )
    return found


def _is_whole(value: object) -> bool:
    """Whether it is one number: Python's, or an array's element."""
    if isinstance(value, str | Sequence) or not hasattr(value, "__index__"):
        return False
    try:
        index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:  # an array has the method, whatever its shape
        return False
    return True


def _per_prompt(given: Any, count: int, what: str) -> list[Any]:
    """One value for all, or one each, as a list. Raises ConfigError for another number."""
    if given is None or isinstance(given, SamplingParams):
        return [given] * count
    if not isinstance(given, Iterable) or isinstance(given, (str, *NO_LISTS)):
        raise ConfigError(f"{what}={reprlib.repr(given)} is no list; give one each, or one for all")
    found = list(given)
    if len(found) != count:
        raise ConfigError(f"{len(found)} {what} for {count} prompts; give one each, or one for all")
    return found
