"""One plan: a placement, what it would do, why, and how sure that is."""

from collections.abc import Mapping
from dataclasses import dataclass

from tpinfer.planner.outcome import PERCENTILES, Spread, as_words
from tpinfer.planner.placement import EngineSettings
from tpinfer.planner.split import Split

NO_TIME = Split()

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement and its numbers; times in seconds. Without a fit all numbers are None."""

    tp: int
    pp: int
    dp: int
    settings: EngineSettings
    binding: str
    """What bounds it: one of the six words, `kv_capacity`, `max_num_seqs`; where it does not fit
    what stands against it."""
    reason: str = ""
    """In words why it does not fit."""
    mode: str = ""
    """`datasheet`, `probe` or `calibrated`."""
    origin: str = ""
    """Where rates and traits come from."""
    method: str = "analytic"
    """`analytic` (steady state) or `simulated`."""
    relative: Interval = (0.0, 0.0)
    """Of times: how far below and above the prediction 80 of 100 measurements lie."""
    ttft_s: float | None = None
    tpot_s: float | None = None
    output_tokens_per_s: float | None = None
    """Of all replicas."""
    cost_per_mtok: float | None = None
    """US dollars for a million output tokens; None where the topology has no price."""
    ttft_split: Split = NO_TIME
    tpot_split: Split = NO_TIME
    ttft: Spread | None = None
    tpot: Spread | None = None
    """With percentiles, where it was simulated."""
    ttft_interval: Interval | None = None
    """Where queueing makes it another than `relative`."""
    rate_interval: Interval | None = None
    """Of throughput, where arrivals bound it."""
    keeps_up: bool = True
    """False where more requests come than are served."""
    slo_misses: tuple[str, ...] = ()
    """Promises its means break: `ttft`, `tpot`."""
    num_running: float = 0.0
    """Requests in steps at once, over all replicas."""
    num_preemptions: int = 0
    kv_capacity_tokens: int = 0
    weight_bytes: int = 0
    """On the fullest rank."""

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return not self.reason

    @property
    def num_ranks(self) -> int:
        """Devices it takes."""
        return self.tp * self.pp * self.dp

    @property
    def device_s_per_token(self) -> float:
        """Device seconds for an output token: its cost, whatever a device-hour costs."""
        return self.num_ranks / self.output_tokens_per_s if self.output_tokens_per_s else 1e9

    def intervals(self) -> dict[str, Interval]:
        """(low, high) of each number by its name."""
        low, high = self.relative
        found: dict[str, Interval] = {}
        if self.ttft_s is None or self.tpot_s is None or self.output_tokens_per_s is None:
            return found
        found["ttft_s"] = self.ttft_interval or _around(self.ttft_s, low, high)
        found["tpot_s"] = _around(self.tpot_s, low, high)
        rate = self.output_tokens_per_s
        slow, fast = self.rate_interval or (rate / (1 + high), rate / max(1 - low, 1e-9))
        found["output_tokens_per_s"] = slow, fast
        if self.cost_per_mtok is not None:
            found["cost_per_mtok"] = (
                self.cost_per_mtok * rate / fast,
                self.cost_per_mtok * rate / slow,
            )
        return found

    def to_json(self) -> dict[str, object]:
        """The keys that are kept stable. `split` is of an output token and sums to `tpot_s`."""
        return {
            "tp": self.tp,
            "pp": self.pp,
            "dp": self.dp,
            "fits": self.fits,
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "cost_per_mtok": self.cost_per_mtok,
            "mode": self.mode,
            "interval": {name: list(pair) for name, pair in self.intervals().items()},
            "split": as_words(self.tpot_split),
            "kv_capacity_tokens": self.kv_capacity_tokens,
            "binding": self.binding,
        }

    def details(self) -> dict[str, object]:
        """What else is known of it."""
        return {
            "tp": self.tp,
            "pp": self.pp,
            "dp": self.dp,
            "method": self.method,
            "origin": self.origin,
            "reason": self.reason,
            "max_num_seqs": self.settings.max_num_seqs,
            "max_num_batched_tokens": self.settings.max_num_batched_tokens,
            "ttft_split": as_words(self.ttft_split),
            "ttft_percentiles_s": _percentiles(self.ttft),
            "tpot_percentiles_s": _percentiles(self.tpot),
            "keeps_up": self.keeps_up,
            "slo_misses": list(self.slo_misses),
            "num_running": self.num_running,
            "num_preemptions": self.num_preemptions,
            "weight_bytes": self.weight_bytes,
        }


def _around(value: float, low: float, high: float) -> Interval:
    return value * (1 - low), value * (1 + high)


def _percentiles(spread: Spread | None) -> Mapping[str, float] | None:
    if spread is None:
        return None
    return {f"p{p}": value for p, value in zip(PERCENTILES, spread.percentiles, strict=True)}
