"""How long one engine step takes on the slowest rank, split into the six words.

Every op is priced from the ledger: a kernel takes `t0 + (m^p + c^p)^(1/p)`, m = bytes / (e * BW)
and c = FLOPs / (g * peak), a collective what its group's curves say, the host so much a step and so
much a row. The power p stands between max(m, c), where memory and arithmetic overlap fully, and
their sum: kernels near the ridge are slower than the roofline's max says. An op goes where the
profiler would file it (`costs.bound`): below the least time of a kernel to small kernels, else to
what binds it. It says nothing of queueing or of more than one step.
"""

from dataclasses import dataclass, replace

from tpinfer.config.errors import ConfigError
from tpinfer.config.model import ModelSpec
from tpinfer.config.topology import Placement, Topology
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import TERMS, StepAggregates, aggregate
from tpinfer.planner.collective_times import CollectiveTimes
from tpinfer.planner.group_times import (
    default_traits,
    group_times,
    measured_device,
    with_stages,
)
from tpinfer.planner.kernel_times import DeviceTimes
from tpinfer.planner.precision import Precision, ledger_precision
from tpinfer.planner.step_program import count_program, scaled
from tpinfer.planner.traits import Traits
from tpinfer.sharding.partition import partition_model

_TOKENS, _ROWS = TERMS.index("tokens"), TERMS.index("rows")


@dataclass(frozen=True, slots=True)
class Split:
    """Seconds by the six words of attribution."""

    compute: float = 0.0
    memory: float = 0.0
    communication: float = 0.0
    small_kernels: float = 0.0
    host: float = 0.0
    queue: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all six."""
        kernels = self.compute + self.memory + self.small_kernels
        return kernels + self.communication + self.host + self.queue

    def __add__(self, other: "Split") -> "Split":
        return Split(
            self.compute + other.compute,
            self.memory + other.memory,
            self.communication + other.communication,
            self.small_kernels + other.small_kernels,
            self.host + other.host,
            self.queue + other.queue,
        )

    def __mul__(self, factor: float) -> "Split":
        return Split(
            self.compute * factor,
            self.memory * factor,
            self.communication * factor,
            self.small_kernels * factor,
            self.host * factor,
            self.queue * factor,
        )

    __rmul__ = __mul__


class StepModel:
    """Prices steps of one placement."""

    def __init__(
        self,
        ledger: CostLedger,
        device: DeviceTimes,
        links: CollectiveTimes,
        traits: Traits,
        precision: Precision | None = None,
        num_stages: int = 1,
    ) -> None:
        """`ledger` of the slowest rank, with every layer of the model; `precision` where weights
        are stored otherwise than in the ledger's compute dtype."""
        self.ledger, self.device, self.links = ledger, device, links
        self.precision = precision or ledger_precision(ledger.compute_dtype, ledger.kv_dtype)
        self.num_stages = num_stages
        self._program = count_program(ledger, self.precision)
        self._set_rates(traits)

    @property
    def weight_bytes(self) -> float:
        """Parameters of the rank as they are stored, all stages together."""
        return self._program.weight_bytes

    def with_traits(self, traits: Traits) -> "StepModel":
        """The same placement with other traits; nothing is counted anew."""
        other = object.__new__(StepModel)
        other.ledger, other.device, other.links = self.ledger, self.device, self.links
        other.precision, other.num_stages = self.precision, self.num_stages
        other._program = self._program
        other._set_rates(traits)
        return other

    def step(self, sums: StepAggregates) -> Split:
        """One step's time; a step without tokens takes none."""
        terms = sums.values()
        tokens = terms[_TOKENS]
        if not tokens:
            return Split()
        slower = 1 / self.device.thin_share(tokens)
        memory_factor = self._cached_factor(sums)
        floor, power, root = self._floor_s, self._power, self._root
        compute = memory = small = 0.0
        for count, is_linear, flops, moved in self._kernels:
            compute_s = memory_s = 0.0
            for index, factor in flops:
                compute_s += factor * terms[index]
            for index, factor in moved:
                memory_s += factor * terms[index]
            memory_s *= memory_factor
            if is_linear:
                compute_s *= slower
            if compute_s > memory_s:
                kernel_s = floor + compute_s * (1 + (memory_s / compute_s) ** power) ** root
                if compute_s < floor:
                    small += count * kernel_s
                else:
                    compute += count * kernel_s
            elif memory_s:
                kernel_s = floor + memory_s * (1 + (compute_s / memory_s) ** power) ** root
                if memory_s < floor:
                    small += count * kernel_s
                else:
                    memory += count * kernel_s
        host = self.traits.host_step_s + self.traits.host_row_s * terms[_ROWS]
        return Split(compute, memory, self._communication(terms), small, host)

    def _communication(self, terms: tuple[int, ...]) -> float:
        tokens = terms[_TOKENS]
        total = self._stage_s + self._stage_token_s * tokens
        for count, width in self._program.reduces:
            size = width * tokens
            total += count * min([latency + size * per for latency, per in self._affine])
        for count, sent in self._program.gathers:
            num_bytes = sum([factor * terms[index] for index, factor in sent])
            if num_bytes:
                total += count * (self._affine[0][0] + num_bytes * self._sent_s)
        return total

    def _cached_factor(self, sums: StepAggregates) -> float:
        """Below 1 where the step's working set stays in a faster level than main memory."""
        levels = self.device.memory
        if self.weight_bytes > levels[max(0, len(levels) - 2)].capacity_bytes or len(levels) == 1:
            return 1.0
        size = self.ledger.step_working_set_bytes(sums)
        fits = (level for level in levels if size <= level.capacity_bytes)
        return self.device.main_memory.bytes_per_s / next(fits, levels[-1]).bytes_per_s

    def _set_rates(self, traits: Traits) -> None:
        self.traits = traits
        device, links = self.device, self.links
        rate = device.main_memory.bytes_per_s
        per_byte, per_kv_byte = 1 / (rate * traits.memory), 1 / (rate * traits.kv_read)
        plain = device.rate(self.ledger.compute_dtype)
        seconds = {
            "linear": (1 / (device.rate(self.precision.product) * traits.compute), per_byte),
            "plain": (1 / (plain * traits.compute), per_byte),
            "attention": (1 / (plain * traits.attention), per_kv_byte),
        }
        self._floor_s = device.kernel_floor_s * traits.kernel_floor
        self._power, self._root = traits.overlap_power, 1 / traits.overlap_power
        self._kernels = []
        for work in self._program.kernels:
            flop_s, byte_s = seconds[work.role]
            timed = scaled(work.flops, flop_s), scaled(work.moved, byte_s)
            self._kernels.append((work.count, work.role == "linear", *timed))
        factor = traits.collective
        self._affine = [(latency * factor, per * factor) for latency, per in links.affine()]
        n = links.num_ranks
        per_message = min([per for _, per in self._affine], default=0.0)
        self._sent_s = per_message * n / (2 * max(1, n - 1))
        width = self.ledger.spec.hidden_size * self.ledger.compute_dtype.num_bytes
        self._stage_s = (self.num_stages - 1) * links.transfer_latency_s
        self._stage_token_s = (self.num_stages - 1) * width / links.transfer_bytes_per_s


