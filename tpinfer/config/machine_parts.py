"""What a host is made of: devices, links, network cards. Rates are in one direction, per device."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tpinfer.config.catalogue import LinkTraits
from tpinfer.config.ceilings import CeilingOverrides, Rates
from tpinfer.config.errors import TopologyError
from tpinfer.config.origin import Origin

Place = tuple[str, str]
"""(host name, device id)."""


@dataclass(frozen=True, slots=True)
class Link:
    """A path between members: all pairs of one side, or pairs across several sides."""

    kind: str
    """`NVL NVB C2C PIX PXB PHB SYS NET` as NCCL names paths, `SHM` or `GLOO`."""
    bytes_per_s: float
    """As written: the wire's rate."""
    attainable: float
    """Share of it that a large all-reduce reaches as bus bandwidth."""
    latency_s: float
    """Least time of a small all-reduce, without what peers add."""
    per_peer_s: float
    """What each rank beyond the first adds to that."""
    sides: tuple[tuple[str, ...], ...]
    """Ids of devices; of hosts where the link is a fabric's."""
    via: str | None = None
    """What the path runs through, such as `nvswitch`."""
    instead_of: str | None = None
    """Kind of the wire that leads there but may not be used for peer-to-peer copies."""
    origins: Mapping[str, Origin] = field(default_factory=dict, compare=False)
    """Of `bw`, `latency` and `attainable`."""

    def joins(self, first: str, second: str) -> bool:
        """Whether this path leads from `first` to `second`."""
        a, b = ([i for i, side in enumerate(self.sides) if m in side] for m in (first, second))
        return bool(a and b) and (len(self.sides) == 1 or a != b)


@dataclass(frozen=True, slots=True)
class Nic:
    """A network card."""

    name: str
    bytes_per_s: float
    near: str | None = None
    """Device it shares a PCIe switch with."""
    rdma: bool = False
    rail: str | None = None
    """Plane of the fabric it is plugged into."""
    origin: Origin = field(default=Origin.SPEC, compare=False)


@dataclass(frozen=True, slots=True)
class Fabric:
    """A network between hosts."""

    link: Link
    """Its sides name hosts."""
    type: str
    """`ib`, `roce`, `tcp`."""
    rails: int = 1
    oversub: float = 1.0
    """Ratio by which the core falls short of the edge."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where one rank computes: a GPU, a MIG slice of one, or a rank's share of a host's cores."""

    id: str
    """Index or UUID, as text."""
    kind: str
    """`gpu` or `cpu`."""
    sku: str | None = None
    numa: int | None = None
    mig: str | None = None
    """MIG profile such as `3g.71gb`."""
    parent: str | None = None
    """Id of the card that a MIG slice belongs to."""
    rates: Rates | None = None
    """Of the device; for `cpu` of the whole host. None where the file says nothing of them."""
    overrides: CeilingOverrides = field(default_factory=CeilingOverrides)
    """What the file says under `ceilings`; a measurement goes before it."""
    set_overrides: CeilingOverrides = field(default_factory=CeilingOverrides)
    """What `--set` says there; goes before a measurement."""
    pcie_bytes_per_s: float | None = None
    """Its PCIe wire in one direction."""
    copies_to_peers: bool = True
    """Whether its driver offers peer-to-peer copies over PCIe."""
    usd_per_hour: float | None = None
    """What the catalogue knows of its price."""
    origin: Origin = field(default=Origin.SPEC, compare=False)
    """Who says that it is there."""


@dataclass(frozen=True, slots=True)
class Host:
    """One machine. Its devices are GPUs, or shares of its cores, never both."""

    name: str
    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()
    nics: tuple[Nic, ...] = ()
    num_cores: int | None = None
    num_numa: int = 1
    numa_cores: tuple[tuple[int, ...], ...] = ()
    """Cores of each memory node, where the file lists them."""
    num_sockets: int = 1
    memory_bytes: int | None = None
    memory_bytes_per_s: float | None = None
    """What all cores together read, as stated."""
    shared_memory_bytes: int | None = None
    """Size of /dev/shm."""
    clock_offset_s: float | None = None
    """This host's clock minus the first host's."""
    cpu_vendor: str | None = None
    cpu_model: str | None = None
    cpu_arch: str | None = None
    p2p: str = "auto"
    """Peer-to-peer copies between GPUs: `true`, `false`, `auto` for NCCL's rule, or the farthest
    kind of path that may be used for them (NCCL_P2P_LEVEL)."""
    staged: LinkTraits | None = None
    """What a path through the host's memory does, where devices may not copy to each other."""
    origin: Origin = field(default=Origin.SPEC, compare=False)

    @property
    def computes_on_cpu(self) -> bool:
        """Whether ranks share the cores; then any number of ranks fits the host."""
        return self.devices[0].kind == "cpu"

    def device(self, name: str | int) -> Device:
        """The device of that id or, for an int, at that place. Raises TopologyError."""
        if self.computes_on_cpu and str(name).isdigit():
            return self.devices[0]
        ids = [device.id for device in self.devices]
        if isinstance(name, int) and 0 <= name < len(ids):
            return self.devices[name]
        if name in ids:
            return self.devices[ids.index(str(name))]
        raise TopologyError(f"device {name!r} is not on host {self.name}; it has {', '.join(ids)}")
