"""A host as a topology file describes it, written from what discovery found."""

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path

from tpinfer.config.catalogue import Catalogue
from tpinfer.config.strict_yaml import quoted
from tpinfer.config.units import exact_rate, exact_size
from tpinfer.machine.discover import Machine
from tpinfer.machine.gpu_survey import PATHS, Card, GpuSurvey, NvlinkGroup
from tpinfer.machine.nics import Port, pci_path, shares_bridge, survey_nics

_RATE_DIGITS = 4


@dataclass(frozen=True, slots=True)
class HostFacts:
    """All that was found on one host."""

    name: str
    machine: Machine
    gpus: GpuSurvey
    nics: tuple[Port, ...] = ()
    num_sockets: int = 1
    arch: str = ""
    gpu_paths: tuple[tuple[str, ...], ...] = ()
    """PCI bridges above each card."""


def gather_facts(
    name: str, machine: Machine, gpus: GpuSurvey, root: Path = Path("/"), arch: str = ""
) -> HostFacts:
    """`machine` and `gpus` with what else /sys and /proc under `root` say."""
    try:
        lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    sockets = {line.partition(":")[2].strip() for line in lines if line.startswith("physical id")}
    return HostFacts(
        name=name,
        machine=machine,
        gpus=gpus,
        nics=survey_nics(root),
        num_sockets=max(1, len(sockets)),
        arch=arch or platform.machine(),
        gpu_paths=tuple(pci_path(root, card.bus) for card in gpus.cards),
    )


def host_lines(
    facts: HostFacts,
    catalogue: Catalogue,
    name: str | None = None,
    num_ranks: int | None = None,
    origin: str = "nvml",
) -> list[str]:
    """Lines of the host's entry under `hosts:`.

    `num_ranks` keeps that many of its devices. With another `name`, it describes a host just like
    this one, whose devices are known by number only.
    """
    cards = facts.gpus.cards[:num_ranks]
    by_number = name is not None and name != facts.name
    lines = [
        f"  {quoted(name or facts.name)}:",
        f"    from: {origin}",
        f"    cpu: {_cpu(facts, catalogue)}",
    ]
    if facts.machine.shared_memory_bytes:
        lines.append(f"    shm: {exact_size(facts.machine.shared_memory_bytes)}")
    if not cards:
        cores = facts.machine.num_cores
        count = num_ranks or max(min(2, cores), len(facts.machine.numa_nodes))
        lines.append(f"    ranks: {count}")
        if count > 1:
            lines += ["    links:", f"      - {{kind: SHM, ids: 0..{count - 1}}}"]
    else:
        uuids = [card.uuid for card in cards]
        devices = _devices(cards, by_number or None in uuids or len(set(uuids)) < len(uuids))
        lines += _gpu_lines(devices, catalogue, origin, range(len(facts.machine.numa_nodes)))
        lines += _link_lines(facts, devices, catalogue, origin)
    if facts.nics:
        lines += ["    nics:", *_nic_lines(facts, len(cards), origin)]
    return lines


@dataclass(frozen=True, slots=True)
class _Device:
    """A card or a slice of one, as the file lists it."""

    id: str
    card: Card
    place: int
    """Of the card."""
    profile: str = ""


def _devices(cards: Sequence[Card], by_number: bool) -> list[_Device]:
    found: list[_Device] = []
    for place, card in enumerate(cards):
        if card.slices:
            found += [
                _Device(f"MIG-{place}-{i}" if by_number else piece.uuid, card, place, piece.profile)
                for i, piece in enumerate(card.slices)
            ]
        else:
            found.append(_Device(str(place) if by_number else card.id, card, place))
    return found


