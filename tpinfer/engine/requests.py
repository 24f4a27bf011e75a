"""What a caller hands to the engine and gets back."""

from dataclasses import dataclass

from tpinfer.config.sampling import SamplingParams
from tpinfer.engine.attribution import Attribution


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, tokenized."""

    prompt_token_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token."""

    index: int
    """Place of the request in the caller's list."""
    token_id: int
    finish_reason: str | None
    """`stop` (an end token), `length`, or None while it goes on."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When a request's tokens came, in seconds."""

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
    """Where a request's own wall time went."""

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
class GenerationResult:
    """One finished request."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    """`stop`, `length`, or `abort` when the run was stopped."""
    timing: Timing | None
    """None when it was stopped before its first token."""
    attribution: RequestAttribution | None
