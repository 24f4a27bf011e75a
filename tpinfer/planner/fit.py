"""Whether a model fits a placement: weights by precision and shard, and the KV cache by the
runtime's own arithmetic.

A stage holds adjoining layers, as even as whole layers allow; `pp` batches are on their way through
the stages at once and share the cache (a lane each).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tpinfer.config.errors import ConfigError, TopologyError
from tpinfer.config.model import ModelSpec
from tpinfer.config.topology import Place, Placement, Topology
from tpinfer.config.units import format_size
from tpinfer.costs.kv_capacity import MemoryPlan, MemoryRequest, plan_memory
from tpinfer.costs.ledger import CostLedger
from tpinfer.planner.placement import EngineSettings, place
from tpinfer.planner.precision import Precision
from tpinfer.planner.traits import Traits
from tpinfer.planner.workload import Workload
from tpinfer.scheduling.limits import SchedulerLimits
from tpinfer.sharding.parameters import decoder_parameters
from tpinfer.sharding.partition import Partition, cut_evenly, partition_model

RESERVED_BYTES = Traits().reserved_bytes
"""Of a GPU's memory, what driver and collectives keep where nobody measured it."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a placement can be, and what it leaves for the cache."""

    placement: Placement
    reason: str = ""
    """In words why not; empty where it fits."""
    binding: str = ""
    """In a word why not: `devices`, `heads`, `layers`, `links`, `weights`, `kv_capacity`."""
    weight_bytes: int = 0
    """On the fullest rank."""
    memory: MemoryPlan | None = None
    """Of the stage with the least room."""
    num_groups: int = 1
    """Ranks that share a KV head's blocks."""

    @property
    def fits(self) -> bool:
        """Whether it can run the workload."""
        return not self.reason

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the caches of all replicas hold."""
        return self.memory.capacity_tokens * self.placement.dp if self.memory else 0

    def lane_limits(self, settings: EngineSettings, workload: Workload) -> SchedulerLimits:
        """The scheduler's limits for one of a replica's `pp` batches."""
        assert self.memory is not None, "limits are asked of what fits"
        lanes = self.placement.pp
        blocks = self.memory.num_blocks // lanes
        return SchedulerLimits(
            block_size=settings.block_size,
            num_blocks=blocks - blocks % self.num_groups,
            max_num_seqs=-(-settings.max_num_seqs // lanes),
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=workload.num_tokens,
            num_groups=self.num_groups,
            prefix_caching=workload.prefix_hit > 0,
        )


class Fitter:
    """Tries placements of one model at one precision."""

    def __init__(
        self,
        spec: ModelSpec,
        topology: Topology,
        precision: Precision,
        reserved_bytes: float = RESERVED_BYTES,
    ) -> None:
        """`reserved_bytes` of a GPU's memory are what driver and collectives keep."""
        self._spec = spec
        self._topology = topology
        self._precision = precision
        self._reserved = 0 if topology.hosts[0].computes_on_cpu else round(reserved_bytes)
        self._one_layer = replace(spec, num_layers=1, sliding_layers=tuple(spec.sliding_layers[:1]))
        self._partitions: dict[tuple[int, tuple[float, ...] | None], Partition] = {}
        self._shares: dict[Partition, list[_RankShare]] = {}
        self._ledgers: dict[tuple[Partition, int, int], CostLedger] = {}
        self._capacities: dict[tuple[object, ...], int] = {}

    def fit(self, sizes: tuple[int, int, int], settings: EngineSettings, work: Workload) -> Fit:
        """Whether (tp, pp, dp) ranks can run the workload, and what they leave for the cache."""
        tp, pp, dp = sizes
        bare = Placement(tp, pp, dp)
        try:
            partition = self._partition(bare)
        except ConfigError as error:
            return Fit(bare, str(error), "heads")
        if pp > self._spec.num_layers:
            reason = f"pp={pp} stages are more than the {self._spec.num_layers} layers; lower pp"
            return Fit(bare, reason, "layers")
        try:
            placement = place(self._topology, tp, pp, dp)
        except TopologyError as error:
            return Fit(bare, str(error), "devices")
        try:
            capacity = self._capacity(placement)
        except TopologyError as error:
            return Fit(placement, str(error), "links")
        return self._with_memory(placement, partition, capacity, settings, work)

    def _partition(self, placement: Placement) -> Partition:
        own = self._topology.placement
        shares = own.shares if own is not None and own.tp == placement.tp else None
        key = placement.tp, shares
        if key not in self._partitions:
            self._partitions[key] = partition_model(self._spec, placement.tp, shares, "auto")
        return self._partitions[key]

    def _capacity(self, placement: Placement) -> int:
        """Bytes of the smallest device in use."""
        on_cpu = self._topology.hosts[0].computes_on_cpu
        key = (placement.tp, placement.pp * placement.dp) if on_cpu else (placement.groups,)
        if key not in self._capacities:
            placed = replace(self._topology, placement=placement)
            groups = placement.groups or placed.groups(placement.tp)
            # One group of each make: those of equal devices have equal memory.
            kinds = {tuple(_make(self._topology, at) for at in group): group for group in groups}
            found = []
            for group in kinds.values():
                for host, device in group[:1] if len(set(map(_host_of, group))) == 1 else group:
                    ceilings = placed.ceilings_of(host, device, placement.tp)
                    if ceilings is None:
                        raise TopologyError(
                            f"{self._topology.file} says nothing of the rates of {host}/{device}; "
                            "give it a `sku:` of the catalogue, or `ceilings:`"
                        )
                    found.append(ceilings.memory[-1].capacity_bytes)
            self._capacities[key] = min(found)
        return self._capacities[key]

    def _with_memory(
        self,
        placement: Placement,
        partition: Partition,
        capacity: int,
        settings: EngineSettings,
        work: Workload,
    ) -> Fit:
        fullest, tightest = 0, None
        for share, num_layers, is_first, is_last in self._stages(placement, partition):
            weights = share.bytes(num_layers, is_first, is_last, self._spec.tie_embeddings)
            fullest = max(fullest, weights)
            free = capacity - self._reserved - weights
            if free <= 0:
                return Fit(
                    placement, self._too_heavy(placement, weights, capacity), "weights", weights
                )
            request = MemoryRequest(
                available_bytes=int(free * settings.memory_utilization),
                kv_bytes=None,
                block_size=settings.block_size,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_model_len=self._spec.max_position,
            )
            try:
                memory = plan_memory(self._ledger(partition, share.rank, num_layers), request)
            except ConfigError:
                reason = (
                    f"weights take {format_size(weights)} of a rank's {format_size(capacity)}, and "
                    "activations the rest: not one KV block fits; use more ranks, a smaller "
                    "--precision or fewer --max-num-batched-tokens"
                )
                return Fit(placement, reason, "weights", weights)
            if tightest is None or memory.num_blocks < tightest.num_blocks:
                tightest = memory
        assert tightest is not None, "there is at least one stage"
        return self._checked(placement, partition, fullest, tightest, work)

    def _checked(
        self,
        placement: Placement,
        partition: Partition,
        fullest: int,
        memory: MemoryPlan,
        work: Workload,
    ) -> Fit:
        """With room for one request in each lane, or why not."""
        group = partition.kv_group_size
        lane = memory.num_blocks // placement.pp
        lane -= lane % group
        needed = -(-(work.num_tokens - 1) // memory.block_size)
        reason, binding = "", ""
        if needed > lane:
            reason = (
                f"a request of {work.num_tokens} tokens needs {needed} KV blocks, and beside "
                f"weights of {format_size(fullest)} there is room for {lane}; use more ranks or a "
                "smaller --precision"
            )
            binding = "kv_capacity"
        return Fit(placement, reason, binding, fullest, memory, group)

    def _too_heavy(self, placement: Placement, weights: int, capacity: int) -> str:
        least = -(-weights * placement.tp * placement.pp // capacity)
        return (
            f"weights of {format_size(weights)} a rank do not fit its {format_size(capacity)}; use "
            f"{least} ranks or more (tp x pp), or a smaller --precision"
        )

    def _stages(
        self, placement: Placement, partition: Partition
    ) -> Iterator[tuple["_RankShare", int, bool, bool]]:
        """Each kind of (rank, layers, is the first stage, is the last)."""
        cuts = cut_evenly(self._spec.num_layers, (1.0,) * placement.pp)
        last = placement.pp - 1
        kinds = {
            (stop - start, stage == 0, stage == last) for stage, (start, stop) in enumerate(cuts)
        }
        if partition not in self._shares:
            self._shares[partition] = self._rank_shares(partition)
        for share in self._shares[partition]:
            for num_layers, is_first, is_last in kinds:
                yield share, num_layers, is_first, is_last

    def _rank_shares(self, partition: Partition) -> list["_RankShare"]:
        """Ranks that differ in what they hold."""
        parameters = decoder_parameters(self._one_layer, partition, self._precision.activation)
        found: dict[tuple[int, ...], _RankShare] = {}
        size = self._precision.activation.num_bytes
        for rank in range(partition.size):
            layer = ends = embedding = head = 0
            for one in parameters:
                count = one.shard.num_local_elements(rank)
                if one.name.startswith("layers."):
                    is_linear = len(one.shard.shape) == 2
                    each = self._precision.weight_bytes if is_linear else size
                    layer += round(count * each)
                elif one.name.startswith("embed."):
                    embedding = count * size
                elif one.name.startswith("head."):
                    head = count * size
                else:
                    ends += count * size
            held = layer, embedding, head, ends, partition.num_kv_heads(rank)
            found.setdefault(held, _RankShare(rank, layer, embedding, head, ends))
        return list(found.values())

    def _ledger(self, partition: Partition, rank: int, num_layers: int) -> CostLedger:
        """Of a stage of so many layers, for what its activations and keys take."""
        key = partition, rank, num_layers
        if key not in self._ledgers:
            slides = tuple(self._spec.sliding_layers[:num_layers])
            stage = replace(self._spec, num_layers=num_layers, sliding_layers=slides)
            self._ledgers[key] = CostLedger(
                stage, partition, rank, self._precision.activation, self._precision.kv
            )
        return self._ledgers[key]


@dataclass(frozen=True, slots=True)
class _RankShare:
    """Bytes of weights of one rank of a group."""

    rank: int
    layer: int
    embedding: int
    head: int
    ends: int
    """Of the final norm."""

    def bytes(self, num_layers: int, is_first: bool, is_last: bool, is_tied: bool) -> int:
        """Of a stage. A tied head on another stage than the embedding has a copy of it."""
        found = num_layers * self.layer
        if is_first or (is_last and is_tied):
            found += self.embedding
        return found + (self.head + self.ends if is_last else 0)


def _host_of(at: Place) -> str:
    return at[0]


def _make(topology: Topology, at: Place) -> object:
    """What is equal for devices of equal memory."""
    device = topology.host(at[0]).device(at[1])
    return device.sku, device.mig, repr(device.overrides), repr(device.rates)