def step_model(
    spec: ModelSpec,
    topology: Topology,
    placement: Placement,
    precision: Precision,
    traits: Traits | None = None,
) -> StepModel:
    """The step model of the slowest rank of a placement.

    Raises ConfigError where the topology says nothing of the devices' rates, TopologyError where it
    has too few of them.
    """
    tp = placement.tp
    traits = traits or default_traits(topology)
    partition = partition_model(spec, tp, placement.shares, "auto")
    placed = replace(topology, placement=placement)
    groups = placed.groups(tp)
    models: list[StepModel] = []
    seen: set[tuple[object, ...]] = set()
    members = groups[0]
    for rank, place in enumerate(members):
        ceilings = placed.ceilings_of(*place, num_ranks=tp)
        if ceilings is None:
            raise ConfigError(
                f"{topology.file} gives rank {rank}'s device neither a known sku nor rates; "
                "name one of the catalogue's under `sku:` or give `ceilings:`"
            )
        cuts = (partition.heads, partition.kv_heads, partition.mlp, partition.vocab)
        widths = tuple(ranges[rank][1] - ranges[rank][0] for ranges in cuts)
        key = (widths, ceilings.memory, tuple(sorted(ceilings.flops_per_s.items())))
        if key in seen:
            continue
        seen.add(key)
        ledger = CostLedger(spec, partition, rank, precision.activation, precision.kv)
        links = group_times(placed, members, ceilings, traits.collectives_of)
        if placement.pp > 1 and len(groups) > 1:
            links = with_stages(links, placed, members[0], groups[1][0])
        home = placed.host(place[0])
        measured = None
        if placed.measured is not None:
            sharing = placed.num_sharing(home, groups)
            measured = placed.measured.device(home.name, home.device(place[1]).id, sharing)
        device = measured_device(ceilings, measured, precision.activation, traits.overlap_power)
        models.append(StepModel(ledger, device, links, traits, precision, placement.pp))
    probe = aggregate([1], [1024], 1, 0, spec.sliding_window)
    return max(models, key=lambda model: model.step(probe).total)
