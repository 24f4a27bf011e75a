"""What in a topology would hurt a run over its devices, and what to do about it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from tpinfer.config.errors import TopologyError
from tpinfer.config.machine_parts import Device, Host, Link, Place
from tpinfer.config.paths import NVLINK_KINDS
from tpinfer.config.topology import Topology
from tpinfer.config.units import format_rate, format_size, format_time

LEAST_SHARED_BYTES_PER_RANK = 64 << 20
"""Room in /dev/shm: what collectives through host memory take at most, and a container's default
for all of them together."""
_MOST_CLOCK_OFFSET_S = 1e-3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know."""

    hurts: bool
    """False for what is merely good to know."""
    where: str
    what: str
    remedy: str


def check_topology(
    topology: Topology, visible_gpus: tuple[str, ...] | None = None
) -> list[Finding]:
    """What would hurt, worst first; `visible_gpus` holds CUDA_VISIBLE_DEVICES, None for unset."""
    found = [*_environment(visible_gpus), *_hosts(topology), *_fabric(topology)]
    try:
        groups = topology.groups()
        if topology.placement:
            groups = groups[: topology.placement.pp * topology.placement.dp]
        for group in groups:
            found += _group(topology, group)
    except TopologyError as error:
        found.append(Finding(True, topology.file, str(error), "see above"))
    if topology.measured is None:
        found.append(
            Finding(
                False,
                topology.file,
                "nothing is measured: times will be guesses from data sheets",
                "run `tpinfer topo probe` on the machine",
            )
        )
    return sorted(dict.fromkeys(found), key=lambda finding: not finding.hurts)


def _environment(visible: tuple[str, ...] | None) -> Iterator[Finding]:
    names = [name for name in visible or () if not name.isdecimal()]
    slices = [name for name in names if name.startswith("MIG-")]
    if len(slices) > 1:
        yield Finding(
            True,
            "CUDA_VISIBLE_DEVICES",
            f"names {len(slices)} MIG slices, but a process can use only the first",
            "start each rank with its own slice in CUDA_VISIBLE_DEVICES",
        )
    elif names:
        yield Finding(
            False,
            "CUDA_VISIBLE_DEVICES",
            f"names cards by UUID ({names[0]}); some engines read numbers only, and fail or count "
            "wrong",
            "write numbers, and CUDA_DEVICE_ORDER=PCI_BUS_ID for a fixed order",
        )


def _hosts(topology: Topology) -> Iterator[Finding]:
    for host in topology.hosts:
        shm, least = host.shared_memory_bytes, LEAST_SHARED_BYTES_PER_RANK * len(host.devices)
        if shm is not None and len(host.devices) > 1 and shm < least:
            yield Finding(
                True,
                host.name,
                f"/dev/shm has {format_size(shm)}, {format_size(least)} are needed for "
                f"{len(host.devices)} ranks",
                "enlarge it (docker: --shm-size=1g; Kubernetes: an emptyDir with medium: Memory)",
            )
        offset = host.clock_offset_s
        if offset is not None and abs(offset) > _MOST_CLOCK_OFFSET_S:
            yield Finding(
                False,
                host.name,
                f"its clock is {format_time(abs(offset))} {'ahead' if offset > 0 else 'behind'}",
                "synchronise clocks (chrony, ptp4l) before comparing time stamps of hosts",
            )
        if host.p2p not in ("auto", "false") and not host.computes_on_cpu:
            yield Finding(
                False,
                host.name,
                f"p2p: {host.p2p} goes beyond NCCL's own rule",
                "set NCCL_P2P_LEVEL likewise in the run, and compare both by `tpinfer topo probe`",
            )
        for sku in dict.fromkeys(d.sku or "unknown" for d in host.devices if _is_unrated(d)):
            yield Finding(
                False,
                host.name,
                f"no rates are known of its {sku} devices",
                "add sku: or ceilings:, or run `tpinfer topo probe`",
            )


def _is_unrated(device: Device) -> bool:
    if device.rates is None:
        return True
    overrides = device.set_overrides.on_top_of(device.overrides)
    return not (device.rates.flops_per_s or overrides.flops_per_s)


