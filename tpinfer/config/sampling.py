"""How one request picks its tokens and when it ends. Checked at construction; no logits here."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from tpinfer.config.errors import ConfigError

MAX_CONTINUATIONS = 128
"""Largest n: a request may not fill the engine by itself."""
MAX_LOGPROBS = 64
MAX_BIASES = 1024
MAX_TOKEN_IDS = 1 << 16
"""Of a list of allowed, banned or stop tokens."""
MAX_STOPS, MAX_STOP_CHARS = 64, 1024
_LARGEST_TOKEN = (1 << 31) - 1
_TOKEN_LISTS = ("stop_token_ids", "banned_token_ids", "allowed_token_ids")
_INTEGERS = ("top_k", "max_tokens", "seed", "min_tokens", "n", "logprobs", "prompt_logprobs")
_NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
)  # fmt: skip
_FLAGS = ("ignore_eos", "include_stop_in_output", "echo", "skip_special_tokens")
_OPTIONAL = ("seed", "logprobs", "prompt_logprobs", "allowed_token_ids")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping rules of one request. Raises ConfigError for a value out of range.

    They act in this order: allowed, banned and early stop tokens, bias, repetition, frequency and
    presence penalty, temperature, min-p, top-k, top-p. Lists are taken for tuples, one string for
    a tuple of it, a mapping for pairs.
    """

    temperature: float = 1.0
    """Divides the logits; 0 is greedy, whatever the other filters say."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose mass reaches this; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this share of the likeliest one's probability; 0 keeps all."""
    seed: int | None = None
    """Key of the random numbers, 0 to 2**63-1; None derives one from the request's index."""
    max_tokens: int = 128
    """Most tokens to generate."""
    ignore_eos: bool = False
    """Go on to `max_tokens` whatever token comes."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt or output and multiplies negative ones."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit once per time it was generated."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that was generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these may be generated; None allows all."""
    banned_token_ids: tuple[int, ...] = ()
    """These are never generated."""
    min_tokens: int = 0
    """No stop token is generated before so many tokens are."""
    stop: tuple[str, ...] = ()
    """Texts that end the sequence."""
    include_stop_in_output: bool = False
    """Keep the stop text that was found at the end of the output."""
    n: int = 1
    """Continuations of the prompt."""
    logprobs: int | None = None
    """Likeliest tokens to report with each generated one, from the model's own distribution (before
    penalties, masks and temperature); 0 reports the generated token alone, None nothing."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""
    echo: bool = False
    """Put the prompt in front of the output."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        self._take_lists()
        self._check_types()
        self._check_ranges()
        self._check_tokens()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    def check_vocab(self, vocab_size: int) -> None:
        """Raise ConfigError for a token outside the vocabulary, or where no token may come."""
        biased = tuple(token for token, _ in self.logit_bias)
        for name in (*_TOKEN_LISTS, "logit_bias"):
            tokens = biased if name == "logit_bias" else getattr(self, name) or ()
            largest = max(tokens, default=0)
            if largest >= vocab_size:
                raise ConfigError(
                    f"{name} names token {largest}, but the model has {vocab_size} tokens; use ids "
                    f"of 0 to {vocab_size - 1}"
                )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count > vocab_size:
                raise ConfigError(
                    f"{name}={count}, but the model has {vocab_size} tokens; ask for fewer"
                )
        never = set(self.banned_token_ids)
        if self.min_tokens and not self.ignore_eos:
            never |= set(self.stop_token_ids)
        if self.allowed_token_ids is None and len(never) >= vocab_size:
            raise ConfigError(
                f"banned_token_ids and early stop tokens cover all {vocab_size} tokens; ban fewer"
            )

    def _take_lists(self) -> None:
        for name in (*_TOKEN_LISTS, "stop", "logit_bias"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                value = tuple(value.items())
            elif isinstance(value, str) and name == "stop":
                value = (value,)
            elif isinstance(value, list):
                value = tuple(value)
            elif not isinstance(value, tuple) and not (value is None and name in _OPTIONAL):
                raise ConfigError(f"{name}={_short(value)} is not a list; give one, or leave it")
            object.__setattr__(self, name, value)

    def _check_types(self) -> None:
        for names, kinds, wanted in (
            (_INTEGERS, (int,), "a whole number; give one such as 40"),
            (_NUMBERS, (int, float), "a number; give one such as 0.7"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is None and name in _OPTIONAL:
                    continue
                if isinstance(value, bool) or not isinstance(value, kinds):
                    raise ConfigError(f"{name}={_short(value)} is not {wanted}")
        for name in _FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{name}={_short(value)} is not True or False; give one of them")

    def _check_ranges(self) -> None:
        temperature, penalty = self.temperature, self.repetition_penalty
        most_logprobs = f"0 to {MAX_LOGPROBS}, or None"
        rules = (
            ("temperature", temperature >= 0 and _is_float(temperature), "0 (greedy) or more"),
            ("top_k", 0 <= self.top_k < 1 << 31, "0 (off) to 2**31-1"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("seed", self.seed is None or 0 <= self.seed < 1 << 63, "0 to 2**63-1"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("repetition_penalty", 0.01 <= penalty <= 100, "0.01 to 100; 1 is off"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2; 0 is off"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2; 0 is off"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "0 (off) to max_tokens"),
            ("n", 1 <= self.n <= MAX_CONTINUATIONS, f"1 to {MAX_CONTINUATIONS}"),
            ("logprobs", 0 <= (self.logprobs or 0) <= MAX_LOGPROBS, most_logprobs),
            ("prompt_logprobs", 0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS, most_logprobs),
        )
        for name, holds, allowed in rules:
            if not holds:
                shown = _short(getattr(self, name))
                raise ConfigError(f"{name}={shown} is out of range; use {allowed}")

    def _check_tokens(self) -> None:
        for name, values, most in (
            *((name, getattr(self, name) or (), MAX_TOKEN_IDS) for name in _TOKEN_LISTS),
            ("logit_bias", self.logit_bias, MAX_BIASES),
            ("stop", self.stop, MAX_STOPS),
        ):
            if len(values) > most:
                raise ConfigError(f"{name} has {len(values)} entries; give at most {most}")
        for name in _TOKEN_LISTS:
            for token in getattr(self, name) or ():
                _check_token(name, token)
        for entry in self.logit_bias:
            if not isinstance(entry, tuple | list) or len(entry) != 2:
                raise ConfigError(f"logit_bias holds {_short(entry)}; give pairs (token, bias)")
            token, bias = entry
            _check_token("logit_bias", token)
            if (
                isinstance(bias, bool)
                or not isinstance(bias, int | float)
                or not (-100 <= bias <= 100)
            ):
                raise ConfigError(
                    f"logit_bias of token {token} is {_short(bias)}; use a number of -100 to 100"
                )
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise ConfigError("logit_bias names a token twice; give each token once")
        object.__setattr__(self, "logit_bias", tuple((t, b) for t, b in self.logit_bias))
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
                raise ConfigError(
                    f"stop holds {_short(text)}; give texts of 1 to {MAX_STOP_CHARS} characters"
                )
        self._check_some_token_remains()

    def _check_some_token_remains(self) -> None:
        if self.allowed_token_ids is None:
            return
        left = set(self.allowed_token_ids) - set(self.banned_token_ids)
        if not left:
            raise ConfigError(
                "allowed_token_ids without banned_token_ids leaves no token; allow at least one"
            )
        if self.min_tokens and not self.ignore_eos and left <= set(self.stop_token_ids):
            raise ConfigError(
                f"allowed_token_ids leaves stop tokens only, but min_tokens={self.min_tokens} "
                "forbids these at first; allow another token or use min_tokens=0"
            )


def _check_token(name: str, token: object) -> None:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _LARGEST_TOKEN:
        raise ConfigError(
            f"{name} holds {_short(token)} (out of range); use token ids of 0 or more"
        )


def _is_float(value: float) -> bool:
    """Whether a number is finite, also as a float: 10**400 is a whole number without one."""
    try:
        return isfinite(value)
    except OverflowError:
        return False


def _short(value: object) -> str:
    """A value for a message, however long its text or its digits are."""
    try:
        text = repr(value)
    except ValueError:  # int digits beyond the interpreter's limit
        return "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
