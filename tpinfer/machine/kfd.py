"""AMD GPUs and how they are joined, from what their kernel driver lays out under
/sys/class/kfd/kfd/topology. No library of the maker's and no torch; measures nothing.

Each node there is a processor or a GPU, with `properties` of a name and a number a line, memory
banks and links. The names are those of Linux, drivers/gpu/drm/amd/amdkfd/kfd_topology.c, and of
include/uapi/linux/kfd_sysfs.h.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from tpinfer.machine.gpu_survey import Card, GpuSurvey, NvlinkGroup

_TOPOLOGY = "sys/class/kfd/kfd/topology/nodes"
_AMD, _PCIE, _XGMI = 0x1002, 2, 11
_FRAME_BUFFER = (1, 2)
"""Heap types of a GPU's own memory, visible to the processor or not."""
_NAMES = {
    0x738C: "AMD Instinct MI100",
    0x7408: "AMD Instinct MI250X",
    0x740C: "AMD Instinct MI250X",
    0x740F: "AMD Instinct MI210",
    0x74A0: "AMD Instinct MI300A",
    0x74A1: "AMD Instinct MI300X",
}
"""By PCI device."""
_GENERATIONS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}
"""PCIe generation by its transfers, GT/s."""


@dataclass(frozen=True, slots=True)
class KfdLink:
    """One way from a node to another."""

    target: int
    """Number of the node it leads to."""
    type: int
    """2 is PCIe, 11 xGMI."""
    weight: int
    """The driver's measure of distance."""
    bytes_per_s: float | None
    """In one direction; None where the driver does not know."""


@dataclass(frozen=True, slots=True)
class KfdNode:
    """One GPU as its driver describes it."""

    number: int
    gfx: str
    """Of its instruction set: `gfx942`."""
    num_compute_units: int
    memory_bytes: int
    """Of all its own banks."""
    device_id: int
    bus: str | None
    """As /sys spells it: `0000:17:00.0`."""
    uuid: str | None
    links: tuple[KfdLink, ...]

    @property
    def name(self) -> str:
        """What it is sold as, else its instruction set and size."""
        plain = f"AMD {self.gfx} of {self.num_compute_units} compute units"
        return _NAMES.get(self.device_id, plain)


def read_kfd(root: Path = Path("/")) -> tuple[KfdNode, ...]:
    """The GPUs under `root`, in the driver's order; none where there is no such driver. A node
    whose files cannot be read (containers hide other tenants' so) is left out."""
    folders = (root / _TOPOLOGY).glob("[0-9]*")
    found = (_node(folder) for folder in sorted(folders, key=lambda one: int(one.name)))
    return tuple(node for node in found if node is not None)


def survey_kfd(root: Path = Path("/")) -> GpuSurvey:
    """The same as other discovery has it."""
    nodes = read_kfd(root)
    cards = tuple(_card(index, node, root) for index, node in enumerate(nodes))
    pairs = list(combinations(range(len(nodes)), 2))
    return GpuSurvey(
        driver_version=_read(root / "sys/module/amdgpu/version"),
        cards=cards,
        nvlinks=_xgmi(nodes),
        paths={pair: _path(nodes, cards, pair) for pair in pairs},
        peers={pair: True for pair in pairs if _link(nodes, pair) is not None},
    )


def _node(folder: Path) -> KfdNode | None:
    facts = _properties(folder / "properties")
    units = facts.get("simd_count", 0) // max(1, facts.get("simd_per_cu", 1))
    if not units or facts.get("vendor_id", _AMD) != _AMD:
        return None
    banks = [_properties(bank / "properties") for bank in (folder / "mem_banks").glob("[0-9]*")]
    own = (bank for bank in banks if bank.get("heap_type") in _FRAME_BUFFER)
    unique = facts.get("unique_id", 0)
    links = [
        _link_of(_properties(link / "properties"))
        for kind in ("io_links", "p2p_links")
        for link in sorted((folder / kind).glob("[0-9]*"))
    ]
    return KfdNode(
        number=int(folder.name),
        gfx=_gfx(facts.get("gfx_target_version", 0)),
        num_compute_units=units,
        memory_bytes=sum(bank.get("size_in_bytes", 0) for bank in own),
        device_id=facts.get("device_id", 0),
        bus=_bus(facts),
        uuid=f"GPU-{unique:016x}" if unique else None,
        links=tuple(link for link in links if link is not None),
    )


