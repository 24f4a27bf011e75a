"""What a probe has measured on a machine: the layer between a topology file and the command line.

Records only; `config.measured_yaml` reads and writes them. Rates of memory and arithmetic are those
of ONE rank while `num_sharing` ranks of its host are at it at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tpinfer.config.ceilings import CeilingOverrides
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import TopologyError
from tpinfer.config.origin import Origin

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
OP_KINDS = (
    "embed", "reduce", "norm", "linear", "rope", "attention", "activation", "gather", "exchange",
    "sample",
)  # fmt: skip
"""As `costs.ops.OpKind`, which lies above this package."""


@dataclass(frozen=True, slots=True)
class MemoryRead:
    """Read rate over one working set."""

    level: str
    """What holds the working set: `L1 L2 L3 DRAM HBM`."""
    working_set_bytes: int
    """What was read over and over."""
    bytes_per_s: float
    capacity_bytes: int | None = None
    """What of this level a rank can count on; None: as much as was read, or what the topology file
    says of DRAM and HBM."""


@dataclass(frozen=True, slots=True)
class GemmRate:
    """Rate of one matrix product, [rows, inner] by [inner, columns]."""

    dtype: DType
    rows: int
    """How thin it is: tokens of a step."""
    columns: int
    inner: int
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Copy:
    """Copies from one kind of memory to another."""

    path: str
    """`host_to_device`, `device_to_host`, `device_to_device` or `host_to_host`."""
    bytes_per_s: float
    latency_s: float | None = None


@dataclass(frozen=True, slots=True)
class OpTime:
    """Time of one kind of op of the runtime, as it runs in a step between the others:

        floor + row * rows + bytes / bytes_per_s + operations / flops_per_s

    with what the ledger counts of it. A linear's rate depends on its rows: `rates`.
    """

    kind: str
    """As `costs.ops.OpKind` names it."""
    dtype: DType
    """What was computed in."""
    floor_s: float = 0.0
    row_s: float = 0.0
    """For each token that the step draws."""
    bytes_per_s: float | None = None
    """Of bytes read and written, of bytes sent for a collective; None where bytes cost nothing."""
    flops_per_s: float | None = None
    rates: Mapping[int, float] = field(default_factory=dict)
    """Rows -> operations per second."""
    error: float = 0.0
    """Mean absolute relative error of the fit."""


@dataclass(frozen=True, slots=True)
class HostTime:
    """What the host does for a step of the runtime besides its ops: planning it, making tensors of
    the plan, taking its tokens."""

    step_s: float
    row_s: float
    """For each token that the step draws, in addition."""


@dataclass(frozen=True, slots=True)
class Clocks:
    """What the driver said while the probe ran."""

    compute_mhz: int | None = None
    memory_mhz: int | None = None
    throttled_by: tuple[str, ...] = ()
    """Reasons seen at any sample, such as `sw_power_cap`."""
    most_compute_mhz: int | None = None
    """The highest that the device has."""
    most_memory_mhz: int | None = None


@dataclass(frozen=True, slots=True)
class DeviceMeasurement:
    """What devices that are alike reach."""

    host: str
    devices: tuple[str, ...]
    """Ids, as in the topology file."""
    num_sharing: int = 1
    """Ranks that shared the device (for CPU ranks: the host) while it was measured."""
    memory: tuple[MemoryRead, ...] = ()
    """Smallest working set first."""
    gemms: tuple[GemmRate, ...] = ()
    eager_floor_s: float | None = None
    """Least time of an op or kernel that is launched by itself."""
    graph_floor_s: float | None = None
    """Least time of a kernel inside a replayed graph."""
    copies: tuple[Copy, ...] = ()
    clocks: Clocks | None = None
    ops: tuple[OpTime, ...] = ()
    """Those of one rank, in steps of the runtime, where `gemms` are products alone."""
    host_time: HostTime | None = None

    def flops_per_s(self) -> dict[DType, float]:
        """The best rate of each dtype."""
        best: dict[DType, float] = {}
        for gemm in self.gemms:
            best[gemm.dtype] = max(best.get(gemm.dtype, 0.0), gemm.flops_per_s)
        return best

    def overrides(self, num_sharing: int) -> CeilingOverrides:
        """These numbers as ceilings of one of `num_sharing` ranks.

        What was measured with another number of ranks sharing is taken as the same whole, cut anew.
        """
        scale = self.num_sharing / num_sharing
        levels: dict[str, tuple[int | None, float | None]] = {}
        for read in self.memory:
            capacity = read.capacity_bytes
            if capacity is None and read.level not in ("DRAM", "HBM"):
                capacity = read.working_set_bytes
            # A level's rate is that of its largest working set: the last one wins.
            levels[read.level] = (
                None if capacity is None else int(capacity * scale),
                read.bytes_per_s * scale,
            )
        return CeilingOverrides(
            memory=levels,
            flops_per_s={dtype: rate * scale for dtype, rate in self.flops_per_s().items()},
            kernel_floor_s=self.eager_floor_s,
            compute_mhz=self.clocks.compute_mhz if self.clocks and self.gemms else None,
        ).marked(Origin.MEASURED)


@dataclass(frozen=True, slots=True)
class CollectiveFit:
    """Time of one collective over one group, as the lesser of two straight lines:

        min(a + b (n - 1) + sent / B1,  c + d (n - 1) + sent / B2)

    with `sent` the bytes that each rank must send: 2 (n - 1) / n of the message for an all-reduce,
    (n - 1) / n for all-gather, reduce-scatter and all-to-all, all of it for broadcast and send.
    """

    op: str
    """One of `COLLECTIVES`."""
    by: str
    """What carries it, as `--collective` names it: `nccl`, `shared_memory`, `gloo`."""
    graph: bool
    """Whether it was timed inside a replayed graph."""
    a_s: float
    b_s: float
    b1_bytes_per_s: float
    c_s: float
    d_s: float
    b2_bytes_per_s: float
    smallest_bytes: int
    """Messages from here ..."""
    largest_bytes: int
    """... to here were timed; beyond is extrapolation."""
    error: float
    """Mean absolute relative error of the fit over the timed messages."""
    points: Mapping[int, float] = field(default_factory=dict)
    """Message bytes -> seconds, as timed."""

    def seconds(self, sent_bytes: float, num_ranks: int) -> float:
        """Least time with no rank late."""
        peers = num_ranks - 1
        return min(
            self.a_s + self.b_s * peers + sent_bytes / self.b1_bytes_per_s,
            self.c_s + self.d_s * peers + sent_bytes / self.b2_bytes_per_s,
        )

    def latency_s(self, num_ranks: int) -> float:
        """Least time of a small one."""
        return self.seconds(0.0, num_ranks)

    @property
    def bytes_per_s(self) -> float:
        """Bus bandwidth of a large one."""
        return max(self.b1_bytes_per_s, self.b2_bytes_per_s)


@dataclass(frozen=True, slots=True)
class GroupMeasurement:
    """What the ranks on these places reach together."""

    places: tuple[tuple[str, str], ...]
    """(host, device) in rank order."""
    collectives: tuple[CollectiveFit, ...]
    ops: tuple[OpTime, ...] = ()
    """Collectives as they run in steps of the runtime, without what a rank waited for others; where
    `collectives` are each alone in a loop."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One probe of one machine."""

    topology: str
    """`name` of the topology it belongs to."""
    date: str
    """ISO 8601, `2026-11-25T19:00:00Z`."""
    driver: str | None = None
    """Version of the GPU driver; None without one."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of packages and libraries: tpinfer, torch, cuda, nccl."""
    devices: tuple[DeviceMeasurement, ...] = ()
    groups: tuple[GroupMeasurement, ...] = ()

    def computed_in(self) -> DType | None:
        """What the runtime computed in when its ops were measured; None where none were, or in
        several."""
        found = {op.dtype for device in self.devices for op in device.ops}
        return found.pop() if len(found) == 1 else None

    def device(self, host: str, device: str, num_sharing: int = 1) -> DeviceMeasurement | None:
        """What is known of a device: of several, that with the nearest number of ranks sharing."""
        found = [m for m in self.devices if m.host == host and device in m.devices]
        return min(found, key=lambda m: abs(m.num_sharing - num_sharing), default=None)

    def with_newer(self, newer: "Measurement") -> "Measurement":
        """Both, and the newer where they speak of the same thing. Raises TopologyError where they
        are of two topologies."""
        if newer.topology != self.topology:
            raise TopologyError(
                f"measured on topology {newer.topology}, but the file holds measurements of "
                f"{self.topology}; name another file"
            )
        known = {(m.host, m.devices, m.num_sharing) for m in newer.devices}
        kept = [m for m in self.devices if (m.host, m.devices, m.num_sharing) not in known]
        groups = {group.places: group for group in self.groups}
        for group in newer.groups:
            timed = {(fit.op, fit.by, fit.graph) for fit in group.collectives}
            known_of = groups.get(group.places, group)
            older = [f for f in known_of.collectives if (f.op, f.by, f.graph) not in timed]
            fits = (*older, *group.collectives) if known_of is not group else group.collectives
            groups[group.places] = replace(group, collectives=fits, ops=group.ops or known_of.ops)
        return replace(
            newer,
            devices=(*kept, *newer.devices),
            groups=tuple(groups.values()),
        )

    def collective(
        self,
        places: tuple[tuple[str, str], ...],
        op: str = "all_reduce",
        by: str | None = None,
        graph: bool | None = None,
    ) -> CollectiveFit | None:
        """The collective of a group over the same places in any order.

        None for `by` or `graph` takes any, the one with the least time of a 64 KiB message first.
        """
        fits = [
            fit
            for group in self.groups
            if set(group.places) == set(places)
            for fit in group.collectives
            if fit.op == op and by in (None, fit.by) and graph in (None, fit.graph)
        ]
        return min(fits, key=lambda fit: fit.seconds(1 << 16, len(places)), default=None)
