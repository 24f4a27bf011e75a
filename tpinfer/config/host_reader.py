"""What a topology file says about one host: processors, GPUs, links, network cards, ceilings."""

from dataclasses import replace

from tpinfer.config.catalogue import LANE_BYTES_PER_S, Catalogue, read_generation
from tpinfer.config.ceilings import CeilingOverrides, MemoryLevel, Rates
from tpinfer.config.device_reader import read_gpus, read_origin, read_overrides
from tpinfer.config.machine_parts import Device, Host, Link, Nic
from tpinfer.config.origin import Origin
from tpinfer.config.paths import LEVELS, NVLINK_KINDS, PCIE_KINDS
from tpinfer.config.strict_yaml import Entry, Fields

DEFAULT_CPU = "cpu-avx2"
"""Catalogue entry behind a host that gives some rates of its processors but no sku."""
_HOST_KEYS = ("cpu", "gpus", "ranks", "p2p", "links", "nics", "ceilings", "shm", "clock_offset")
_CPU_KEYS = ("sku", "arch", "vendor", "model", "numa", "sockets", "cores", "mem", "mem_bw")
_LINK_KEYS = ("kind", "via", "ids", "between", "bw", "latency", "per_peer", "attainable")


def read_host(entry: Entry, catalogue: Catalogue) -> Host:
    """A host, still without a name. Raises TopologyError naming file and line."""
    fields = entry.fields(*_HOST_KEYS, "from")
    origin = read_origin(fields)
    cpu_entry = fields.get("cpu")
    cpu = cpu_entry.fields(*_CPU_KEYS) if cpu_entry else Fields(entry, {})
    devices = _devices(fields, cpu, catalogue, origin)
    links, nics, p2p = (fields.get(key) for key in ("links", "nics", "p2p"))
    host = _processors(cpu, replace(Host("", devices), origin=origin))
    shm, offset = fields.get("shm"), fields.get("clock_offset")
    return replace(
        host,
        links=tuple(_link(item, host, catalogue) for item in links.sequence()) if links else (),
        nics=tuple(n for item in nics.items() for n in _nics(item, host)) if nics else (),
        shared_memory_bytes=shm.size() if shm else None,
        clock_offset_s=offset.signed_time() if offset else None,
        p2p=p2p.choice("auto", "true", "false", *LEVELS) if p2p else "auto",
        staged=catalogue.staged,
    )


def _processors(cpu: Fields, host: Host) -> Host:
    """`host` with what `cpu:` says."""
    cores, numa, sockets = (cpu.get(key) for key in ("cores", "numa", "sockets"))
    vendor, model, arch = (cpu.get(key) for key in ("vendor", "model", "arch"))
    mem, mem_bw = cpu.get("mem"), cpu.get("mem_bw")
    nodes = _node_cores(numa) if numa and not numa.is_scalar else ()
    num_cores = cores.count() if cores else sum(map(len, nodes)) or None
    if cores and nodes and num_cores != sum(map(len, nodes)):
        raise cores.error(f"is {num_cores}, but numa lists {sum(map(len, nodes))}; make them agree")
    num_numa = len(nodes) or (numa.count() if numa else 1)
    for device in host.devices:
        if device.numa is not None and numa and device.numa >= num_numa:
            raise numa.error(
                f"counts {num_numa} nodes, but device {device.id} is on node {device.numa}; "
                "nodes count from 0"
            )
    return replace(
        host,
        num_cores=num_cores,
        num_numa=num_numa,
        numa_cores=nodes,
        num_sockets=sockets.count() if sockets else 1,
        memory_bytes=mem.size() if mem else None,
        memory_bytes_per_s=mem_bw.rate() if mem_bw else None,
        cpu_vendor=vendor.choice("intel", "amd", "arm", "nvidia") if vendor else None,
        cpu_model=model.text() if model else None,
        cpu_arch=arch.choice("x86_64", "aarch64") if arch else None,
    )


