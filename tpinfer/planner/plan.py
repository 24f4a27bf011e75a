"""One plan: a placement, what it would do, why, and how sure that is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tpinfer.config.model import ModelSpec
from tpinfer.config.topology import Placement, Topology
from tpinfer.planner.estimate import Estimate, Estimator
from tpinfer.planner.outcome import (
    PERCENTILES,
    Outcome,
    Spread,
    as_words,
    largest_word,
    outcome_of,
)
from tpinfer.planner.placement import EngineSettings, Fit, Fitter
from tpinfer.planner.precision import Precision
from tpinfer.planner.simulate import simulate
from tpinfer.planner.step_model import Split, StepModel, step_model
from tpinfer.planner.traits import Traits
from tpinfer.planner.workload import Slo, Workload
from tpinfer.scheduling.limits import SchedulerLimits

_PER_MILLION, _HOUR_S = 1e6, 3600.0
_FEWEST_REQUESTS, _MOST_REQUESTS = 400, 4000
"""Of a simulation with arrivals by chance."""
_OFTEN = 0.1
"""Share of steps in which a shortage is what binds."""

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


class Planner:
    """Makes plans of one model on one topology at one precision."""

    def __init__(
        self,
        spec: ModelSpec,
        topology: Topology,
        precision: Precision,
        workload: Workload,
        slo: Slo | None = None,
        traits: Traits | None = None,
    ) -> None:
        self.spec = spec
        self.topology = topology
        self.precision = precision
        self.workload = workload
        self._slo = slo or Slo()
        self._traits = traits
        reserved = (traits or Traits()).reserved_bytes
        self._fitter = Fitter(spec, topology, precision, reserved)
        self._models: dict[tuple[int, ...], StepModel] = {}

    def fit(self, sizes: tuple[int, int, int], settings: EngineSettings) -> Fit:
        """Whether (tp, pp, dp) ranks can do it."""
        return self._fitter.fit(sizes, settings, self.workload)

    def model(self, placement: Placement) -> StepModel:
        """Step times of a placement."""
        on_cpu = self.topology.hosts[0].computes_on_cpu
        key = placement.tp, placement.pp, placement.dp if on_cpu else 1
        if key not in self._models:
            self._models[key] = step_model(
                self.spec, self.topology, placement, self.precision, self._traits
            )
        return self._models[key]

    def estimate(self, fit: Fit, settings: EngineSettings) -> Plan:
        """The plan by its steady state."""
        if not fit.fits:
            return self._misfit(fit, settings)
        model, limits = self.model(fit.placement), self._limits(fit, settings)
        lane = self.workload.lane(_num_lanes(fit))
        found = Estimator(model, limits, lane, self.spec.sliding_window).estimate()
        plan = replace(
            self._plan(fit, settings, model, found.output_tokens_per_s),
            binding=_estimated_binding(found),
            ttft_s=found.ttft_s,
            tpot_s=found.tpot_s,
            ttft_split=found.ttft_split,
            tpot_split=found.tpot_split,
            keeps_up=found.keeps_up,
            num_running=found.num_running * self._num_busy(fit),
        )
        return self._judged(plan)

    def simulate(self, fit: Fit, settings: EngineSettings, num_requests: int | None = None) -> Plan:
        """The plan by a run of the scheduler. `num_requests`: of one lane."""
        if not fit.fits:
            return self._misfit(fit, settings)
        model, limits = self.model(fit.placement), self._limits(fit, settings)
        lane = self.workload.lane(_num_lanes(fit))
        window = self.spec.sliding_window
        estimator = Estimator(model, limits, lane, window)
        steady = estimator.estimate()
        if num_requests is None and lane.rate is not None:
            num_requests = _settled_requests(steady)

        def run(scale: float) -> Outcome:
            return outcome_of(simulate(model, limits, lane, num_requests, window, scale))

        found = run(1.0)
        ttft_interval = rate_interval = None
        tokens_per_s = found.output_tokens_per_s
        if lane.rate is not None:  # a wait grows by more than the steps do, a throughput by less
            low, high = model.traits.interval
            ttft_interval = run(1 - low).ttft.mean, run(1 + high).ttft.mean
            asked, most = lane.rate * lane.output_len, estimator.capacity_tokens_per_s()
            tokens_per_s = asked if steady.keeps_up else tokens_per_s
            busy = self._num_busy(fit)
            rate_interval = (
                busy * min(tokens_per_s, most / (1 + high)),
                busy * max(tokens_per_s, min(asked, most / max(1 - low, 1e-9))),
            )
        plan = replace(
            self._plan(fit, settings, model, tokens_per_s),
            binding=_binding(found),
            method="simulated",
            ttft_s=found.ttft.mean,
            tpot_s=found.tpot.mean,
            ttft_split=found.ttft_split,
            tpot_split=found.tpot_split,
            ttft=found.ttft,
            tpot=found.tpot,
            ttft_interval=ttft_interval,
            rate_interval=rate_interval,
            keeps_up=steady.keeps_up,
            num_running=found.num_running * self._num_busy(fit),
            num_preemptions=found.num_preemptions,
        )
        return self._judged(plan)

    def _limits(self, fit: Fit, settings: EngineSettings) -> SchedulerLimits:
        return replace(fit.lane_limits(settings, self.workload), window=self._every_window())

    def _every_window(self) -> int | None:
        """The window where every layer slides."""
        slides = self.spec.sliding_layers
        return self.spec.sliding_window if slides and all(slides) else None

    def _num_busy(self, fit: Fit) -> float:
        return self.workload.num_busy_lanes(_num_lanes(fit))

    def _plan(
        self, fit: Fit, settings: EngineSettings, model: StepModel, lane_tokens_per_s: float
    ) -> Plan:
        placement, traits = fit.placement, model.traits
        rate = lane_tokens_per_s * self._num_busy(fit)
        price, cost = self.topology.usd_per_gpu_hour, None
        if price is not None:
            ranks = placement.tp * placement.pp * placement.dp
            cost = price * ranks / _HOUR_S / rate * _PER_MILLION
        return Plan(
            placement.tp,
            placement.pp,
            placement.dp,
            settings,
            "",
            mode=traits.mode,
            origin=f"{model.device.origin}; traits {traits.name} ({traits.origin})",
            relative=traits.interval,
            output_tokens_per_s=rate,
            cost_per_mtok=cost,
            kv_capacity_tokens=fit.kv_capacity_tokens,
            weight_bytes=fit.weight_bytes,
        )

    def _misfit(self, fit: Fit, settings: EngineSettings) -> Plan:
        placement = fit.placement
        return Plan(
            placement.tp, placement.pp, placement.dp, settings, fit.binding, fit.reason,
            kv_capacity_tokens=fit.kv_capacity_tokens, weight_bytes=fit.weight_bytes,
        )  # fmt: skip

    def _judged(self, plan: Plan) -> Plan:
        assert plan.ttft_s is not None and plan.tpot_s is not None, "a plan that fits has times"
        return replace(plan, slo_misses=self._slo.misses(plan.ttft_s, plan.tpot_s))


def _settled_requests(found: Estimate) -> int:
    """So many that those of the beginning, who find the engine emptier, are a small part."""
    return min(_MOST_REQUESTS, max(_FEWEST_REQUESTS, round(8 * found.num_running)))


def _num_lanes(fit: Fit) -> int:
    return fit.placement.pp * fit.placement.dp


def _binding(found: Outcome) -> str:
    if found.short_of_kv > _OFTEN:
        return "kv_capacity"
    if found.short_of_rows > _OFTEN:
        return "max_num_seqs"
    return found.binding


def _estimated_binding(found: Estimate) -> str:
    return "kv_capacity" if found.short_of_kv else largest_word(found.tpot_split)


def _around(value: float, low: float, high: float) -> Interval:
    return value * (1 - low), value * (1 + high)


def _percentiles(spread: Spread | None) -> Mapping[str, float] | None:
    if spread is None:
        return None
    return {f"p{p}": value for p, value in zip(PERCENTILES, spread.percentiles, strict=True)}
