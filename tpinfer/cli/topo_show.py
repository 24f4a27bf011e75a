"""A topology drawn as a tree, with rates and where each comes from."""

from dataclasses import replace

from tpinfer.config.dtypes import DType
from tpinfer.config.machine_parts import Device, Fabric, Host, Link, Nic, Place
from tpinfer.config.origin import Origin
from tpinfer.config.topology import Topology
from tpinfer.config.units import (
    format_flops,
    format_price,
    format_rate,
    format_size,
    format_time,
)

Tree = list[tuple[str, "Tree"]]
_SHOWN_DTYPES = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT8_E4M3, DType.INT8)
_LEGEND = (
    "Rates are attainable ones, in one direction, per device. Where they come from: spec is a data",
    "sheet or the file; nvml the driver or kernel; measured is topo probe; assumed is a default,",
    "or --set.",
)
_SHORT = {DType.FLOAT32: "fp32", DType.BFLOAT16: "bf16", DType.FLOAT8_E4M3: "fp8"}


def draw(topology: Topology) -> str:
    """The tree, with a legend."""
    measured = topology.measured
    head = f"{topology.name} ({topology.file})"
    if measured:
        head += f", measured {measured.date}"
        head += f", driver {measured.driver}" if measured.driver else ""
    lines = [head, *_lines(_whole(topology), "")]
    return "\n".join([*lines, "", *_LEGEND])


def _lines(tree: Tree, indent: str) -> list[str]:
    found: list[str] = []
    for i, (text, below) in enumerate(tree):
        last = i == len(tree) - 1
        found.append(f"{indent}{'`- ' if last else '|- '}{text}")
        found += _lines(below, indent + ("   " if last else "|  "))
    return found


def _whole(topology: Topology) -> Tree:
    tree: Tree = []
    for names, host in _alike(topology.hosts):
        tree.append((_host_title(names, host), _host(topology, host)))
    tree += [(_fabric(fabric), []) for fabric in topology.fabric]
    tree += _placement(topology)
    if topology.usd_per_gpu_hour is not None:
        tree.append((f"price {format_price(topology.usd_per_gpu_hour)} per device [spec]", []))
    else:
        device = topology.hosts[0].devices[0]
        if device.usd_per_hour is not None:
            price = format_price(device.usd_per_hour)
            tree.append((f"price {price} per {device.sku}, as the catalogue knows it", []))
    return tree


def _alike(hosts: tuple[Host, ...]) -> list[tuple[list[str], Host]]:
    """Hosts that differ in name only, together."""
    found: list[tuple[list[str], Host]] = []
    for host in hosts:
        for names, known in found:
            if replace(host, name="") == replace(known, name=""):
                names.append(host.name)
                break
        else:
            found.append(([host.name], host))
    return found


def _host_title(names: list[str], host: Host) -> str:
    parts = [part for part in (host.cpu_vendor, host.cpu_model) if part]
    if host.num_cores:
        parts.append(f"{host.num_cores} cores")
    parts.append(f"{host.num_numa} memory node{'s' if host.num_numa > 1 else ''}")
    if host.memory_bytes:
        parts.append(format_size(host.memory_bytes))
    if host.shared_memory_bytes is not None:
        parts.append(f"/dev/shm {format_size(host.shared_memory_bytes)}")
    if host.clock_offset_s is not None:
        sign = "-" if host.clock_offset_s < 0 else "+"
        parts.append(f"clock {sign}{format_time(abs(host.clock_offset_s))}")
    name = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)} alike)"
    return f"{name}: {', '.join(parts)} [{host.origin}]"


def _host(topology: Topology, host: Host) -> Tree:
    tree: Tree = []
    nodes = dict.fromkeys(device.numa for device in host.devices)
    for node in nodes:
        devices: Tree = []
        for ids, device in _alike_devices(host, [d for d in host.devices if d.numa == node]):
            devices.append((f"{ids}  {_device(topology, host, device)}", []))
        if node is None:
            tree += devices
        else:
            tree.append((f"node {node}", devices))
    if not host.computes_on_cpu and len(host.devices) > 1:
        tree.append((f"copies between peers: {host.p2p}", []))
    tree += [(_link(host, link), []) for link in host.links]
    return tree + _nics(host)


def _alike_devices(host: Host, devices: list[Device]) -> list[tuple[str, Device]]:
    """Neighbours that differ in their ids only, together; long ids by place, with the first one."""
    found: list[tuple[list[str], Device]] = []
    for device in devices:
        if found and replace(found[-1][1], id="") == replace(device, id=""):
            found[-1][0].append(device.id)
        else:
            found.append(([device.id], device))
    named = []
    for ids, device in found:
        text = _ids([_place(host, name) for name in ids])
        if not ids[0].isdecimal():
            text += f" ({ids[0]}{' ..' if len(ids) > 1 else ''})"
        named.append((text, device))
    return named


