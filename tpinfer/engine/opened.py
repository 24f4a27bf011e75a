"""An engine for a program that is rank 0 itself, its other ranks started with it; or this process's
part, where a launcher such as torchrun started them all."""

import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import fields, replace
from operator import index
from os import PathLike
from typing import Any

import torch

from tpinfer.config.dtypes import DType
from tpinfer.config.engine import COMPUTE_DTYPES, EngineConfig
from tpinfer.config.environment import read_environment
from tpinfer.config.errors import ConfigError, RankError
from tpinfer.config.huggingface import read_generation_defaults, read_model_spec
from tpinfer.config.model_name import is_shape, model_directory
from tpinfer.config.sampling import SamplingParams
from tpinfer.engine.follower import config_argument
from tpinfer.engine.rank_engine import Engine, open_engine, open_parts
from tpinfer.engine.rebuilds import Rebuilds, RebuildsOverError
from tpinfer.engine.requests import GenerationRequest
from tpinfer.launching.followers import Followers
from tpinfer.launching.seat import seat_from_environment
from tpinfer.steps.interface import PlanWriter
from tpinfer.text.chat_template import ChatTemplate, find_template
from tpinfer.text.tokenizer import Tokenizer
from tpinfer.worker.assemble import Assembly

PromptInput = str | Sequence[int]
"""Text, or token ids."""
MAX_PRIORITY = 1_000_000
"""Far from 0 enough to order any requests, and few enough to count in ns."""
NO_LISTS = (bytes, bytearray, Mapping, Set)
"""What Python could take for a list of token ids."""


class OpenedEngine:
    """One rank's engine, what makes requests for it, and the ranks that were started for it."""

    def __init__(self, config: EngineConfig, progress: Callable[[str], None] | None = None) -> None:
        """Under a launcher be the rank it says; else start the other ranks and be rank 0.

        Raises ConfigError, CheckpointError or RankError.
        """
        self.config = config
        self.spec = read_model_spec(config.model_dir)
        self.tokenizer: Tokenizer | None = None
        if (config.model_dir / "tokenizer.json").is_file():
            self.tokenizer = Tokenizer(config.model_dir)
        self._followers: Followers | None = None
        self._progress, self._is_ending = progress, False
        self._late_words: str | None = None
        self.on_rank_end: Callable[[], None] = lambda: None
        """Called on another thread when a rank that was started here has failed; it has `look`
        called by the thread that runs steps."""
        environment = read_environment()
        if environment.rank is None and config.tp > 1:
            self._followers = self._start(config, 0)
            seat = self._followers.seat
        else:
            seat = seat_from_environment(environment, config.device, shares=config.share_device)
        self.rank = seat.rank
        try:
            self.engine: Engine = open_engine(config, seat, progress, self.tokenizer)
            self.num_threads = torch.get_num_threads()
            if self._followers is not None:
                most = config.max_rebuilds
                self.engine.rebuilds = Rebuilds(most, self._open_next, self._end_late)
        except BaseException as error:
            cause = self.explain(error)
            if self._followers is not None:
                self._followers.close()
            if cause is not error:
                raise cause from error
            raise

    def explain(self, error: BaseException) -> BaseException:
        """What a rank that ended said of its end, in place of the effect that it had here."""
        if isinstance(error, RebuildsOverError):
            return error
        if isinstance(error, RankError) and self._followers is not None:
            return self._followers.explain(error)
        return error

    def default_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json asks for."""
        return read_generation_defaults(self.config.model_dir).sampling_params(
            self.spec.eos_token_ids
        )

    def request(
        self,
        prompt: PromptInput,
        params: SamplingParams | None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> GenerationRequest:
        """A request from text or token ids; the model's end tokens end it too. Raises
        ConfigError."""
        _check_types(params, priority, cache_salt)
        token_ids = self._encode(prompt) if isinstance(prompt, str) else _listed_tokens(prompt)
        chosen = self.default_params() if params is None else self._with_end_tokens(params)
        wrong = next((t for t in token_ids if not 0 <= t < self.spec.vocab_size), None)
        if wrong is not None:
            raise ConfigError(
                f"token {wrong} of the prompt is outside the vocabulary of "
                f"{self.spec.vocab_size}; tokenize with the model's own tokenizer"
            )
        return GenerationRequest(token_ids, chosen, priority, cache_salt)

    def chat_text(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation through the checkpoint's chat template. Raises
        ConfigError."""
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise ConfigError(
                f"messages={reprlib.repr(messages)} is no conversation; give a list of "
                '{"role": ..., "content": ...}'
            )
        source = find_template(self.config.model_dir)
        if source is None or self.tokenizer is None:
            raise ConfigError(f"{self.config.model_dir} has no chat template; use generate")
        tokenizer = self.tokenizer
        names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        text = ChatTemplate(source, names).render(list(messages))
        _check_text("the conversation", text)
        return tokenizer.encode(text, add_special_tokens=False)

    def end_followers(self) -> None:
        """Kill the ranks that were started here; what waits for them gets an error."""
        self._is_ending = True
        if self._followers is not None:
            self._followers.kill()

    def look(self) -> None:
        """Rebuild at once where a rank has died while nothing ran."""
        followers = self._followers
        if followers is not None and followers.has_failed and not self._is_ending:
            self.engine.rebuild(followers.explain(RankError("a rank is gone")))

    def _start(self, config: EngineConfig, generation: int) -> Followers:
        argv = [config_argument(config)]
        followers = Followers(
            config.tp, "tpinfer.engine.follower", argv, config.device, generation,
            shares=config.share_device,
        )  # fmt: skip
        followers.on_end = lambda: self.on_rank_end()
        return followers

    def _end_late(self, words: str) -> None:
        if self._followers is not None:
            self._late_words = words
            self._followers.write_stacks()
            self._followers.kill()

    def _open_next(self, error: RankError) -> tuple[Assembly, PlanWriter]:
        """The ranks of the next generation, whose cache is as large as the last one's."""
        followers = self._followers
        if followers is None or self._is_ending:
            raise error
        cause, generation = followers.explain(error), followers.seat.generation + 1
        if self._late_words is not None:  # its end came from here
            cause, self._late_words = RankError(self._late_words), None
        followers.kill()
        followers.close()
        print(f"{cause}; starting ranks anew (generation {generation})", file=sys.stderr)
        config = replace(self.config, kv_bytes=self.config.kv_bytes or self.engine.kv_bytes)
        self._followers = self._start(config, generation)
        try:
            assembly, wire = open_parts(config, self._followers.seat, self._progress)
        except RankError as again:
            raise self._followers.explain(again) from again
        assert isinstance(wire, PlanWriter), "rank 0 writes"
        return assembly, wire

    def close(self) -> None:
        """Let go of everything, the other ranks first. Twice is fine."""
        try:
            self.engine.close()
        finally:
            if self._followers is not None:
                self._followers.close()

    def _encode(self, text: str) -> list[int]:
        _check_text("the prompt", text)
        if self.tokenizer is not None:
            return self.tokenizer.encode(text)
        raise ConfigError(
            f"{self.config.model_dir} has no tokenizer.json, and the prompt is text; give token ids"
        )

    def _with_end_tokens(self, params: SamplingParams) -> SamplingParams:
        wanted = dict.fromkeys((*params.stop_token_ids, *self.spec.eos_token_ids))
        return replace(params, stop_token_ids=tuple(wanted))