def _fabric(topology: Topology) -> Iterator[Finding]:
    for fabric in topology.fabric:
        where = f"fabric {fabric.type}"
        if fabric.oversub > 1:
            yield Finding(
                True,
                where,
                f"its core is {fabric.oversub:g} times short of its edge: hosts that all send at "
                f"once share {format_rate(fabric.link.bytes_per_s / fabric.oversub)} each",
                "keep tensor-parallel groups on a host, or stages of a pipeline under one switch",
            )
        for host in (topology.host(name) for name in fabric.link.sides[0]):
            total = sum(nic.bytes_per_s for nic in host.nics)
            share = total / len(host.devices)
            if host.nics and fabric.link.bytes_per_s > share * 1.01:
                yield Finding(
                    True,
                    where,
                    f"bw is {format_rate(fabric.link.bytes_per_s)} per device, but the cards of "
                    f"{host.name} carry {format_rate(share)} for each of its devices",
                    "write what one device gets, in one direction",
                )
            if fabric.rails > max(1, len(host.nics)) and host.nics:
                yield Finding(
                    False,
                    where,
                    f"has {fabric.rails} rails, {host.name} {len(host.nics)} network cards",
                    "make them agree",
                )


def _group(topology: Topology, group: tuple[Place, ...]) -> Iterator[Finding]:
    """One tensor-parallel group."""
    if len(group) < 2:
        return
    where = f"group {group[0][0]}/{group[0][1]} .. {group[-1][0]}/{group[-1][1]}"
    members = [(topology.host(host), topology.host(host).device(name)) for host, name in group]
    hosts = {host.name for host, _ in members}
    paths = _paths(topology, group)
    yield from _unequal(where, members)
    if len(hosts) > 1:
        slowest = min((p for p in paths.values() if p.kind == "NET"), key=lambda p: p.bytes_per_s)
        yield Finding(
            True,
            where,
            f"spans {len(hosts)} hosts: every layer's two sums cross the network at "
            f"{format_rate(slowest.bytes_per_s * slowest.attainable)}",
            "use tp up to one host's devices, and pp or dp between hosts",
        )
    yield from _staged(where, members, paths)
    yield from _sockets(where, members, paths)


def _paths(topology: Topology, group: tuple[Place, ...]) -> dict[tuple[Place, Place], Link]:
    counts = Counter(host for host, _ in group)
    return {(a, b): topology.path(a, b, counts[a[0]]) for a, b in combinations(group, 2)}


def _unequal(where: str, members: list[tuple[Host, Device]]) -> Iterator[Finding]:
    kinds = Counter((device.sku or device.kind, device.mig or "whole") for _, device in members)
    if len(kinds) > 1:
        named = ", ".join(f"{n} x {sku} ({part})" for (sku, part), n in kinds.items())
        yield Finding(
            True,
            where,
            f"its devices are unequal: {named}; each step waits for the slowest",
            "form groups of equal devices, or give placement.shares by what each can do",
        )


def _staged(
    where: str, members: list[tuple[Host, Device]], paths: dict[tuple[Place, Place], Link]
) -> Iterator[Finding]:
    """Pairs that go through the host's memory."""
    if any(device.mig for _, device in members):
        yield Finding(
            True,
            where,
            "MIG slices cannot copy to each other: their sums go through host memory",
            "use one larger slice or the whole card instead of tp over slices",
        )
        return
    staged = [path for path in paths.values() if path.instead_of]
    if not staged:
        return
    kinds = Counter(str(path.instead_of) for path in staged)
    slowest = min(staged, key=lambda path: path.bytes_per_s * path.attainable)
    named = ", ".join(f"{count} over {kind}" for kind, count in kinds.items())
    yield Finding(
        True,
        where,
        f"{len(staged)} of {len(paths)} pairs may not copy to each other ({named}): NCCL goes "
        f"through host memory, about {format_rate(slowest.bytes_per_s * slowest.attainable)} in "
        "sums",
        "use tp within a PCIe switch or NVLink, or try NCCL_P2P_LEVEL=PHB or SYS and measure both",
    )


def _sockets(
    where: str, members: list[tuple[Host, Device]], paths: dict[tuple[Place, Place], Link]
) -> Iterator[Finding]:
    """Ranks on several memory nodes that NVLink does not join."""
    for name in dict.fromkeys(host.name for host, _ in members):
        nodes = {d.id: d.numa for host, d in members if host.name == name and d.numa is not None}
        if len(set(nodes.values())) < 2:
            continue
        across = [
            path
            for ((_, a), (_, b)), path in paths.items()
            if nodes.get(a) != nodes.get(b) and path.kind not in (*NVLINK_KINDS, "NET")
        ]
        if across:
            yield Finding(
                True,
                where,
                f"its ranks are on {len(set(nodes.values()))} memory nodes of {name}: "
                f"{len(across)} pairs cross the processors' own link",
                "use tp up to the devices of one node, and dp between nodes",
            )
