"""How long one engine step takes on the slowest rank, split into the six words.

Every op is priced from the ledger: as a probe timed its kind in steps, where one did, else a
kernel takes `t0 + (m^p + c^p)^(1/p)`, m = bytes / (e * BW)
and c = FLOPs / (g * peak), a collective what its group's curves say, the host so much a step and so
much a row. The power p stands between max(m, c), where memory and arithmetic overlap fully, and
their sum: kernels near the ridge are slower than the roofline's max says. An op goes where the
profiler would file it (`costs.bound`): below the least time of a kernel to small kernels, else to
what binds it. It says nothing of queueing or of more than one step.
"""

from dataclasses import replace

from tpinfer.config.errors import ConfigError
from tpinfer.config.model import ModelSpec
from tpinfer.config.topology import Placement, Topology
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import TERMS, OpKind, StepAggregates, aggregate
from tpinfer.planner.collective_times import CollectiveTimes
from tpinfer.planner.group_times import (
    default_traits,
    group_times,
    measured_device,
    with_stages,
)
from tpinfer.planner.kernel_times import DeviceTimes
from tpinfer.planner.precision import Precision, ledger_precision
from tpinfer.planner.split import Split
from tpinfer.planner.step_program import Work, count_program, scaled
from tpinfer.planner.timed_ops import dot, timed_op
from tpinfer.planner.traits import Traits
from tpinfer.sharding.partition import cut_evenly, partition_model