def _cpu(facts: HostFacts, catalogue: Catalogue) -> str:
    machine = facts.machine
    known = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
    row: dict[str, str] = {}
    sku = catalogue.processor_named(machine.cpu_model)
    if sku:
        row["sku"] = sku
    if arch := known.get(facts.arch.lower()):
        row["arch"] = arch
    if machine.cpu_vendor in ("intel", "amd", "arm", "nvidia"):
        row["vendor"] = machine.cpu_vendor
    row["model"] = quoted(machine.cpu_model)
    row["sockets"] = str(facts.num_sockets)
    nodes = machine.numa_nodes
    if sum(map(len, nodes)) == machine.num_cores:
        row["numa"] = _flow({str(i): _spans(node) for i, node in enumerate(nodes)})
    else:
        row["numa"] = str(len(nodes))
        row["cores"] = str(machine.num_cores)
    if machine.memory_bytes:
        row["mem"] = exact_size(machine.memory_bytes)
    return _flow(row)


def _gpu_lines(
    devices: Sequence[_Device], catalogue: Catalogue, origin: str, known_nodes: Sequence[int]
) -> Iterable[str]:
    """Cards that are alike share an entry; each slice has its own."""

    def traits(device: _Device) -> tuple[object, ...]:
        card = device.card
        apart = device.place if device.profile else -1
        return (card.name, card.memory_bytes, card.memory_bytes_per_s, device.profile, apart)

    yield "    gpus:"
    for _, alike in groupby(devices, traits):
        found = list(alike)
        card, profile = found[0].card, found[0].profile
        sku = catalogue.card_named(card.name or "")
        row = {"sku": sku} if sku else {"name": quoted(card.name or "unknown")}
        ids = [device.id for device in found]
        numbered = all(name.isdecimal() for name in ids)
        row["ids" if numbered else "uuid"] = (
            _spans([int(i) for i in ids]) if numbered else _list(ids)
        )
        nodes = [device.card.numa if device.card.numa in known_nodes else None for device in found]
        if len(set(nodes)) == 1 and nodes[0] is not None:
            row["numa"] = str(nodes[0])
        elif None not in nodes:
            by_node = {
                node: [i for i, other in enumerate(nodes) if other == node]
                for node in dict.fromkeys(nodes)
            }
            named = numbered and [found[i].place for i in range(len(found))]
            row["numa"] = _flow(
                {
                    str(node): _spans([named[i] for i in places] if named else places)
                    for node, places in by_node.items()
                }
            )
        if profile:
            row["mig"], row["parent"] = quoted(profile), quoted(card.id)
        else:
            if card.memory_bytes:
                row["mem"] = exact_size(card.memory_bytes)
            if card.memory_bytes_per_s:
                row["mem_bw"] = _rate(card.memory_bytes_per_s)
        row["from"] = origin
        yield f"      - {_flow(row)}"


def _link_lines(
    facts: HostFacts, devices: Sequence[_Device], catalogue: Catalogue, origin: str
) -> Iterable[str]:
    """Whether peers may copy, then NVLink, then PCIe from near to far, then host memory."""
    survey, count = facts.gpus, len(devices)
    places = {device.place: i for i, device in enumerate(devices) if not device.profile}
    has_slices = len(places) < count
    links = [
        row
        for group in survey.nvlinks
        if (row := _nvlink(group, places, survey.cards, catalogue, origin))
    ]
    peers = [survey.peers.get(pair) for pair in combinations(sorted(places), 2)]
    if (peers and not any(peers) and None not in peers and not links) or not places:
        yield "    p2p: false" + (" # MIG slices have none" if not places else "")
    else:
        yield "    p2p: auto"
    links += _pcie(survey, places, origin)
    if has_slices and count > 1:
        links.append({"kind": "SHM", "ids": f"0..{count - 1}"})
    if links:
        yield "    links:"
        yield from (f"      - {_flow(row)}" for row in links)