def _gfx(version: int) -> str:
    """90402 is gfx942: two digits each of minor and stepping, the stepping in hexadecimal."""
    major, minor, stepping = version // 10_000, version // 100 % 100, version % 100
    return f"gfx{major}{minor}{stepping:x}"


def _bus(facts: Mapping[str, int]) -> str | None:
    """From the location: bus, device and function in 8, 5 and 3 bits."""
    place = facts.get("location_id", 0)
    if not place:
        return None
    bus, device, function = place >> 8 & 0xFF, place >> 3 & 0x1F, place & 7
    return f"{facts.get('domain', 0):04x}:{bus:02x}:{device:02x}.{function}"


def _link_of(facts: Mapping[str, int]) -> KfdLink | None:
    if "node_to" not in facts:
        return None
    rate = facts.get("max_bandwidth", 0)  # in MB/s; 0 where the driver does not know
    return KfdLink(
        facts["node_to"], facts.get("type", 0), facts.get("weight", 0), rate * 1e6 or None
    )


def _link(nodes: tuple[KfdNode, ...], pair: tuple[int, int]) -> KfdLink | None:
    """The nearest way from one GPU to the other."""
    target = nodes[pair[1]].number
    found = [link for link in nodes[pair[0]].links if link.target == target]
    return min(found, key=lambda link: link.weight, default=None)


def _xgmi(nodes: tuple[KfdNode, ...]) -> tuple[NvlinkGroup, ...]:
    """One group where all are joined with all, a member's rate that of its links together; else
    one for each pair that is joined."""
    rates: dict[tuple[int, int], float | None] = {}
    for pair in combinations(range(len(nodes)), 2):
        link = _link(nodes, pair)
        if link is not None and link.type == _XGMI:
            rates[pair] = link.bytes_per_s
    members = tuple(range(len(nodes)))
    if len(rates) < 3 or len(rates) < len(members) * (len(members) - 1) // 2:
        return tuple(NvlinkGroup(pair, rate, False) for pair, rate in sorted(rates.items()))
    sums = [[rate for pair, rate in rates.items() if place in pair] for place in members]
    known = [sum(rate or 0.0 for rate in row) for row in sums if None not in row]
    slowest = min(known) if len(known) == len(members) else None
    return (NvlinkGroup(members, slowest, False),)


def _path(
    nodes: tuple[KfdNode, ...], cards: tuple[Card, ...], pair: tuple[int, int]
) -> tuple[str, bool]:
    """Over PCIe: under one processor's node or across two, as their links to processors say."""
    gpus = {node.number for node in nodes}
    homes = [
        {link.target for link in nodes[place].links if link.target not in gpus} for place in pair
    ]
    if all(homes):
        return ("PHB" if homes[0] & homes[1] else "SYS"), True
    apart = None not in (known := [cards[place].numa for place in pair]) and known[0] != known[1]
    return ("SYS" if apart else "PHB"), False


def _card(index: int, node: KfdNode, root: Path) -> Card:
    device = root / "sys/bus/pci/devices" / (node.bus or "none")
    speed = re.match(r"([\d.]+) GT/s", _read(device / "max_link_speed") or "")
    width, numa = (_read(device / name) or "" for name in ("max_link_width", "numa_node"))
    return Card(
        index=index,
        uuid=node.uuid,
        name=node.name,
        bus=node.bus,
        numa=int(numa) if numa.isdecimal() else None,
        memory_bytes=node.memory_bytes or None,
        memory_bytes_per_s=None,
        pcie_generation=_GENERATIONS.get(speed[1]) if speed else None,
        pcie_width=int(width) if width.isdecimal() else None,
    )


def _properties(path: Path) -> dict[str, int]:
    """Lines of a name and a number; others are passed over."""
    pairs = (line.split() for line in (_read(path) or "").splitlines())
    return {
        pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].lstrip("-").isdigit()
    }


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
