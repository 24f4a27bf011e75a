"""What a caller hands to the engine and gets back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tpinfer.config.errors import ConfigError
from tpinfer.config.sampling import SamplingParams
from tpinfer.engine.attribution import Attribution
from tpinfer.steps.logprobs import TokenLogprobs


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, tokenized."""

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0
    """Lower runs first."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""


@contextmanager
def which_prompt(place: int, count: int) -> Iterator[None]:
    """Say in a ConfigError which of `count` prompts it speaks of, where there are several."""
    try:
        yield
    except ConfigError as error:
        if count == 1:
            raise
        raise ConfigError(f"prompt {place + 1} of {count}: {error}") from error


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token, or an end without one."""

    index: int
    """Which request: its place in the caller's list, or the number `add` was given."""
    token_id: int
    """-1 where the sequence ended without a token (aborted, failed)."""
    finish_reason: str | None
    """`stop` (an end token or stop string), `length`, `abort`, `error`, or None while it goes
    on."""
    sample: int = 0
    """Which of the request's n continuations."""
    text: str = ""
    """Text that became certain with this token; held back while it may be part of a character or
    of a stop string. Empty without a tokenizer."""
    logprobs: TokenLogprobs | None = None
    """Where they were asked for."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When a sequence's tokens came, in seconds."""

    ttft_s: float
    """Accepted to first token on the host."""
    tpot_s: float
    """(last token - first token) / (tokens - 1); 0 for a single token."""
    e2e_s: float
    """Accepted to last token."""
    itl_s: list[float]
    """Between neighbouring tokens."""


@dataclass(frozen=True, slots=True)
class RequestAttribution:
    """Where a sequence's own wall time went."""

    ttft: Attribution
    decode: Attribution | None
    """First token to last; None for a single token."""

    @property
    def whole(self) -> Attribution:
        """Accepted to last token: the request's end-to-end time."""
        return self.ttft if self.decode is None else self.ttft + self.decode

    def to_json(self) -> dict[str, object]:
        """The whole request's split, and behind it the two parts, as plain JSON values."""
        return {
            **self.whole.to_json(),
            "ttft": self.ttft.to_json(),
            "decode": self.decode.to_json() if self.decode else None,
        }


@dataclass(frozen=True, slots=True)
class Completion:
    """One of a request's n continuations, ended."""

    sample: int
    token_ids: list[int]
    text: str | None
    """None without a tokenizer. Ends before a stop string unless it was asked to be included."""
    finish_reason: str
    """`stop`, `length`, `abort`, or `error`."""
    stop_reason: str | int | None = None
    """The stop string or token that ended it."""
    error: str | None = None
    """What went wrong, for `error`."""
    logprobs: list[TokenLogprobs] | None = None
    """One per token, where asked for."""
    timing: Timing | None = None
    """None when it ended before its first token."""
    attribution: RequestAttribution | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """One finished request."""

    prompt_token_ids: list[int]
    outputs: list[Completion]
    """One per continuation."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One per prompt token, None for the first; where asked for."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were in the prefix cache already."""
    prompt: str | None = field(default=None, kw_only=True)
    """Its text, where the caller gave text."""

    @property
    def token_ids(self) -> list[int]:
        """Of the first continuation."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Of the first continuation."""
        return self.outputs[0].finish_reason

    @property
    def timing(self) -> Timing | None:
        """Of the first continuation."""
        return self.outputs[0].timing

    @property
    def attribution(self) -> RequestAttribution | None:
        """Of the first continuation."""
        return self.outputs[0].attribution