_TOKENS, _ROWS = TERMS.index("tokens"), TERMS.index("rows")


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
        num_busy: int | None = None,
        is_ahead: bool = False,
    ) -> None:
        """`ledger` of the slowest rank, with every layer of the model; `precision` where weights
        are stored otherwise than in the ledger's compute dtype. `num_busy` of the stages are at
        work at once, by default all; `is_ahead`: whether a step is planned while others run."""
        self.ledger, self.device, self.links = ledger, device, links
        self.precision = precision or ledger_precision(ledger.compute_dtype, ledger.kv_dtype)
        self.num_stages, self.is_ahead = num_stages, is_ahead
        self._num_busy = num_stages if num_busy is None else num_busy
        layers = ledger.spec.num_layers
        cuts = [stop - start for start, stop in cut_evenly(layers, (1.0,) * num_stages)]
        self._stage_shares = max(cuts) / layers, cuts[-1] / layers
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
        other.is_ahead = self.is_ahead
        other._num_busy, other._stage_shares = self._num_busy, self._stage_shares
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
        compute = memory = small = head = 0.0
        for count, role, flops, moved in self._kernels:
            compute_s = memory_s = 0.0
            for index, factor in flops:
                compute_s += factor * terms[index]
            for index, factor in moved:
                memory_s += factor * terms[index]
            memory_s *= memory_factor
            if role == "linear":
                compute_s *= slower
            if compute_s > memory_s:
                spent = compute_s * (1 + (memory_s / compute_s) ** power) ** root
                spent = count * (floor + spent)
                if compute_s < floor:
                    small += spent
                else:
                    compute += spent
            elif memory_s:
                spent = memory_s * (1 + (compute_s / memory_s) ** power) ** root
                spent = count * (floor + spent)
                if memory_s < floor:
                    small += spent
                else:
                    memory += spent
            else:
                continue
            if role == "head":
                head += spent
        for op in self._timed:
            compute_s, memory_s = (dot(roof, terms) for roof in op.roofs)
            if not compute_s and not memory_s:
                continue
            spent = op.count * op.seconds(terms)
            if op.rows_term == _ROWS:
                head += spent
            if max(compute_s, memory_s) < floor:
                small += spent
            elif compute_s >= memory_s:
                compute += spent
            else:
                memory += spent
        host = self.traits.host_step_s + self.traits.host_row_s * terms[_ROWS]
        communication = self._communication(terms)
        if self._num_busy > 1:
            communication += self._stage_wait_s(compute + memory + small + communication, head)
        if self._hides_host:
            host = max(0.0, host - compute - memory - small - communication)
        return Split(compute, memory, communication, small, host)

    def _stage_wait_s(self, work_s: float, head_s: float) -> float:
        """What a step waits for the slowest stage where all are at work: layers do not divide
        evenly, and the last stage has the head besides. `work_s` is of all stages."""
        longest, last = self._stage_shares
        layers_s = work_s - head_s
        slowest_s = max(layers_s * longest, layers_s * last + head_s)
        return max(0.0, self._num_busy * slowest_s - work_s)

    def _communication(self, terms: tuple[int, ...]) -> float:
        tokens = terms[_TOKENS]
        total = self._stage_s + self._stage_token_s * tokens
        for count, width in self._program.reduces:
            size = width * tokens
            total += count * min([latency + size * per for latency, per in self._affine])
        for count, sent in self._program.gathers:
            num_bytes = sum([factor * terms[index] for index, factor in sent])
            if num_bytes:
                total += count * (self._gather_s + num_bytes * self._sent_s)
        return total

    def _cached_factor(self, sums: StepAggregates) -> float:
        """Below 1 where the step's working set stays in a faster level than main memory."""
        levels = self.device.memory
        if not self._fits_cache():
            return 1.0
        size = self.ledger.step_working_set_bytes(sums)
        fits = (level for level in levels if size <= level.capacity_bytes)
        return self.device.main_memory.bytes_per_s / next(fits, levels[-1]).bytes_per_s

    def _set_rates(self, traits: Traits) -> None:
        self.traits = traits
        self._hides_host = self.is_ahead and traits.host_is_all
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
        self._kernels, self._timed = [], []
        ops = device.ops if traits.mode == "probe" and not self._fits_cache() else {}
        for work in self._program.kernels:
            op = ops.get(work.kind)
            if op is not None and self._is_as_measured(work):
                self._timed.append(timed_op(work, op, seconds[work.role]))
                continue
            flop_s, byte_s = seconds[work.role]
            timed = scaled(work.flops, flop_s), scaled(work.moved, byte_s)
            role = "head" if work.is_head else work.role
            self._kernels.append((work.count, role, *timed))
        self._set_links(traits)
        width = self.ledger.spec.hidden_size * self.ledger.compute_dtype.num_bytes
        self._stage_s = (self.num_stages - 1) * links.transfer_latency_s
        self._stage_token_s = (self.num_stages - 1) * width / links.transfer_bytes_per_s

    def _set_links(self, traits: Traits) -> None:
        links, factor = self.links, traits.collective
        n = links.num_ranks
        sent = 2 * max(1, n - 1) / n  # of each message byte of an all-reduce
        reduce = links.ops.get(OpKind.REDUCE) if traits.mode == "probe" else None
        affine = links.affine()
        if reduce is not None:
            rate = reduce.bytes_per_s
            affine = [(reduce.floor_s, sent / rate if rate else 0.0)]
        self._affine = [(latency * factor, per * factor) for latency, per in affine]
        self._sent_s = min([per for _, per in self._affine], default=0.0) / sent
        self._gather_s = self._affine[0][0] if self._affine else 0.0
        gather = links.ops.get(OpKind.GATHER) if traits.mode == "probe" else None
        if gather is not None:
            self._gather_s = gather.floor_s
            self._sent_s = 1 / gather.bytes_per_s if gather.bytes_per_s else 0.0

    def _fits_cache(self) -> bool:
        """Whether the weights stay in a level above main memory; a probe's steps read theirs from
        main memory."""
        levels = self.device.memory
        return len(levels) > 1 and self.weight_bytes <= levels[-2].capacity_bytes

    def _is_as_measured(self, work: Work) -> bool:
        """Whether a probe's steps, which store everything in the compute dtype, had such an op."""
        dtype = self.precision.activation
        if work.role == "linear":
            return self.precision.product == dtype and (
                self.precision.weight_bytes == dtype.num_bytes
            )
        return work.kind is not OpKind.ATTENTION or self.precision.kv is dtype


def step_model(
    spec: ModelSpec,
    topology: Topology,
    placement: Placement,
    precision: Precision,
    traits: Traits | None = None,
    num_busy: int | None = None,
    is_ahead: bool = False,
) -> StepModel:
    """The step model of the slowest rank of a placement. `num_busy`, `is_ahead`: see `StepModel`.

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
        measured, sharing = None, placed.num_sharing(home, groups)
        if placed.measured is not None:
            measured = placed.measured.device(home.name, home.device(place[1]).id, sharing)
        device = measured_device(
            ceilings, measured, sharing, precision.activation, traits.overlap_power
        )
        stages = placement.pp
        models.append(
            StepModel(ledger, device, links, traits, precision, stages, num_busy, is_ahead)
        )
    probe = aggregate([1], [1024], 1, 0, spec.sliding_window)
    return max(models, key=lambda model: model.step(probe).total)
