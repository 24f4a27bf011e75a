"""How one request picks its tokens and when it ends. Checked at construction; no logits here."""

from dataclasses import dataclass
from math import isfinite

from tpinfer.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping rules of one request. Raises ConfigError for a value out of range."""

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

    def __post_init__(self) -> None:
        temperature, top_p, min_p = self.temperature, self.top_p, self.min_p
        for name in ("top_k", "max_tokens", "seed"):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name}={value!r} is not a whole number; give one such as 40")
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name}={value!r} is not a number; give one such as 0.7")
        rules = (
            ("temperature", isfinite(temperature) and temperature >= 0, "0 (greedy) or more"),
            ("top_k", 0 <= self.top_k < 1 << 31, "0 (off) to 2**31-1"),
            ("top_p", 0 < top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= min_p <= 1, "0 (off) to 1"),
            ("seed", self.seed is None or 0 <= self.seed < 1 << 63, "0 to 2**63-1"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("stop_token_ids", all(t >= 0 for t in self.stop_token_ids), "token ids of 0 or more"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)} is out of range; use {allowed}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0