def _node_cores(entry: Entry) -> tuple[tuple[int, ...], ...]:
    """`{0: 0..15, 1: 16..31}`: cores of each node, nodes in rising order from 0."""
    nodes: list[tuple[int, ...]] = []
    for key, value in entry.pairs():
        if key.count(least=0) != len(nodes):
            raise key.error(f"is out of order; node {len(nodes)} comes here")
        cores = value.ids()
        if not all(core.isdecimal() for core in cores):
            raise value.error("must be core numbers, like 0..15")
        taken = {core for node in nodes for core in node}
        if taken & set(map(int, cores)):
            raise value.error("names a core of another node; list each core once")
        nodes.append(tuple(map(int, cores)))
    if not nodes:
        raise entry.error("is empty; give a number of nodes, or the cores of each")
    return tuple(nodes)


def _devices(
    fields: Fields, cpu: Fields, catalogue: Catalogue, origin: Origin
) -> tuple[Device, ...]:
    gpus, ranks = fields.get("gpus"), fields.get("ranks")
    overrides, supposed = read_overrides(fields.get("ceilings"))
    if gpus is None:
        rates = _cpu_rates(cpu, "ceilings" in fields, catalogue, origin)
        count = ranks.count() if ranks else 1
        one = Device(
            "", "cpu", rates=rates, overrides=overrides, set_overrides=supposed, origin=origin
        )
        return tuple(replace(one, id=str(i)) for i in range(count))
    if ranks is not None:
        raise ranks.error("counts CPU ranks; leave it out on a host with gpus")
    return tuple(_over(device, overrides, supposed) for device in read_gpus(gpus, catalogue))


def _over(device: Device, overrides: CeilingOverrides, supposed: CeilingOverrides) -> Device:
    """A device's own `ceilings:` go before its host's."""
    return replace(
        device,
        overrides=device.overrides.on_top_of(overrides),
        set_overrides=device.set_overrides.on_top_of(supposed),
    )


def _cpu_rates(
    cpu: Fields, has_ceilings: bool, catalogue: Catalogue, origin: Origin
) -> Rates | None:
    """Rates of all cores; None where the file gives neither sku, memory rate nor ceilings: then the
    start-up measurement is used."""
    sku, cores, mem, mem_bw = (cpu.get(key) for key in ("sku", "cores", "mem", "mem_bw"))
    sockets = cpu.get("sockets")
    if sku is None and mem_bw is None and not has_ceilings:
        return None
    name = sku.choice(*catalogue.cpus) if sku else DEFAULT_CPU
    rates = catalogue.cpus[name].rates(
        cores.count() if cores else None, sockets.count() if sockets else 1
    )
    *caches, dram = rates.memory
    dram = MemoryLevel(
        dram.name,
        mem.size() if mem else dram.capacity_bytes,
        mem_bw.rate() if mem_bw else dram.bytes_per_s,
    )
    stated = {"memory.DRAM.capacity": mem, "memory.DRAM.rate": mem_bw}
    origins = {
        key: Origin.ASSUMED if value.is_set else origin for key, value in stated.items() if value
    }
    return replace(rates, memory=(*caches, dram), origins={**rates.origins, **origins})


def _link(entry: Entry, host: Host, catalogue: Catalogue) -> Link:
    fields = entry.fields(*_LINK_KEYS, "gen", "width", "from")
    if ("ids" in fields) == ("between" in fields):
        raise entry.error("needs either ids (all pairs) or between (two or more groups)")
    kind = fields.need("kind").choice(*(k for k in catalogue.links if k != "NET"))
    if host.computes_on_cpu and kind in LEVELS:
        raise fields.need("kind").error(f"is {kind}, a path between GPUs; CPU ranks use SHM, GLOO")
    traits = catalogue.links[kind]
    via, between = fields.get("via"), fields.get("between")
    sides = between.sequence() if between else [fields.need("ids")]
    if between and len(sides) < 2:
        raise between.error("needs two groups or more, like [0..3, 4..7]")
    latency, per_peer, share = (fields.get(key) for key in ("latency", "per_peer", "attainable"))
    default, default_origin = _default_rate(kind, host, catalogue)
    wire = fields.get("bw") or (fields.get("gen") if "width" in fields else None)
    stated = {"bw": wire, "latency": latency, "attainable": share}
    defaults = {"bw": default_origin, "latency": traits.origin, "attainable": traits.origin}
    origin = read_origin(fields)
    ids = tuple(device.id for device in host.devices)
    members = tuple(_device_ids(side, ids) for side in sides)
    if len({name for side in members for name in side}) != sum(map(len, members)):
        raise entry.error("names a device on two sides of `between`; put it on one")
    return Link(
        kind=kind,
        bytes_per_s=_wire_rate(fields, default),
        attainable=_share(share) if share else traits.attainable,
        latency_s=latency.time() if latency else traits.latency_s,
        per_peer_s=per_peer.time(zero=True) if per_peer else traits.per_peer_s,
        sides=members,
        via=via.text() if via else None,
        origins={
            key: defaults[key] if value is None else Origin.ASSUMED if value.is_set else origin
            for key, value in stated.items()
        },
    )


