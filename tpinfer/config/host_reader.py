"""What a topology file says about one host: processors, GPUs, links, network cards, ceilings."""

import re
from dataclasses import replace

from tpinfer.config.catalogue import Catalogue, read_dtype
from tpinfer.config.ceilings import CeilingOverrides, MemoryLevel, Rates
from tpinfer.config.strict_yaml import Entry, Fields
from tpinfer.config.topology import Device, Host, Link, Nic

DEFAULT_CPU = "cpu-avx2"
"""Catalogue entry behind a host that gives some rates of its processors but no sku."""
_CPU_KEYS = ("sku", "arch", "vendor", "model", "numa", "cores", "mem", "mem_bw")
_MEMORY_LEVELS = ("L1", "L2", "L3", "DRAM", "HBM")
_MIG_SLICES = 7
"""Compute slices of a card that MIG profiles count in: `3g` has three."""
_LANE_BYTES_PER_S = {3: 1e9, 4: 2e9, 5: 4e9, 6: 8e9}
"""One PCIe lane in one direction, per generation."""


def read_host(entry: Entry, catalogue: Catalogue) -> Host:
    """A host, still without a name. Raises TopologyError naming file and line."""
    fields = entry.fields("cpu", "gpus", "ranks", "p2p", "links", "nics", "ceilings")
    cpu_entry = fields.get("cpu")
    cpu = cpu_entry.fields(*_CPU_KEYS) if cpu_entry else Fields(entry, {})
    devices = _devices(fields, cpu, catalogue)
    ids = tuple(device.id for device in devices)
    links, nics, p2p = (fields.get(key) for key in ("links", "nics", "p2p"))
    cores, numa = cpu.get("cores"), cpu.get("numa")
    vendor, model, arch = (cpu.get(key) for key in ("vendor", "model", "arch"))
    return Host(
        name="",
        devices=devices,
        links=tuple(_link(item, ids, catalogue) for item in links.sequence()) if links else (),
        nics=tuple(n for item in nics.items() for n in _nics(item, ids)) if nics else (),
        num_cores=cores.count() if cores else None,
        num_numa=numa.count() if numa else 1,
        cpu_vendor=vendor.choice("intel", "amd", "arm", "nvidia") if vendor else None,
        cpu_model=model.text() if model else None,
        cpu_arch=arch.choice("x86_64", "aarch64") if arch else None,
        p2p=p2p.choice("auto", "true", "false") if p2p else "auto",
    )


def _devices(fields: Fields, cpu: Fields, catalogue: Catalogue) -> tuple[Device, ...]:
    gpus, ranks = fields.get("gpus"), fields.get("ranks")
    overrides = _overrides(fields.get("ceilings"))
    if gpus is None:
        rates = _cpu_rates(cpu, "ceilings" in fields, catalogue)
        count = ranks.count() if ranks else 1
        return tuple(Device(str(i), "cpu", rates=rates, overrides=overrides) for i in range(count))
    if ranks is not None:
        raise ranks.error("counts CPU ranks; leave it out on a host with gpus")
    devices: list[Device] = []
    for item in gpus.items():
        for device in _gpus(item, catalogue):
            if any(known.id == device.id for known in devices):
                raise item.error(f"gives the id {device.id} again; ids are unique on a host")
            devices.append(replace(device, overrides=device.overrides.on_top_of(overrides)))
    if not devices:
        raise gpus.error("is empty; list a GPU or leave the key out")
    return tuple(devices)


def _cpu_rates(cpu: Fields, has_ceilings: bool, catalogue: Catalogue) -> Rates | None:
    """Rates of all cores; None where the file gives neither sku, memory rate nor ceilings: then the
    start-up measurement is used."""
    sku, cores, mem, mem_bw = (cpu.get(key) for key in ("sku", "cores", "mem", "mem_bw"))
    if sku is None and mem_bw is None and not has_ceilings:
        return None
    name = sku.choice(*catalogue.cpus) if sku else DEFAULT_CPU
    rates = catalogue.cpus[name].rates(cores.count() if cores else None)
    *caches, dram = rates.memory
    dram = MemoryLevel(
        dram.name,
        mem.size() if mem else dram.capacity_bytes,
        mem_bw.rate() if mem_bw else dram.bytes_per_s,
    )
    return replace(rates, memory=(*caches, dram))


def _gpus(entry: Entry, catalogue: Catalogue) -> list[Device]:
    """One entry of `gpus`: several alike by `ids`, or one by `uuid`."""
    fields = entry.fields("sku", "ids", "uuid", "numa", "mig", "parent", "ceilings")
    if ("ids" in fields) == ("uuid" in fields):
        raise entry.error("needs either ids (such as 0..7) or uuid")
    sku = fields.need("sku").choice(*catalogue.gpus)
    names = fields.need("uuid" if "uuid" in fields else "ids")
    numa, mig, parent = (fields.get(key) for key in ("numa", "mig", "parent"))
    rates = catalogue.gpus[sku]
    device = Device(
        id="",
        kind="gpu",
        sku=sku,
        mig=mig.text() if mig else None,
        parent=parent.text() if parent else None,
        rates=_mig_rates(mig, rates) if mig else rates,
        overrides=_overrides(fields.get("ceilings")),
    )
    nodes = _numa_of(numa, names.ids()) if numa else {}
    return [replace(device, id=name, numa=nodes.get(name)) for name in names.ids()]


