"""What GPUs a host has and how they are joined, from the driver's fields and /sys. No torch.

Of each fact either the driver or the kernel may be silent; then it is left out, or said to be
assumed.
"""

import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from tpinfer.machine.nvml_driver import MOST_LINKS, NVLINK, READ, Driver, Value

PATHS = ("PIX", "PXB", "PHB", "SYS")
_ANCESTORS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "PHB", 50: "SYS"}
"""NVML_TOPOLOGY_INTERNAL, _SINGLE, _MULTIPLE, _HOSTBRIDGE, _NODE, _SYSTEM. NCCL knows no NODE."""
_LINK_MB_PER_S = (20_000, 25_000, 50_000, 100_000)
"""What links of a generation carry; the driver counts what the wire's code adds, up to 7 %."""
_SWITCH = 2
_MOST_SLICES = 7


@dataclass(frozen=True, slots=True)
class Slice:
    """A MIG slice."""

    uuid: str
    profile: str


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU; None for what nobody says."""

    index: int
    uuid: str | None
    name: str | None
    bus: str | None
    """As /sys spells it: `0000:17:00.0`."""
    numa: int | None
    memory_bytes: int | None
    memory_bytes_per_s: float | None
    """Memory clock times bus width, twice per clock: the peak."""
    pcie_generation: int | None
    """Of card and slot together; what the idle link shows would be less."""
    pcie_width: int | None
    slices: tuple[Slice, ...] = ()

    @property
    def id(self) -> str:
        """Its UUID, else its number."""
        return self.uuid or str(self.index)


@dataclass(frozen=True, slots=True)
class NvlinkGroup:
    """Cards that NVLink joins, all with all."""

    members: tuple[int, ...]
    bytes_per_s: float | None
    """Of one member to the others; None where the driver does not say."""
    through_switch: bool


@dataclass(frozen=True, slots=True)
class GpuSurvey:
    """The GPUs of a host."""

    driver_version: str | None
    cards: tuple[Card, ...]
    nvlinks: tuple[NvlinkGroup, ...]
    paths: dict[tuple[int, int], tuple[str, bool]]
    """(kind over PCIe, whether the driver said so) of each pair of places in `cards`."""
    peers: dict[tuple[int, int], bool]
    """Whether the driver lets a pair read each other's memory, where it says so."""


def survey_gpus(driver: Driver, root: Path = Path("/")) -> GpuSurvey:
    """Everything that `driver` and /sys under `root` say."""
    count = _int(driver.read("count")) or 0
    cards = tuple(_card(driver, index, root) for index in range(count))
    seen = tuple(card for card in cards if (card.uuid, card.name, card.bus) != (None, None, None))
    pairs = list(combinations(range(len(seen)), 2))
    status = {
        pair: _int(driver.read("p2p_status", *(seen[i].index for i in pair), READ))
        for pair in pairs
    }
    return GpuSurvey(
        driver_version=_str(driver.read("driver_version")),
        cards=seen,
        nvlinks=_nvlinks(driver, seen),
        paths={pair: _path(driver, seen[pair[0]], seen[pair[1]]) for pair in pairs},
        peers={pair: code == 0 for pair, code in status.items() if code is not None},
    )


def _card(driver: Driver, index: int, root: Path) -> Card:
    def number(field: str) -> int | None:
        return _int(driver.read(field, index))

    bus = _bus(_str(driver.read("bus", index)))
    clock, width = number("memory_clock_mhz"), number("bus_width_bits")
    return Card(
        index=index,
        uuid=_str(driver.read("uuid", index)),
        name=_str(driver.read("name", index)),
        bus=bus,
        numa=_numa(root, bus, number("memory_node")),
        memory_bytes=number("memory_bytes") or None,
        memory_bytes_per_s=clock * 1e6 * 2 * width / 8 if clock and width else None,
        pcie_generation=number("pcie_generation") or None,
        pcie_width=number("pcie_width") or None,
        slices=_slices(driver, index),
    )