def _default_rate(kind: str, host: Host, catalogue: Catalogue) -> tuple[float | None, Origin]:
    """What a link of this kind carries where the file leaves it out: what the card's ports do."""
    traits = catalogue.links[kind]
    card = catalogue.cards.get(host.devices[0].sku or "")
    if card and kind in NVLINK_KINDS and kind != "NVB":
        return card.port_bytes_per_s.get(kind), Origin.SPEC
    if card and kind in PCIE_KINDS:
        return card.pcie_bytes_per_s, Origin.ASSUMED
    return traits.bytes_per_s, Origin.ASSUMED


def _share(entry: Entry) -> float:
    """A share of a rate, above 0 and at most 1."""
    if (share := entry.ratio()) > 1:
        raise entry.error(f"is {share:g}; what is attainable is at most 1 of the rate")
    return share


def _wire_rate(fields: Fields, default: float | None) -> float:
    """`bw`, or what `gen` and `width` say of the PCIe wire, or the kind's `default`.

    Where both are given, no more than the wire carries one way.
    """
    generation, width = fields.get("gen"), fields.get("width")
    most = None
    if generation and width:
        most = LANE_BYTES_PER_S[read_generation(generation)] * width.count()
    if "bw" not in fields and (most or default) is not None:
        return most or default or 0.0
    rate = fields.need("bw").rate()
    if most and rate > most * 1.01:
        raise fields.need("bw").error(
            f"is above the {most / 1e9:g} GB/s of its PCIe wire; give one direction, or write "
            "`bidir` after a rate that counts both"
        )
    return rate


def _device_ids(entry: Entry, ids: tuple[str, ...]) -> tuple[str, ...]:
    """Devices by id, or by place where ids are UUIDs."""
    found: list[str] = []
    for name in entry.ids():
        if name not in ids and (not name.isdigit() or int(name) >= len(ids)):
            raise entry.error(f"names device {name!r}; this host has {', '.join(ids)}")
        found.append(name if name in ids else ids[int(name)])
    return tuple(found)


def _nics(entry: Entry, host: Host) -> list[Nic]:
    """One entry of `nics`; `near` and `rail` run along a range of names."""
    fields = entry.fields("name", "near", "bw", "rdma", "rail", "from")
    ids = tuple(device.id for device in host.devices)
    origin = read_origin(fields)
    names = fields.need("name").ids()
    near, rail, rdma = (fields.get(key) for key in ("near", "rail", "rdma"))
    nearby = _device_ids(near, ids) if near else (None,)
    rails = rail.ids() if rail else (None,)
    for given, found in ((near, nearby), (rail, rails)):
        if given and len(found) not in (1, len(names)):
            raise given.error(f"has {len(found)} entries for {len(names)} cards; give 1 or as many")
    return [
        Nic(
            name=name,
            bytes_per_s=fields.need("bw").rate(),
            near=nearby[i % len(nearby)],
            rdma=rdma.flag() if rdma else False,
            rail=rails[i % len(rails)],
            origin=origin,
        )
        for i, name in enumerate(names)
    ]
