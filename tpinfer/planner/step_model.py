"""How long one engine step takes on the slowest rank, split into the six words.

Every op is priced from the ledger: a kernel takes `t0 + max(bytes / (e * BW), FLOPs / (g * peak))`,
a collective what its group's curves say, the host so much a step and so much a row. An op goes
where the profiler would file it (`costs.bound`): below the least time of a kernel to small kernels,
else to what binds it. It says nothing of queueing or of more than one step.
"""

from collections import Counter
from dataclasses import dataclass, replace

from tpinfer.config.dtypes import DType
from tpinfer.config.errors import ConfigError
from tpinfer.config.model import ModelSpec
from tpinfer.config.topology import Placement, Topology
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import TERMS, Formula, OpKind, StepAggregates, aggregate
from tpinfer.planner.collective_times import CollectiveTimes, collective_times
from tpinfer.planner.kernel_times import DeviceTimes, device_times
from tpinfer.planner.precision import PRECISIONS, Precision
from tpinfer.planner.traits import Traits
from tpinfer.sharding.partition import partition_model

_ONE, _TOKENS, _ROWS = TERMS.index("one"), TERMS.index("tokens"), TERMS.index("rows")
_Terms = tuple[tuple[int, float], ...]


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
        return (
            self.compute + self.memory + self.communication + self.small_kernels + self.host
            + self.queue
        )  # fmt: skip

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
        are stored otherwise than the ledger's compute dtype."""
        self.ledger, self.device, self.links, self.traits = ledger, device, links, traits
        self.precision = precision or _ledger_precision(ledger)
        self.num_stages = num_stages
        self._floor_s = device.kernel_floor_s * traits.kernel_floor
        self._kernels: list[tuple[int, _Terms, _Terms]] = []
        self._reduces: list[tuple[int, float]] = []
        self._gathers: list[tuple[int, _Terms]] = []
        self._affine = [
            (latency * traits.collective, per_byte * traits.collective)
            for latency, per_byte in links.affine()
        ]
        self._price_ops()
        width = ledger.spec.hidden_size * ledger.compute_dtype.num_bytes
        self._stage_s = (num_stages - 1) * links.transfer_latency_s
        self._stage_token_s = (num_stages - 1) * width / links.transfer_bytes_per_s

    def step(self, sums: StepAggregates) -> Split:
        """One step's time. A step without tokens takes none."""
        terms = sums.values()
        if not terms[_TOKENS]:
            return Split()
        compute = memory = small = 0.0
        floor = self._floor_s
        for count, flops, moved in self._kernels:
            compute_s = memory_s = 0.0
            for index, factor in flops:
                compute_s += factor * terms[index]
            for index, factor in moved:
                memory_s += factor * terms[index]
            if compute_s > memory_s:
                roof, is_compute = compute_s, True
            else:
                roof, is_compute = memory_s, False
            if roof < floor:
                small += count * (floor + roof) if roof > 0 else 0.0
            elif is_compute:
                compute += count * (floor + roof)
            else:
                memory += count * (floor + roof)
        host = self.traits.host_step_s + self.traits.host_row_s * terms[_ROWS]
        return Split(compute, memory, self._communication(terms), small, host)

    def _communication(self, terms: tuple[int, ...]) -> float:
        tokens = terms[_TOKENS]
        total = self._stage_s + self._stage_token_s * tokens
        for count, width in self._reduces:
            total += count * min([lat + width * tokens * per for lat, per in self._affine])
        if self._gathers:
            latency, per_byte = self._affine[0]
            n = self.links.num_ranks
            per_sent = per_byte * n / (2 * (n - 1))
            for count, sent in self._gathers:
                num_bytes = sum([factor * terms[index] for index, factor in sent])
                if num_bytes:
                    total += count * (latency + num_bytes * per_sent)
        return total

    def _price_ops(self) -> None:
        ledger, traits, device = self.ledger, self.traits, self.device
        per_byte = 1 / (device.main_memory.bytes_per_s * traits.memory)
        per_kv_byte = 1 / (device.main_memory.bytes_per_s * traits.kv_read)
        product_s = 1 / (device.rate(self.precision.product) * traits.compute)
        plain_s = 1 / (device.rate(ledger.compute_dtype) * traits.compute)
        attention_s = 1 / (device.rate(ledger.compute_dtype) * traits.attention)
        counted = Counter(
            (ledger.kind(op), op == "head", ledger.op_formula(op)) for op in ledger.op_ids()
        )
        for (kind, is_head, one), count in counted.items():
            moved = one.bytes_read + one.bytes_written
            if kind is OpKind.REDUCE:
                n = ledger.partition.size
                sent = dict(one.bytes_sent.coefficients)[_TOKENS]
                self._reduces.append((count, sent * n / (2 * (n - 1))))
            elif kind.is_collective:
                if one.bytes_sent.coefficients:
                    self._gathers.append((count, one.bytes_sent.coefficients))
            elif kind is OpKind.ATTENTION:
                flops = _scaled(one.flops, attention_s)
                self._kernels.append((count, flops, _scaled(moved, per_kv_byte)))
            elif kind is OpKind.LINEAR and not is_head:
                share = self.precision.weight_bytes / ledger.compute_dtype.num_bytes
                stored = tuple((i, f * share if i == _ONE else f) for i, f in moved.coefficients)
                flops = _scaled(one.flops, product_s)
                self._kernels.append((count, flops, _scaled(Formula(stored), per_byte)))
            else:
                flops = _scaled(one.flops, plain_s)
                self._kernels.append((count, flops, _scaled(moved, per_byte)))


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
    partition = partition_model(spec, tp, placement.shares, "auto")
    placed = replace(topology, placement=placement)
    models: list[StepModel] = []
    seen = set()
    for rank in range(tp):
        ceilings = placed.ceilings_of_rank(rank, tp)
        if ceilings is None:
            raise ConfigError(
                f"{topology.file} gives rank {rank}'s device neither a known sku nor rates; "
                "name one of the catalogue's under `sku:` or give `ceilings:`"
            )
        ledger = CostLedger(spec, partition, rank, precision.activation, precision.kv)
        device, links = device_times(ceilings), collective_times(ceilings, tp)
        shape = (
            partition.num_heads(rank), partition.num_kv_heads(rank), partition.mlp[rank],
            partition.vocab[rank],
        )  # fmt: skip
        key = (*shape[:2], *(stop - start for start, stop in shape[2:]), ceilings.memory)
        if key not in seen:
            seen.add(key)
            models.append(
                StepModel(ledger, device, links, traits or Traits(), precision, placement.pp)
            )
    probe = aggregate([1], [1024], 1, 0, spec.sliding_window)
    return max(models, key=lambda model: model.step(probe).total)


def _ledger_precision(ledger: CostLedger) -> Precision:
    dtype = ledger.compute_dtype
    for one in PRECISIONS.values():
        if one.product == dtype and one.activation is dtype:
            return one.with_kv(ledger.kv_dtype)
    return Precision(dtype.value, float(dtype.num_bytes), DType(dtype), dtype, ledger.kv_dtype)


def _scaled(form: Formula, factor: float) -> _Terms:
    return tuple((index, factor * value) for index, value in form.coefficients)