def _nvlink(
    group: NvlinkGroup,
    places: dict[int, int],
    cards: Sequence[Card],
    catalogue: Catalogue,
    origin: str,
) -> dict[str, str]:
    members = [places[place] for place in group.members if place in places]
    if len(members) < 2:
        return {}
    row = {"kind": "NVL", "ids": _spans(members)}
    if group.through_switch:
        row["via"] = "nvswitch"
    sku = catalogue.card_named(cards[group.members[0]].name or "")
    known = catalogue.cards[sku].port_bytes_per_s.get("NVL") if sku else None
    rate = group.bytes_per_s
    if rate is not None and known is not None:
        rate = min(rate, known)
    if rate is None and known is None:
        return {**row, "bw": "25GB/s", "from": "assumed"}
    # Without the driver's word the card's own rate stands, which the file need not repeat.
    return row if rate is None else {**row, "bw": _rate(rate), "from": origin}


def _pcie(survey: GpuSurvey, places: dict[int, int], origin: str) -> list[dict[str, str]]:
    """For each kind from near to far, the sets of cards that it newly joins."""
    parent = {place: place for place in places}

    def top(place: int) -> int:
        while parent[place] != place:
            place = parent[place]
        return place

    rows: list[dict[str, str]] = []
    for kind in PATHS:
        joined = set()
        said = True
        for (first, second), (found, by_driver) in sorted(survey.paths.items()):
            if found == kind and first in places and second in places:
                said &= by_driver
                if top(first) != top(second):
                    parent[top(second)] = top(first)
                joined.add(first)
        for head in dict.fromkeys(top(place) for place in sorted(joined)):
            members = [place for place in places if top(place) == head]
            rows.append(_pcie_row(kind, members, places, survey, origin if said else "assumed"))
    return rows


def _pcie_row(
    kind: str, members: list[int], places: dict[int, int], survey: GpuSurvey, origin: str
) -> dict[str, str]:
    row = {"kind": kind, "ids": _spans([places[place] for place in members])}
    generations = [survey.cards[place].pcie_generation for place in members]
    widths = [survey.cards[place].pcie_width for place in members]
    gen = min((g for g in generations if g), default=None)
    width = min((w for w in widths if w), default=None)
    if gen and width and 1 <= gen <= 6:
        row |= {"gen": str(gen), "width": str(width)}
    else:
        row["bw"] = "16GB/s"
        origin = "assumed"
    if kind == "SYS":
        origin = "assumed"  # what the sockets' own link carries, nobody says
    return {**row, "from": origin}


def _nic_lines(facts: HostFacts, num_cards: int, origin: str) -> Iterable[str]:
    """`near` is the card behind the most bridges in common."""
    for rail, nic in enumerate(facts.nics):
        shared = [
            (shares_bridge(nic.bus_path, path), -place)
            for place, path in enumerate(facts.gpu_paths[:num_cards])
        ]
        row = {"name": quoted(nic.name), "bw": exact_rate(nic.bytes_per_s)}
        most, place = max(shared, default=(0, 0))
        whole = not any(card.slices for card in facts.gpus.cards)
        if most and whole:
            row["near"] = str(-place)
        if nic.rdma:
            row |= {"rdma": "true", "rail": str(rail)}
        yield f"      - {_flow({**row, 'from': origin})}"


def _rate(bytes_per_s: float) -> str:
    """Rounded to four digits: products of clocks and widths carry no more."""
    return exact_rate(float(f"{bytes_per_s:.{_RATE_DIGITS}g}"))


def _flow(row: dict[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in row.items()) + "}"


def _list(items: Iterable[str]) -> str:
    return "[" + ", ".join(quoted(item) for item in items) + "]"


def _spans(numbers: Sequence[int]) -> str:
    """`0..3`, `[0, 2..3]` or `5`."""
    parts: list[str] = []
    rest = list(numbers)
    while rest:
        count = 1
        while count < len(rest) and rest[count] == rest[0] + count:
            count += 1
        parts.append(f"{rest[0]}..{rest[count - 1]}" if count > 1 else str(rest[0]))
        rest = rest[count:]
    return parts[0] if len(parts) == 1 else "[" + ", ".join(parts) + "]"