def _device(topology: Topology, host: Host, device: Device) -> str:
    name = device.sku or device.kind
    if device.mig:
        name += f", MIG {device.mig} of {device.parent}"
    found = topology.ceilings_of(host.name, device.id)
    if found is None:
        return f"{name}: no rates known"
    last = found.memory[-1]
    origins = found.origins

    def tag(key: str) -> str:
        return f"[{origins.get(key, Origin.SPEC)}]"

    parts = [
        f"{last.name} {format_size(last.capacity_bytes)} {tag(f'memory.{last.name}.capacity')}",
        f"{format_rate(last.bytes_per_s)} {tag(f'memory.{last.name}.rate')}",
    ]
    for dtype in _SHOWN_DTYPES:
        if dtype in found.flops_per_s:
            rate = format_flops(found.flops_per_s[dtype])
            parts.append(f"{_SHORT.get(dtype, dtype.value)} {rate} {tag(f'flops.{dtype}')}")
    parts.append(f"floor {format_time(found.kernel_floor_s)} {tag('kernel_floor')}")
    return f"{name}: {', '.join(parts)}"


def _link(host: Host, link: Link) -> str:
    sides = " - ".join(_ids([_place(host, name) for name in side]) for side in link.sides)
    via = f" via {link.via}" if link.via else ""
    return f"{link.kind} {sides}{via}: {_path(link)}"


def _place(host: Host, name: str) -> str:
    """A long id by its place."""
    if name.isdecimal():
        return name
    return str([device.id for device in host.devices].index(name))


def _path(link: Link) -> str:
    tag = {key: f"[{origin}]" for key, origin in link.origins.items()}
    return (
        f"wire {format_rate(link.bytes_per_s)} {tag.get('bw', '')}, {link.attainable:.0%} of it in "
        f"sums {tag.get('attainable', '')}, least {format_time(link.latency_s)} "
        f"+ {format_time(link.per_peer_s)} a peer {tag.get('latency', '')}"
    )


def _nics(host: Host) -> Tree:
    """Neighbours alike in all but name, place and rail share a line."""
    groups: list[list[Nic]] = []
    for nic in host.nics:
        last = groups[-1][-1] if groups else None
        if last and (last.bytes_per_s, last.rdma, last.origin) == (
            nic.bytes_per_s,
            nic.rdma,
            nic.origin,
        ):
            groups[-1].append(nic)
        else:
            groups.append([nic])
    tree: Tree = []
    for group in groups:
        nears = [_place(host, nic.near) for nic in group if nic.near is not None]
        rails = [nic.rail for nic in group if nic.rail is not None]
        each = " each" if len(group) > 1 else ""
        text = f"network {_ids([nic.name for nic in group])}: {format_rate(group[0].bytes_per_s)}"
        text += f"{each} [{group[0].origin}]{', RDMA' if group[0].rdma else ''}"
        text += f", near {_ids(nears)}" if nears else ""
        text += f", rail {_ids(rails)}" if rails else ""
        tree.append((text, []))
    return tree


def _fabric(fabric: Fabric) -> str:
    oversub = f", oversubscribed {fabric.oversub:g} times" if fabric.oversub > 1 else ""
    hosts = _ids(list(fabric.link.sides[0]))
    rails = f"{fabric.rails} rail{'s' if fabric.rails > 1 else ''}"
    return f"NET {fabric.type} {hosts}, {rails}{oversub}: {_path(fabric.link)}"


def _placement(topology: Topology) -> Tree:
    """The file's groups, or the first host's devices as one."""
    placement = topology.placement
    groups = topology.groups()
    if placement:
        groups = groups[: placement.pp * placement.dp]
        title = f"placement: tp {placement.tp}, pp {placement.pp}, dp {placement.dp}"
    else:
        groups = groups[:1]
        title = "no placement; as one group"
    below: Tree = []
    for group in groups:
        if len(group) < 2:
            continue
        found = topology.ceilings_of(*group[0], num_ranks=len(group))
        kinds = sorted({link.kind for link in topology.paths(group)})
        if found is not None:
            tag = found.origins.get("all_reduce.rate", Origin.SPEC)
            below.append(
                (
                    f"{group[0][0]}/{group[0][1]} .. {group[-1][0]}/{group[-1][1]} over "
                    f"{', '.join(kinds)}: all-reduce {format_rate(found.collective_bytes_per_s)}, "
                    f"least {format_time(found.collective_latency_s)} [{tag}]",
                    _fits(topology, group),
                )
            )
    return [(title, below)] if placement or below else []


def _fits(topology: Topology, group: tuple[Place, ...]) -> Tree:
    """What was measured of the group's collectives."""
    measured = topology.measured
    found = next((g for g in measured.groups if g.places == group), None) if measured else None
    tree: Tree = []
    for fit in found.collectives if found else ():
        peers = len(group) - 1
        lines = (
            (fit.a_s + fit.b_s * peers, fit.b1_bytes_per_s),
            (fit.c_s + fit.d_s * peers, fit.b2_bytes_per_s),
        )
        least = " or ".join(f"{format_time(t)} + bytes / {format_rate(rate)}" for t, rate in lines)
        graph = ", in a graph" if fit.graph else ""
        tree.append(
            (
                f"{fit.op} by {fit.by}{graph}: {least}, {format_size(fit.smallest_bytes)} to "
                f"{format_size(fit.largest_bytes)} within {fit.error:.0%} [measured]",
                [],
            )
        )
    return tree


def _ids(names: list[str]) -> str:
    """`0..7` for neighbours, else a list."""
    stem = names[0].rstrip("0123456789")
    numbers = [name.removeprefix(stem) for name in names]
    if len(names) > 1 and all(number.isdecimal() for number in numbers):
        first = int(numbers[0])
        if numbers == [str(first + i) for i in range(len(numbers))]:
            return f"{names[0]}..{names[-1]}"
    return ", ".join(names)
