"""From a topology YAML file to a `Topology`. Unknown keys, bare rates and unknown ids are errors.

The file's numbers go before the catalogue's. `config.host_reader` reads what is inside a host.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tpinfer.config.catalogue import (
    CATALOGUE_FILE,
    Catalogue,
    read_catalogue,
    shipped_directory,
)
from tpinfer.config.device_reader import read_origin
from tpinfer.config.errors import TopologyError
from tpinfer.config.host_reader import read_host
from tpinfer.config.machine_parts import Fabric, Host, Link, Place
from tpinfer.config.measured import Measurement
from tpinfer.config.measured_yaml import measured_path, read_measured
from tpinfer.config.origin import Origin
from tpinfer.config.strict_yaml import Entry, Fields, parse_yaml, read_text
from tpinfer.config.topology import Placement, Topology
from tpinfer.config.topology_set import with_settings

_AXES = ("dp", "pp", "tp")
_FILE_KEYS = ("version", "name", "hosts", "fabric", "placement", "cost", "discovered")


def load_topology(path_or_name: str | Path, settings: Sequence[str] = ()) -> Topology:
    """The topology in a file, or a shipped one by name (`dgx-h100`), in three layers: the file,
    below `x.measured.yaml` beside it, below `settings` (`PATH=VALUE`, see `config.topology_set`).

    Raises TopologyError naming file, line, key and remedy.
    """
    path = topology_path(path_or_name)
    beside = measured_path(path)
    measured = read_measured(beside) if beside.is_file() else None
    return parse_topology(read_text(path), path.name, measured, settings)


def topology_path(path_or_name: str | Path) -> Path:
    """The file itself, or that of a shipped topology. Raises TopologyError for neither."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    name = str(path_or_name).removesuffix(".yaml")
    if name not in shipped_topologies():
        raise TopologyError(
            f"topology {path_or_name} is neither a file nor shipped; shipped are "
            f"{', '.join(shipped_topologies())}"
        )
    return shipped_directory() / f"{name}.yaml"


def shipped_topologies() -> tuple[str, ...]:
    """Names that `load_topology` knows without a file."""
    files = sorted(path.name for path in shipped_directory().glob("*.yaml"))
    return tuple(
        name.removesuffix(".yaml")
        for name in files
        if name != CATALOGUE_FILE and not name.endswith(".measured.yaml")
    )


def parse_topology(
    text: str, file: str, measured: Measurement | None = None, settings: Sequence[str] = ()
) -> Topology:
    """The topology in YAML `text`, below `measured`, below `settings`; `file` names it in errors
    and origins. Raises TopologyError."""
    document, set_paths = with_settings(parse_yaml(text, file), settings)
    fields = document.fields(*_FILE_KEYS)
    fields.need("version").choice("1")
    catalogue = read_catalogue()
    hosts = _hosts(fields.need("hosts"), catalogue)
    fabric, placement, cost = (fields.get(key) for key in ("fabric", "placement", "cost"))
    for _, remark in fields.need("discovered").pairs() if "discovered" in fields else ():
        remark.text()
    topology = Topology(
        name=fields.need("name").text(),
        file=file,
        hosts=hosts,
        fabric=tuple(_fabric(e, hosts, catalogue) for e in fabric.sequence()) if fabric else (),
        placement=_placement(placement.fields(*_PLACEMENT_KEYS), hosts) if placement else None,
        usd_per_gpu_hour=_price(cost) if cost else None,
        set_paths=set_paths,
    )
    _check_ceilings(topology, placement, fields.need("hosts"))
    if any(_is_of_paths(path) for path in set_paths):
        topology = replace(topology, as_written=parse_topology(text, file))
    topology = with_measurement(topology, measured) if measured else topology
    if topology.placement is None or not topology.placement.by_rates:
        return topology
    shares = topology.rate_shares()
    return replace(topology, placement=replace(topology.placement, shares=shares))


def _is_of_paths(set_path: str) -> bool:
    """Whether a value of `--set` says how devices are joined."""
    return ".links" in set_path or ".p2p" in set_path or set_path.startswith("fabric")


