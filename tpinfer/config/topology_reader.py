"""From a topology YAML file to a `Topology`. Unknown keys, bare rates and unknown ids are errors.

The file's numbers go before the catalogue's. `config.host_reader` reads what is inside a host.
"""

from dataclasses import replace
from pathlib import Path

from tpinfer.config.catalogue import (
    CATALOGUE_FILE,
    Catalogue,
    read_catalogue,
    shipped_directory,
)
from tpinfer.config.errors import TopologyError
from tpinfer.config.host_reader import read_host
from tpinfer.config.strict_yaml import Entry, Fields, parse_yaml, read_text
from tpinfer.config.topology import Fabric, Host, Link, Placement, Topology

_AXES = ("dp", "pp", "tp")


def load_topology(path_or_name: str | Path) -> Topology:
    """The topology in a file, or a shipped one by name (`dgx-h100`).

    Raises TopologyError naming file, line, key and remedy.
    """
    path = Path(path_or_name)
    name = str(path_or_name).removesuffix(".yaml")
    if not path.is_file():
        if name not in shipped_topologies():
            raise TopologyError(
                f"topology {path_or_name} is neither a file nor shipped; shipped are "
                f"{', '.join(shipped_topologies())}"
            )
        path = shipped_directory() / f"{name}.yaml"
    return parse_topology(read_text(path), path.name)


def shipped_topologies() -> tuple[str, ...]:
    """Names that `load_topology` knows without a file."""
    files = sorted(path.name for path in shipped_directory().glob("*.yaml"))
    return tuple(name.removesuffix(".yaml") for name in files if name != CATALOGUE_FILE)


def parse_topology(text: str, file: str) -> Topology:
    """The topology in YAML `text`; `file` names it in errors and origins. Raises TopologyError."""
    fields = parse_yaml(text, file).fields(
        "version", "name", "hosts", "fabric", "placement", "cost"
    )
    fields.need("version").choice("1")
    catalogue = read_catalogue()
    hosts = _hosts(fields.need("hosts"), catalogue)
    fabric, placement, cost = (fields.get(key) for key in ("fabric", "placement", "cost"))
    price = cost.fields("per_gpu_hour").need("per_gpu_hour").price() if cost else None
    topology = Topology(
        name=fields.need("name").text(),
        file=file,
        hosts=hosts,
        fabric=tuple(_fabric(e, hosts, catalogue) for e in fabric.sequence()) if fabric else (),
        placement=_placement(placement.fields(*_PLACEMENT_KEYS), hosts) if placement else None,
        usd_per_gpu_hour=price,
    )
    _check_ceilings(topology)
    return topology


def _check_ceilings(topology: Topology) -> None:
    """Derive every ceiling once, so that what is missing shows when the file is read."""
    for host in topology.hosts:
        for device in host.devices:
            topology.ceilings_of(host.name, device.id, num_ranks=1)
    if topology.placement:
        for host_name, device_id in topology.groups()[0]:
            topology.ceilings_of(host_name, device_id)


def _hosts(entry: Entry, catalogue: Catalogue) -> tuple[Host, ...]:
    hosts: list[Host] = []
    for key, value in entry.pairs():
        host = read_host(value, catalogue)
        for name in key.ids():
            if any(known.name == name for known in hosts):
                raise key.error(f"names host {name} again; keep ranges apart")
            hosts.append(replace(host, name=name))
    if not hosts:
        raise entry.error("is empty; describe at least one host")
    return tuple(hosts)


def _fabric(entry: Entry, hosts: tuple[Host, ...], catalogue: Catalogue) -> Fabric:
    fields = entry.fields("kind", "type", "rails", "hosts", "bw", "latency", "oversub")
    joined = fields.need("hosts")
    names = [host.name for host in hosts]
    for name in joined.ids():
        if name not in names:
            raise joined.error(f"names {name!r}; hosts are {', '.join(names)}")
    traits = catalogue.links["NET"]
    latency, rails, oversub = (fields.get(key) for key in ("latency", "rails", "oversub"))
    ratio = oversub.ratio() if oversub else 1.0
    link = Link(
        kind=fields.need("kind").choice("NET"),
        bytes_per_s=fields.need("bw").rate(),
        attainable=traits.attainable / ratio,
        latency_s=latency.time() if latency else traits.latency_s,
        per_peer_s=traits.per_peer_s,
        sides=(joined.ids(),),
    )
    kind = fields.need("type").choice("ib", "roce", "tcp")
    return Fabric(link, kind, rails.count() if rails else 1, ratio)


_PLACEMENT_KEYS = (*_AXES, "order", "ranks", "shares")


def _placement(fields: Fields, hosts: tuple[Host, ...]) -> Placement:
    entries = {axis: fields.get(axis) for axis in _AXES}
    counts = {axis: entry.count() if entry else 1 for axis, entry in entries.items()}
    num_ranks = counts["tp"] * counts["pp"] * counts["dp"]
    num_devices = sum(len(host.devices) for host in hosts)
    if num_ranks > num_devices:
        raise fields.entry.error(
            f"asks for {num_ranks} ranks, but there are {num_devices} devices; lower tp, pp or dp"
        )
    order, shares = fields.get("order"), fields.get("shares")
    if order and sorted(order.ids()) != sorted(_AXES):
        raise order.error(f"must name {', '.join(_AXES)} once each")
    ratios = tuple(share.ratio() for share in shares.sequence()) if shares else None
    if shares and ratios and len(ratios) != counts["tp"]:
        raise shares.error(f"has {len(ratios)} parts for tp: {counts['tp']}; give one per rank")
    return Placement(
        **counts,
        order=order.ids() if order else _AXES,
        groups=_groups(fields, counts, hosts),
        shares=ratios,
    )


def _groups(
    fields: Fields, counts: dict[str, int], hosts: tuple[Host, ...]
) -> tuple[tuple[tuple[str, str], ...], ...]:
    """`ranks`: per tensor-parallel group a list of `host/device` or `host/first..last`."""
    ranks = fields.get("ranks")
    if ranks is None:
        return ()
    known = {(host.name, device.id) for host in hosts for device in host.devices}
    groups: list[tuple[tuple[str, str], ...]] = []
    for entry in ranks.sequence():
        group = tuple((name, device) for name, _, device in (i.partition("/") for i in entry.ids()))
        for place in group:
            if place not in known:
                raise entry.error(f"names {'/'.join(place)!r}; write host/device, like h0/0..7")
        if len(group) != counts["tp"]:
            raise entry.error(f"places {len(group)} ranks for tp: {counts['tp']}; make them agree")
        known -= set(group)
        groups.append(group)
    if len(groups) != counts["pp"] * counts["dp"]:
        raise ranks.error(f"has {len(groups)} groups; pp * dp is {counts['pp'] * counts['dp']}")
    return tuple(groups)
