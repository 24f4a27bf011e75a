"""What a machine is made of: hosts, devices, links, fabric, placement; and its ceilings.

Rates are in one direction, per device. `config.topology_reader` makes a `Topology` from a file.
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations

from tpinfer.config.backend_links import LINK_KINDS, scaled_fit
from tpinfer.config.ceilings import CeilingOverrides, Ceilings, Rates, slice_ceilings
from tpinfer.config.errors import TopologyError
from tpinfer.config.machine_parts import Device, Fabric, Host, Link, Nic, Place
from tpinfer.config.measured import CollectiveFit, GroupMeasurement, Measurement, OpTime
from tpinfer.config.origin import Origin
from tpinfer.config.paths import distance, paths_within

__all__ = ["Device", "Fabric", "Host", "Link", "Nic", "Place", "Placement", "Topology"]

_ALIKE = 1.02
"""Devices whose rates differ by less are equal: a cut along whole heads is coarser."""


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
    by_rates: bool = False
    """Whether the shares are those of the ranks' memory rates (`shares: auto` in the file)."""


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
    measured: Measurement | None = None
    """What a probe found; goes before the file's numbers, but not before those of `--set`."""
    set_paths: tuple[str, ...] = ()
    """Values that `--set` has changed, such as `hosts.box.links.0.bw`."""
    as_written: "Topology | None" = None
    """The same without `--set`, where a link was changed by it: what was measured holds for it."""

    @property
    def tp(self) -> int | None:
        """Tensor-parallel ranks the file asks for."""
        return self.placement.tp if self.placement else None

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Part of the work per tensor-parallel rank, where the file gives one."""
        return self.placement.shares if self.placement else None

    def rate_shares(self) -> tuple[float, ...] | None:
        """The memory rate of each rank's device, in bytes/s: a decode step reads weights and cache
        for most of its time, so ranks end it together where each holds what its memory can read.
        None where rates are within 2 % of each other. Raises TopologyError for a device without.
        """
        rates = []
        for rank in range(self.tp or 1):
            ceilings = self.ceilings_of_rank(rank)
            if ceilings is None:
                raise TopologyError(
                    f"{self.file}: shares: auto needs the rates of rank {rank}'s device; name its "
                    "sku, give ceilings, or write the shares"
                )
            rates.append(ceilings.memory[-1].bytes_per_s)
        return None if max(rates) <= _ALIKE * min(rates) else tuple(rates)

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

        Devices left over form no group. Where the file places that many, groups follow its `order`.
        Raises TopologyError for more ranks than devices.
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
        if self.placement and num_ranks == self.tp and self.placement.order[-1] != "tp":
            return _in_order(places, self.placement)
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
        rates = member.rates
        if rates is None and self.measured and self.measured.device(home.name, member.id):
            rates = Rates((), {}, 0.0, "measured alone")
        if rates is None:
            return None
        place = (home.name, str(device) if home.computes_on_cpu else member.id)
        groups = self.groups(num_ranks)
        group = next((g for g in groups if place in g), (place,))
        num_sharing = self.num_sharing(home, groups)
        overrides = self._overrides(home, member, num_sharing)
        if not (rates.flops_per_s or overrides.flops_per_s):
            return None
        collective, origin = self._collective(group)
        return slice_ceilings(
            rates,
            overrides,
            num_sharing,
            collective,
            self.file if self.measured is None else f"{self.file}, measured {self.measured.date}",
            origin,
        )

    def num_sharing(self, host: Host, groups: tuple[tuple[Place, ...], ...]) -> int:
        """Ranks that share a device of `host`: 1 on a GPU, all that run on the host on a CPU."""
        if not host.computes_on_cpu:
            return 1
        running = groups[: self.placement.pp * self.placement.dp if self.placement else 1]
        return max(1, sum(name == host.name for group in running for name, _ in group))

    def collective_fits(
        self, group: tuple[Place, ...], op: str = "all_reduce", graph: bool | None = None
    ) -> tuple[CollectiveFit, ...]:
        """What was measured of a collective over `group`, or over one just like it - as many ranks,
        joined by the same kinds of paths - by each backend, in a replayed graph and out of one.
        Where `--set` changed the links that a backend uses, its fit is scaled like them; nothing
        is left of a measurement over paths that are no longer there.
        """
        written, alike = self.as_written or self, self._measured_like(group)
        fits = [
            fit
            for found in alike
            for fit in found.collectives
            if fit.op == op and graph in (None, fit.graph)
        ]
        if self.as_written is None:
            return tuple(fits)
        scaled = (
            scaled_fit(fit, written.links_of(group, fit.by), self.links_of(group, fit.by))
            for fit in fits
        )
        return tuple(fit for fit in scaled if fit is not None)

    def group_ops(self, group: tuple[Place, ...]) -> tuple[OpTime, ...]:
        """Collectives of `group`, or of one just like it, as they ran in steps; none where `--set`
        changed a link since."""
        if self.as_written is not None:
            return ()
        return next((found.ops for found in self._measured_like(group) if found.ops), ())

    def _measured_like(self, group: tuple[Place, ...]) -> list[GroupMeasurement]:
        """What was measured over the places of `group`; else over as many others, joined by the
        same kinds of paths."""
        if self.measured is None:
            return []
        written = self.as_written or self
        same = [g for g in self.measured.groups if set(g.places) == set(group)]
        if same or len(group) < 2:
            return same
        wanted = written._kinds(group)
        as_many = (g for g in self.measured.groups if len(g.places) == len(group))
        return [g for g in as_many if written._kinds(g.places) == wanted][:1]

    def collective_fit(
        self,
        group: tuple[Place, ...],
        op: str = "all_reduce",
        by: str | None = None,
        graph: bool | None = None,
    ) -> CollectiveFit | None:
        """Of `collective_fits` that of the backend `by`; for None the one with the least time of a
        64 KiB message. None where nothing was measured."""
        fits = [f for f in self.collective_fits(group, op, graph) if by in (None, f.by)]
        return min(fits, key=lambda fit: fit.seconds(1 << 16, len(group)), default=None)

    def is_rescaled(self, group: tuple[Place, ...], by: str) -> bool:
        """Whether `--set` has changed the paths that the backend `by` was measured over."""
        written = self.as_written
        return written is not None and written.links_of(group, by) != self.links_of(group, by)

    def links_of(self, group: tuple[Place, ...], by: str) -> tuple[Link, ...]:
        """The paths that the backend `by` uses between the ranks of a group. Of a CPU host's links
        those of its own kind; empty where the host names none of that kind."""
        home = self.host(group[0][0])
        if home.computes_on_cpu and len({host for host, _ in group}) == 1:
            return tuple(link for link in home.links if link.kind == LINK_KINDS.get(by))
        return tuple(sorted(self.paths(group), key=lambda link: (link.kind, link.sides)))

    def usd_per_device_hour(self, device: Device) -> float | None:
        """The file's price, else the catalogue's."""
        return self.usd_per_gpu_hour or device.usd_per_hour

    def ceilings_of_rank(self, rank: int, num_ranks: int | None = None) -> Ceilings | None:
        """Ceilings of tensor-parallel rank `rank` of the first group. See `ceilings_of`."""
        group = self.groups(num_ranks)[0]
        if not 0 <= rank < len(group):
            raise TopologyError(f"rank {rank} is outside the {len(group)} ranks of {self.file}")
        return self.ceilings_of(*group[rank], num_ranks=len(group))

    def path(self, first: Place, second: Place, num_gpus: int | None = None) -> Link:
        """The nearest path that may be used between two places, the fastest of these, in a group
        that has `num_gpus` GPUs on their host (None: all of them). Raises TopologyError for none.
        """
        if first[0] != second[0]:
            found = [f.link for f in self.fabric if f.link.joins(first[0], second[0])]
        else:
            found = paths_within(self.host(first[0]), first[1], second[1], num_gpus)
        if not found:
            raise TopologyError(
                f"{self.file}: nothing joins {'/'.join(first)} and {'/'.join(second)}; "
                "add a link (on one host) or a fabric (between hosts) that covers both"
            )
        return max(found, key=lambda link: (-distance(link), link.bytes_per_s * link.attainable))

    def _overrides(self, home: Host, member: Device, num_sharing: int) -> CeilingOverrides:
        """`--set` before the measurement before the file."""
        changed = any(".cpu" in path or ".gpus" in path for path in self.set_paths)
        found = None
        if self.measured and not changed:
            found = self.measured.device(home.name, member.id, num_sharing)
        if found is None:
            return member.set_overrides.on_top_of(member.overrides)
        on_top = found.overrides(num_sharing).on_top_of(member.overrides)
        return member.set_overrides.on_top_of(on_top)

    def paths(self, group: tuple[Place, ...]) -> set[Link]:
        """Paths between the pairs of a group."""
        counts = Counter(host for host, _ in group)
        return {self.path(a, b, counts[a[0]]) for a, b in combinations(group, 2)}

    def _kinds(self, group: tuple[Place, ...]) -> set[Link]:
        """Paths of a group, whatever they join."""
        return {replace(link, sides=()) for link in self.paths(group)}

    def _collective(self, group: tuple[Place, ...]) -> tuple[tuple[float, float], Origin]:
        """(latency, bus bandwidth) of the group as measured, else of its slowest pair."""
        if len(group) == 1:
            return (0.0, float("inf")), Origin.SPEC
        fit = self.collective_fit(group)
        if fit is not None:
            origin = Origin.ASSUMED if self.is_rescaled(group, fit.by) else Origin.MEASURED
            return (fit.latency_s(len(group)), fit.bytes_per_s), origin
        links = self.paths(group)
        num_peers = len(group) - 1
        slowest = min(links, key=lambda link: link.bytes_per_s * link.attainable)
        latency = max(link.latency_s + link.per_peer_s * num_peers for link in links)
        is_guess = Origin.ASSUMED in slowest.origins.values()
        origin = Origin.ASSUMED if is_guess else slowest.origins.get("bw", Origin.SPEC)
        return (latency, slowest.bytes_per_s * slowest.attainable), origin


def _in_order(places: list[Place], placement: Placement) -> tuple[tuple[Place, ...], ...]:
    """Groups where ranks of one group are not neighbours: axes of `order` count like digits."""
    sizes = {"tp": placement.tp, "pp": placement.pp, "dp": placement.dp}
    strides, stride = {}, 1
    for axis in reversed(placement.order):
        strides[axis] = stride
        stride *= sizes[axis]
    outer, inner = (axis for axis in placement.order if axis != "tp")
    return tuple(
        tuple(
            places[i * strides[outer] + j * strides[inner] + k * strides["tp"]]
            for k in range(placement.tp)
        )
        for i in range(sizes[outer])
        for j in range(sizes[inner])
    )