def with_measurement(topology: Topology, measured: Measurement) -> Topology:
    """`topology` below what was measured on it.

    Raises TopologyError for a measurement of another machine: names of hosts and devices differ.
    """
    origin = f"the measurement of {measured.date} beside {topology.file}"
    if measured.topology != topology.name:
        raise TopologyError(
            f"{origin} is of {measured.topology!r}, not {topology.name!r}; measure again with "
            "`tpinfer topo probe`, or remove it"
        )
    places = [(device.host, name) for device in measured.devices for name in device.devices]
    places += [place for group in measured.groups for place in group.places]
    for host, device in places:
        try:
            topology.host(host).device(device)
        except TopologyError as error:
            raise TopologyError(f"{origin} does not fit: {error}; measure again") from None
    return replace(topology, measured=measured)


def _price(entry: Entry) -> float:
    """`cost: {per_gpu_hour: 3.99USD}`, or `per_device_hour`."""
    fields = entry.fields("per_gpu_hour", "per_device_hour")
    if len(given := [k for k in ("per_gpu_hour", "per_device_hour") if k in fields]) != 1:
        raise entry.error("needs per_device_hour (or per_gpu_hour), once")
    return fields.need(given[0]).price()


def _check_ceilings(topology: Topology, placement: Entry | None, hosts: Entry) -> None:
    """Derive every ceiling once, so that what is missing shows when the file is read."""
    try:
        for host in topology.hosts:
            for device in host.devices:
                topology.ceilings_of(host.name, device.id, num_ranks=1)
    except TopologyError as error:
        raise hosts.error(f"is incomplete: {_without(topology.file, error)}") from None
    if placement is None or topology.placement is None:
        return
    try:
        groups = topology.groups()[: topology.placement.pp * topology.placement.dp]
        for group in groups:
            topology.ceilings_of(*group[0])
        for first, second in _next_stages(groups, topology.placement):
            topology.path(first[0], second[0])
    except TopologyError as error:
        raise placement.error(f"cannot run: {_without(topology.file, error)}") from None


def _next_stages(
    groups: tuple[tuple[Place, ...], ...], placement: Placement
) -> list[tuple[tuple[Place, ...], tuple[Place, ...]]]:
    """Pairs of groups that send to each other as neighbouring pipeline stages."""
    pp, dp = placement.pp, placement.dp
    pp_is_inner = placement.order.index("pp") > placement.order.index("dp")
    step = 1 if pp_is_inner else dp
    starts = [d * pp + p if pp_is_inner else p * dp + d for d in range(dp) for p in range(pp - 1)]
    return [(groups[i], groups[i + step]) for i in starts]


def _without(file: str, error: TopologyError) -> str:
    return str(error).removeprefix(f"{file}: ")


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
    fields = entry.fields("kind", "type", "rails", "hosts", "bw", "latency", "oversub", "from")
    origin = read_origin(fields)
    joined = fields.need("hosts")
    names = [host.name for host in hosts]
    for name in joined.ids():
        if name not in names:
            raise joined.error(f"names {name!r}; hosts are {', '.join(names)}")
    traits = catalogue.links["NET"]
    latency, rails, oversub = (fields.get(key) for key in ("latency", "rails", "oversub"))
    bw = fields.need("bw")
    ratio = oversub.ratio() if oversub else 1.0
    link = Link(
        kind=fields.need("kind").choice("NET"),
        bytes_per_s=bw.rate(),
        attainable=traits.attainable / ratio,
        latency_s=latency.time() if latency else traits.latency_s,
        per_peer_s=traits.per_peer_s,
        sides=(joined.ids(),),
        origins={
            "bw": Origin.ASSUMED if bw.is_set else origin,
            "latency": origin if latency else traits.origin,
            "attainable": traits.origin,
        },
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
    by_rates = shares is not None and shares.is_scalar and shares.choice("auto") == "auto"
    ratios = None
    if shares and not by_rates:
        ratios = tuple(share.ratio() for share in shares.sequence())
    if shares and ratios and len(ratios) != counts["tp"]:
        raise shares.error(f"has {len(ratios)} parts for tp: {counts['tp']}; give one per rank")
    return Placement(
        **counts,
        order=order.ids() if order else _AXES,
        groups=_groups(fields, counts, hosts),
        shares=ratios,
        by_rates=by_rates,
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
