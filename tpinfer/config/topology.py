"""What a machine is made of: hosts, devices, links, fabric, placement; and its ceilings.

Rates are in one direction, per device. `config.topology_reader` makes a `Topology` from a file.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations

from tpinfer.config.ceilings import CeilingOverrides, Ceilings, Rates, slice_ceilings
from tpinfer.config.errors import TopologyError

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


@dataclass(frozen=True, slots=True)
class Host:
    """One machine. Its devices are GPUs, or shares of its cores, never both."""

    name: str
    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()
    nics: tuple[Nic, ...] = ()
    num_cores: int | None = None
    num_numa: int = 1
    cpu_vendor: str | None = None
    cpu_model: str | None = None
    cpu_arch: str | None = None
    p2p: str = "auto"
    """Peer-to-peer copies between GPUs: `true`, `false`, or `auto` for NCCL's rule."""

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


@dataclass(frozen=True, slots=True)
class Placement:
    """How many ranks there are along each axis, and where."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    order: tuple[str, ...] = ("dp", "pp", "tp")
    """Axes from the slowest to the fastest changing."""
    groups: tuple[tuple[Place, ...], ...] = ()
    """Places of each tensor-parallel group in rank order; empty fills devices in file order."""
    shares: tuple[float, ...] | None = None
    """Relative part of the work per tensor-parallel rank; None cuts evenly."""


@dataclass(frozen=True, slots=True)
class Topology:
    """A machine, or several joined by a fabric."""

    name: str
    file: str
    """Name of the file it was read from; part of every origin."""
    hosts: tuple[Host, ...]
    fabric: tuple[Fabric, ...] = ()
    placement: Placement | None = None
    usd_per_gpu_hour: float | None = None

    @property
    def tp(self) -> int | None:
        """Tensor-parallel ranks the file asks for."""
        return self.placement.tp if self.placement else None

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Part of the work per tensor-parallel rank, where the file gives one."""
        return self.placement.shares if self.placement else None

    def host(self, name: str | int) -> Host:
        """The host of that name or, for an int, at that place. Raises TopologyError."""
        names = [host.name for host in self.hosts]
        if isinstance(name, int) and 0 <= name < len(names):
            return self.hosts[name]
        if name in names:
            return self.hosts[names.index(str(name))]
        raise TopologyError(f"host {name!r} is not in {self.file}; it has {', '.join(names)}")

    def groups(self, num_ranks: int | None = None) -> tuple[tuple[Place, ...], ...]:
        """Tensor-parallel groups of `num_ranks` (by default the file's own number), in rank order.

        Devices left over form no group. Raises TopologyError for more ranks than devices.
        """
        num_ranks = num_ranks or self.tp or len(self.hosts[0].devices)
        placed = self.placement.groups if self.placement else ()
        if placed and len(placed[0]) == num_ranks:
            return placed
        places = [(host.name, device.id) for host in self.hosts for device in host.devices]
        first = self.hosts[0]
        if first.computes_on_cpu and num_ranks > len(places):
            places = [(first.name, str(i)) for i in range(num_ranks)]
        if num_ranks > len(places):
            raise TopologyError(
                f"{self.file} has {len(places)} devices, {num_ranks} ranks were asked for; "
                "use fewer ranks or describe more devices"
            )
        starts = range(0, len(places) - num_ranks + 1, num_ranks)
        return tuple(tuple(places[i : i + num_ranks]) for i in starts)

    def ceilings_of(
        self, host: str | int = 0, device: str | int = 0, num_ranks: int | None = None
    ) -> Ceilings | None:
        """Ceilings of the rank on `device` of `host` (names, or places in the file) in a
        tensor-parallel group of `num_ranks`.

        None where the file says nothing of them. Raises TopologyError for an unknown host or
        device, more ranks than devices, or members of the group that nothing joins.
        """
        home = self.host(host)
        member = home.device(device)
        if member.rates is None:
            return None
        place = (home.name, str(device) if home.computes_on_cpu else member.id)
        groups = self.groups(num_ranks)
        group = next((g for g in groups if place in g), (place,))
        num_sharing = 1
        if home.computes_on_cpu:
            running = groups[: self.placement.pp * self.placement.dp if self.placement else 1]
            num_sharing = max(1, sum(name == home.name for g in running for name, _ in g))
        return slice_ceilings(
            member.rates, member.overrides, num_sharing, self._collective(group), self.file
        )

    def ceilings_of_rank(self, rank: int, num_ranks: int | None = None) -> Ceilings | None:
        """Ceilings of tensor-parallel rank `rank` of the first group. See `ceilings_of`."""
        group = self.groups(num_ranks)[0]
        if not 0 <= rank < len(group):
            raise TopologyError(f"rank {rank} is outside the {len(group)} ranks of {self.file}")
        return self.ceilings_of(*group[rank], num_ranks=len(group))

    def _collective(self, group: Iterable[Place]) -> tuple[float, float]:
        """(latency, bus bandwidth) of the slowest pair in the group."""
        members = tuple(group)
        if len(members) == 1:
            return 0.0, float("inf")
        links = {self._link(a, b) for a, b in combinations(members, 2)}
        num_peers = len(members) - 1
        return (
            max(link.latency_s + link.per_peer_s * num_peers for link in links),
            min(link.bytes_per_s * link.attainable for link in links),
        )

    def _link(self, first: Place, second: Place) -> Link:
        """The fastest path between two places."""
        if first[0] != second[0]:
            found = [f.link for f in self.fabric if f.link.joins(first[0], second[0])]
        else:
            host = self.host(first[0])
            on_cpu = host.computes_on_cpu
            found = [link for link in host.links if on_cpu or link.joins(first[1], second[1])]
        if not found:
            raise TopologyError(
                f"{self.file}: nothing joins {'/'.join(first)} and {'/'.join(second)}; "
                "add a link (on one host) or a fabric (between hosts) that covers both"
            )
        return max(found, key=lambda link: link.bytes_per_s * link.attainable)