def _slices(driver: Driver, index: int) -> tuple[Slice, ...]:
    if not driver.read("mig_mode", index):
        return ()
    found: list[Slice] = []
    for place in range(min(_MOST_SLICES, _int(driver.read("mig_places", index)) or 0)):
        uuid = _str(driver.read("slice_uuid", index, place))
        name = _str(driver.read("slice_name", index, place)) or ""
        profile = re.search(r"(?:\d+c\.)?(\d+g\.\d+gb\S*)", name)
        if uuid and profile and all(uuid != known.uuid for known in found):
            found.append(Slice(uuid, profile[1]))
    return tuple(found)


def _numa(root: Path, bus: str | None, node: int | None) -> int | None:
    """The kernel's word, else the driver's. The kernel writes -1 for a machine with one node."""
    if bus is not None:
        try:
            found = int((root / f"sys/bus/pci/devices/{bus}/numa_node").read_text())
        except (OSError, ValueError):
            return node
        return node if found < 0 else found
    return node


def _path(driver: Driver, first: Card, second: Card) -> tuple[str, bool]:
    level = _int(driver.read("ancestor", first.index, second.index))
    if level in _ANCESTORS:
        return _ANCESTORS[level], True
    apart = first.numa is not None and second.numa is not None and first.numa != second.numa
    return ("SYS" if apart else "PHB"), False


def _nvlinks(driver: Driver, cards: tuple[Card, ...]) -> tuple[NvlinkGroup, ...]:
    """One group behind the switches, one for each pair that is joined directly."""
    places = {card.bus: place for place, card in enumerate(cards) if card.bus}
    switched: dict[int, int] = {}
    direct: dict[tuple[int, int], int] = {}
    # Links from the first to the second; either end may fail to say.
    for place, card in enumerate(cards):
        for link in range(MOST_LINKS):
            if driver.read("nvlink_active", card.index, link) != 1:
                continue
            remote = places.get(
                _bus(_str(driver.read("nvlink_remote_bus", card.index, link))) or "", place
            )
            if remote != place:
                direct[place, remote] = direct.get((place, remote), 0) + 1
            elif driver.read("nvlink_remote_type", card.index, link) == _SWITCH:
                switched[place] = switched.get(place, 0) + 1
            elif _all_joined(driver, cards, card):
                # Neither its type nor its place is known, but NVLink copies to all are.
                switched[place] = switched.get(place, 0) + 1
    groups = []
    if len(switched) > 1:
        rates = [_rate(driver, cards[place], count) for place, count in switched.items()]
        known = [rate for rate in rates if rate is not None]
        slowest = min(known) if len(known) == len(rates) else None
        groups.append(NvlinkGroup(tuple(switched), slowest, True))
    for pair in sorted({(min(ends), max(ends)) for ends in direct}):
        count = max(direct.get(pair, 0), direct.get((pair[1], pair[0]), 0))
        groups.append(NvlinkGroup(pair, _rate(driver, cards[pair[0]], count), False))
    return tuple(groups)


def _all_joined(driver: Driver, cards: tuple[Card, ...], card: Card) -> bool:
    others = [other for other in cards if other is not card]
    states = (driver.read("p2p_status", card.index, other.index, NVLINK) for other in others)
    return bool(others) and all(state == 0 for state in states)


def _rate(driver: Driver, card: Card, num_links: int) -> float | None:
    speed = _int(driver.read("nvlink_mb_per_s", card.index))
    if not speed:
        return None
    nominal = [mb for mb in _LINK_MB_PER_S if mb <= speed <= mb * 1.08]
    return num_links * (nominal[0] if nominal else speed) * 1e6


def _bus(text: str | None) -> str | None:
    """The driver's `00000000:17:00.0` as /sys spells it; None for nothing and for zeros."""
    match = re.fullmatch(r"(?:([0-9A-Fa-f]+):)?([0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d)", text or "")
    if match is None or int(re.sub(r"\W", "", match[0]), 16) == 0:
        return None
    return f"{int(match[1] or '0', 16):04x}:{match[2].lower()}"


def _int(value: Value | None) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _str(value: Value | None) -> str | None:
    return value if isinstance(value, str) and value else None