def _listed_tokens(prompt: object) -> list[int]:
    """Token ids as a list; whole numbers of other libraries (numpy) count. Raises ConfigError."""
    text = f"the prompt {reprlib.repr(prompt)} is neither text nor a list of token ids"
    if not isinstance(prompt, Iterable) or isinstance(prompt, NO_LISTS):
        raise ConfigError(text)
    found: list[Any] = list(prompt)
    if any(isinstance(token, bool) for token in found):
        raise ConfigError(text)
    try:
        return [index(token) for token in found]
    except TypeError as error:
        raise ConfigError(text) from error


def _check_types(params: object, priority: object, cache_salt: object) -> None:
    if params is not None and not isinstance(params, SamplingParams):
        raise ConfigError(f"params={reprlib.repr(params)} is not SamplingParams; give one, or None")
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise ConfigError(
            f"priority={reprlib.repr(priority)} is not a whole number; give one such as 0"
        )
    if abs(priority) > MAX_PRIORITY:
        raise ConfigError(
            f"priority={reprlib.repr(priority)} is out of range; use -{MAX_PRIORITY} to "
            f"{MAX_PRIORITY}"
        )
    if not isinstance(cache_salt, str):
        raise ConfigError(f"cache_salt={reprlib.repr(cache_salt)} is not text; give text")
    _check_text("cache_salt", cache_salt)


def _check_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} holds half a surrogate pair at character {error.start}, which is no text; "
            "decode it with errors='replace'"
        ) from error


def engine_settings(model: str | PathLike[str], tp: int | None, **settings: Any) -> EngineConfig:
    """Settings of a run on `model`: any field of EngineConfig, dtype as text too. `tp` None takes
    the launcher's ranks, else 1. Raises ConfigError."""
    if not isinstance(model, str | PathLike):
        raise ConfigError(f"model={reprlib.repr(model)} is no name; give a directory or a hub id")
    if tp is None:
        found = read_environment().rank
        tp = 1 if found is None else found.world
    dtype = settings.pop("dtype", None)
    if isinstance(dtype, str) and not isinstance(dtype, DType):
        try:
            dtype = None if dtype == "auto" else DType(dtype)
        except ValueError as error:
            allowed = ", ".join(("auto", *COMPUTE_DTYPES))
            raise ConfigError(f"dtype={dtype!r} is not known; use one of {allowed}") from error
    known = {field.name for field in fields(EngineConfig)} - {"model_dir"}
    wrong = sorted(settings.keys() - known)
    if wrong:
        raise ConfigError(f"{wrong[0]} is no setting; use {', '.join(sorted(known))}")
    settings.setdefault("load_format", "random" if is_shape(str(model)) else "auto")
    return EngineConfig(model_dir=model_directory(str(model)), tp=tp, dtype=dtype, **settings)