def _numa_of(entry: Entry, ids: tuple[str, ...]) -> dict[str, int]:
    """`1` for all, or `{0: 0..3, 1: 4..7}`."""
    if entry.is_scalar:
        return dict.fromkeys(ids, entry.count(least=0))
    nodes: dict[str, int] = {}
    for key, value in entry.pairs():
        for name in value.ids():
            if name not in ids:
                raise value.error(f"names device {name!r}; ids here are {', '.join(ids)}")
            nodes[name] = key.count(least=0)
    return nodes


def _mig_rates(entry: Entry, card: Rates) -> Rates:
    """Rates of a MIG slice: `3g.71gb` has 3/7 of the card's arithmetic and 71 GB of its memory,
    with bandwidth in proportion to the memory (NVIDIA MIG User Guide, "GPU instance")."""
    match = re.fullmatch(r"([1-7])g\.(\d+)gb", entry.text())
    whole = card.memory[-1].capacity_bytes
    if match is None or not 0 < int(match[2]) * 10**9 <= whole * 1.05:
        raise entry.error(f"is {entry.text()!r}; write a profile of this card, like 3g.71gb")
    compute_share = int(match[1]) / _MIG_SLICES
    memory_share = min(1.0, int(match[2]) * 10**9 / whole)
    return replace(
        card,
        memory=tuple(
            MemoryLevel(m.name, int(m.capacity_bytes * memory_share), m.bytes_per_s * memory_share)
            for m in card.memory
        ),
        flops_per_s={dtype: rate * compute_share for dtype, rate in card.flops_per_s.items()},
    )


def _link(entry: Entry, ids: tuple[str, ...], catalogue: Catalogue) -> Link:
    fields = entry.fields("kind", "via", "ids", "between", "bw", "latency", "gen", "width")
    if ("ids" in fields) == ("between" in fields):
        raise entry.error("needs either ids (all pairs) or between (two or more groups)")
    kind = fields.need("kind").choice(*(k for k in catalogue.links if k != "NET"))
    traits = catalogue.links[kind]
    latency, via, between = (fields.get(key) for key in ("latency", "via", "between"))
    sides = between.sequence() if between else [fields.need("ids")]
    if between and len(sides) < 2:
        raise between.error("needs two groups or more, like [0..3, 4..7]")
    return Link(
        kind=kind,
        bytes_per_s=_wire_rate(fields, traits.bytes_per_s),
        attainable=traits.attainable,
        latency_s=latency.time() if latency else traits.latency_s,
        per_peer_s=traits.per_peer_s,
        sides=tuple(_device_ids(side, ids) for side in sides),
        via=via.text() if via else None,
    )


def _wire_rate(fields: Fields, default: float | None) -> float:
    """`bw`, or the kind's `default`.

    Where `gen` and `width` say what the PCIe wire is, no more than it carries one way.
    """
    if default is not None and "bw" not in fields:
        return default
    rate = fields.need("bw").rate()
    generation, width = fields.get("gen"), fields.get("width")
    if generation and width:
        lane = _LANE_BYTES_PER_S[int(generation.choice(*map(str, _LANE_BYTES_PER_S)))]
        most = lane * width.count()
        if rate > most * 1.01:
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


def _nics(entry: Entry, ids: tuple[str, ...]) -> list[Nic]:
    """One entry of `nics`; `near` and `rail` run along a range of names."""
    fields = entry.fields("name", "near", "bw", "rdma", "rail")
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
        )
        for i, name in enumerate(names)
    ]


def _overrides(entry: Entry | None) -> CeilingOverrides:
    """A `ceilings:` block."""
    if entry is None:
        return CeilingOverrides()
    fields = entry.fields("memory", "flops", "kernel_floor", "all_reduce")
    memory, flops, floor, reduce = (
        fields.get(key) for key in ("memory", "flops", "kernel_floor", "all_reduce")
    )
    levels: dict[str, tuple[int | None, float | None]] = {}
    for key, value in memory.pairs() if memory else ():
        level = value.fields("capacity", "rate")
        capacity, rate = level.get("capacity"), level.get("rate")
        levels[key.choice(*_MEMORY_LEVELS)] = (
            capacity.size() if capacity else None,
            rate.rate() if rate else None,
        )
    collective = reduce.fields("latency", "rate") if reduce else Fields(entry, {})
    latency, bandwidth = collective.get("latency"), collective.get("rate")
    return CeilingOverrides(
        memory=levels,
        flops_per_s={read_dtype(k): v.flops() for k, v in flops.pairs()} if flops else {},
        kernel_floor_s=floor.time() if floor else None,
        collective_latency_s=latency.time() if latency else None,
        collective_bytes_per_s=bandwidth.rate() if bandwidth else None,
    )
