"""What is asked of a machine: requests of one length, how they arrive, and what is promised."""

import math
from dataclasses import dataclass

from tpinfer.config.errors import ConfigError
from tpinfer.config.units import parse_time

MOST_TOKENS = 10_000_000
MOST_REQUESTS = 1_000_000
MOST_IN_FLIGHT = 1 << 14
"""Beyond it nearly all of them wait, whatever the placement: a rate says more."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of `input_len` tokens that generate `output_len` each. They come in a closed loop
    (`concurrency`: who is served sends the next one at once) or by chance (`rate`: Poisson
    arrivals). Raises ConfigError for what cannot be."""

    input_len: int
    output_len: int
    concurrency: int | None = None
    rate: float | None = None
    """Requests a second."""
    seed: int = 0
    """Of the arrivals."""
    prefix_hit: float = 0.0
    """Share of each prompt that is the same for all, and in the prefix cache but for the first."""

    def __post_init__(self) -> None:
        for flag, value in (("--input-len", self.input_len), ("--output-len", self.output_len)):
            _require_count(flag, value, MOST_TOKENS)
        if (self.concurrency is None) == (self.rate is None):
            raise ConfigError(
                "give one of --concurrency C (requests in flight) and --rate R (requests a second)"
            )
        if self.concurrency is not None:
            _require_count("--concurrency", self.concurrency, MOST_IN_FLIGHT)
        if not 0 <= self.prefix_hit <= 1:
            raise ConfigError(f"--prefix-hit {self.prefix_hit:g} must be a share from 0 to 1")
        if self.rate is not None and not (0 < self.rate <= MOST_REQUESTS):
            raise ConfigError(
                f"--rate {self.rate:g} must be above 0 and at most {MOST_REQUESTS} requests a "
                "second"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of a request, prompt and output."""
        return self.input_len + self.output_len

    def lane(self, num_lanes: int) -> "Workload":
        """What one of `num_lanes` equal servers gets of it."""
        concurrency, rate = self.concurrency, self.rate
        return Workload(
            self.input_len,
            self.output_len,
            None if concurrency is None else -(-concurrency // num_lanes),
            None if rate is None else rate / num_lanes,
            self.seed,
            self.prefix_hit,
        )

    def num_cached(self, block_size: int) -> int:
        """Tokens of a prompt that are taken over: whole blocks, and not its last token."""
        shared = min(int(self.prefix_hit * self.input_len), self.input_len - 1)
        return shared - shared % block_size

    def num_busy_lanes(self, num_lanes: int) -> float:
        """How many of the servers work, as many as requests in flight fill."""
        if self.concurrency is None:
            return float(num_lanes)
        return self.concurrency / -(-self.concurrency // num_lanes)

    def words(self) -> str:
        """For people."""
        came = (
            f"{self.concurrency} at a time"
            if self.concurrency is not None
            else f"{self.rate:g} a second (Poisson)"
        )
        hit = f", {100 * self.prefix_hit:g} % of a prompt cached" if self.prefix_hit else ""
        return f"{self.input_len} tokens in, {self.output_len} out, {came}{hit}"


@dataclass(frozen=True, slots=True)
class Slo:
    """What is promised of every request's mean; None promises nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def misses(self, ttft_s: float, tpot_s: float) -> tuple[str, ...]:
        """Which promises such times break: `ttft`, `tpot`."""
        found = (("ttft", ttft_s, self.ttft_s), ("tpot", tpot_s, self.tpot_s))
        return tuple(name for name, got, most in found if most is not None and got > most)


def parse_slo(text: str) -> Slo:
    """From `ttft=500ms,tpot=30ms`. Raises ConfigError."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in ("ttft", "tpot") or not equals or name in found:
            raise ConfigError(
                f"--slo {text!r}: {part.strip()!r} is not a promise; write ttft=500ms,tpot=30ms, "
                "each at most once"
            )
        try:
            found[name] = parse_time(value)
        except ConfigError as error:
            raise ConfigError(f"--slo {text!r}: {error}") from error
    return Slo(found.get("ttft"), found.get("tpot"))


def _require_count(flag: str, value: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{flag} {value} must be a whole number from 1 to {most}")


def finite(value: float | None) -> float | None:
    """The number, or None where it has no end."""
    return value if value is not None and math.isfinite(value) else None
