"""What placements would do: their plans, by the steady state in closed form or by a simulation."""

from dataclasses import replace

from tpinfer.config.model import ModelSpec
from tpinfer.config.topology import Placement, Topology
from tpinfer.planner.chunks import Chunks
from tpinfer.planner.estimate import Estimate, Estimator
from tpinfer.planner.fit import Fit, Fitter
from tpinfer.planner.outcome import Outcome, largest_word, outcome_of
from tpinfer.planner.placement import EngineSettings
from tpinfer.planner.plan import Plan
from tpinfer.planner.precision import Precision
from tpinfer.planner.simulate import simulate_stages
from tpinfer.planner.step_model import StepModel, step_model
from tpinfer.planner.traits import Traits
from tpinfer.planner.workload import Slo, Workload
from tpinfer.scheduling.limits import SchedulerLimits

_PER_MILLION, _HOUR_S = 1e6, 3600.0
_FEWEST_REQUESTS, _MOST_REQUESTS = 400, 4000
"""Of a simulation with arrivals by chance."""
_OFTEN = 0.1
"""Share of steps in which a shortage is what binds."""


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
        steps_in_flight: int | None = None,
    ) -> None:
        """`steps_in_flight`: steps handed over at once, by default two on GPUs and one on CPUs."""
        self.spec = spec
        self.topology = topology
        self.precision = precision
        self.workload = workload
        self._slo = slo or Slo()
        self._traits = traits
        on_cpu = topology.hosts[0].computes_on_cpu
        self._is_ahead = (steps_in_flight or (1 if on_cpu else 2)) > 1
        reserved = (traits or Traits()).reserved_bytes
        self._fitter = Fitter(spec, topology, precision, reserved)
        self._models: dict[tuple[int, ...], StepModel] = {}
        self._chunks = Chunks(spec, topology, precision)

    def fit(self, sizes: tuple[int, int, int], settings: EngineSettings) -> Fit:
        """Whether (tp, pp, dp) ranks can do it."""
        return self._fitter.fit(sizes, settings, self.workload)

    def model(self, placement: Placement) -> StepModel:
        """Step times of a placement."""
        on_cpu = self.topology.hosts[0].computes_on_cpu
        busy = self._busy_stages(placement)
        key = placement.tp, placement.pp, placement.dp if on_cpu else 1, busy
        if key not in self._models:
            shape = self.spec, self.topology, placement, self.precision
            self._models[key] = step_model(*shape, self._traits, busy, self._is_ahead)
        return self._models[key]

    def with_chunk(self, sizes: tuple[int, int, int], settings: EngineSettings) -> EngineSettings:
        """`settings` with the tokens of a step that the runtime chooses on (tp, pp, dp) ranks where
        nobody names a number."""
        rows, share = settings.max_num_seqs, settings.memory_utilization
        tokens = self._chunks.tokens(sizes, rows, share)
        return replace(settings, max_num_batched_tokens=tokens)

    def estimate(self, fit: Fit, settings: EngineSettings) -> Plan:
        """The plan by its steady state."""
        if not fit.fits:
            return self._misfit(fit, settings)
        model, limits = self.model(fit.placement), self._limits(fit, settings)
        lane = self.workload.lane(_num_lanes(fit))
        window, stages = self.spec.sliding_window, self._busy_stages(fit.placement)
        found = Estimator(model, limits, lane, window, stages).estimate()
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
        window, stages = self.spec.sliding_window, self._busy_stages(fit.placement)
        estimator = Estimator(model, limits, lane, window, stages)
        steady = estimator.estimate()
        if num_requests is None and lane.rate is not None:
            num_requests = _settled_requests(steady)

        def run(scale: float) -> Outcome:
            runs = simulate_stages(model, limits, lane, stages, num_requests, window, scale)
            return outcome_of(*runs)

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

    def _busy_stages(self, placement: Placement) -> int:
        """Batches on their way through one replica at once."""
        each = self.workload.lane(placement.dp).concurrency
        return placement.pp if each is None else min(placement.pp, each)

    def _num_busy(self, fit: Fit) -> float:
        return self.workload.num_busy_lanes(_num_lanes(fit))

    def _plan(
        self, fit: Fit, settings: EngineSettings, model: StepModel, lane_tokens_per_s: float
    ) -> Plan:
        placement, traits = fit.placement, model.traits
        rate = lane_tokens_per_s * self._num_busy(fit)
        price, cost = self._usd_per_hour(placement), None
        if price is not None:
            cost = price / _HOUR_S / rate * _PER_MILLION
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

    def _usd_per_hour(self, placement: Placement) -> float | None:
        """Of all devices in use; None where the price of one is unknown."""
        topology, ranks = self.topology, placement.tp * placement.pp * placement.dp
        prices = {topology.usd_per_device_hour(d) for host in topology.hosts for d in host.devices}
        if len(prices) > 1 and placement.groups:
            found = [
                topology.usd_per_device_hour(topology.host(host).device(device))
                for group in placement.groups
                for host, device in group
            ]
            return None if None in found else sum(price or 0.0 for price in found)
        price = max((one for one in prices if one is not None), default=None)
        return None if price is None or None in prices else price * ranks

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
