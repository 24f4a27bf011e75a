"""The catalogue of known hardware: peaks, what is attainable of them, and the source of each.

It gives defaults. A topology file's own numbers go before it, a measurement before both.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import tpinfer
from tpinfer.config.ceilings import MemoryLevel, Rates
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import TopologyError
from tpinfer.config.origin import Origin
from tpinfer.config.strict_yaml import Entry, Fields, read_yaml

CATALOGUE_FILE = "catalogue.yaml"
LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 1e9, 4: 2e9, 5: 4e9, 6: 8e9}
"""One PCIe lane in one direction, per generation."""


@dataclass(frozen=True, slots=True)
class LinkTraits:
    """What a kind of path is known to do."""

    attainable: float
    """Bus bandwidth of a large all-reduce over the path's rate."""
    latency_s: float
    """Least time of a small all-reduce, without what peers add."""
    per_peer_s: float
    """What each rank beyond the first adds to that."""
    bytes_per_s: float | None = None
    """The path's rate where a file leaves it out; None where it must not."""
    origin: Origin = Origin.SPEC
    """`assumed` where no measurement or datasheet backs these."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as the catalogue knows it, beyond its rates."""

    sku: str
    rates: Rates
    source: str
    nvml_names: tuple[str, ...]
    """Patterns, one of which is found in the name that the driver gives the card."""
    port_bytes_per_s: dict[str, float]
    """Per kind of link, what all ports of this kind carry in one direction: `NVL`, `C2C`."""
    pcie: tuple[int, int]
    """(generation, lanes)."""
    copies_to_peers: bool = True
    """Whether the driver offers peer-to-peer copies over PCIe."""
    usd_per_hour: float | None = None
    price_source: str = ""
    """Who asks it; starts with `assumed` where nobody has looked it up."""

    @property
    def price_origin(self) -> Origin:
        """What stands behind the price."""
        return Origin.ASSUMED if self.price_source.startswith("assumed") else Origin.SPEC

    @property
    def pcie_bytes_per_s(self) -> float:
        """Its PCIe wire in one direction."""
        generation, width = self.pcie
        return LANE_BYTES_PER_S[generation] * width


@dataclass(frozen=True, slots=True)
class ProcessorEntry:
    """A host's processors as the catalogue knows them: what one core has, and what all share."""

    num_cores: int
    per_core: Rates
    shared: Rates
    names: tuple[str, ...] = ()
    """Patterns, one of which is found in the model name that the kernel shows."""
    source: str = ""

    def rates(self, num_cores: int | None, num_sockets: int = 1) -> Rates:
        """Rates of a host with `num_cores` of these cores (None: as many as the catalogue says) on
        `num_sockets` sockets."""
        count = num_cores or self.num_cores * num_sockets
        levels = [
            MemoryLevel(level.name, level.capacity_bytes * count, level.bytes_per_s * count)
            for level in self.per_core.memory
        ]
        flops = {dtype: rate * count for dtype, rate in self.per_core.flops_per_s.items()}
        shared = [
            MemoryLevel(
                level.name, level.capacity_bytes * num_sockets, level.bytes_per_s * num_sockets
            )
            for level in self.shared.memory
        ]
        return replace(
            self.shared,
            memory=(*levels, *shared),
            flops_per_s={**self.shared.flops_per_s, **flops},
            origins={**self.shared.origins, **self.per_core.origins},
        )


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All entries."""

    gpus: dict[str, Rates]
    cpus: dict[str, ProcessorEntry]
    links: dict[str, LinkTraits]
    cards: dict[str, Card]
    staged: LinkTraits
    """Paths through the host's memory between GPUs that may not copy to each other."""

    def card_named(self, name: str) -> str | None:
        """The sku of the card that the driver calls `name`; None for an unknown one."""
        found = {
            pattern: card.sku
            for card in self.cards.values()
            for pattern in card.nvml_names
            if re.search(rf"(?<![0-9A-Za-z]){pattern}(?![0-9A-Za-z])", name)
        }
        return found[max(found, key=len)] if found else None

    def processor_named(self, name: str) -> str | None:
        """The sku of the processor that the kernel calls `name`; None for an unknown one."""
        for sku, entry in self.cpus.items():
            if any(re.search(pattern, name, re.I) for pattern in entry.names):
                return sku
        return None


def shipped_directory() -> Path:
    """Where topologies lie: inside the installed package, or beside it in a checkout.

    Raises TopologyError where they were left out of the installation.
    """
    package = Path(tpinfer.__file__).parent
    for folder in (package / "topologies", package.parent / "topologies"):
        if (folder / CATALOGUE_FILE).is_file():
            return folder
    raise TopologyError(
        f"{CATALOGUE_FILE} is neither in {package} nor beside it; install tpinfer again"
    )


@cache
def read_catalogue() -> Catalogue:
    """The shipped catalogue. Raises TopologyError naming file and line."""
    return parse_catalogue(read_yaml(shipped_directory() / CATALOGUE_FILE))


def parse_catalogue(document: Entry) -> Catalogue:
    """The entries of a catalogue document. Raises TopologyError naming file and line."""
    fields = document.fields("version", "gpus", "cpus", "links", "staged")
    fields.need("version").choice("1")
    cards = {key.text(): _gpu(key.text(), entry) for key, entry in fields.need("gpus").pairs()}
    return Catalogue(
        gpus={sku: card.rates for sku, card in cards.items()},
        cpus={key.text(): _cpu(key.text(), entry) for key, entry in fields.need("cpus").pairs()},
        links={key.text(): _link(entry) for key, entry in fields.need("links").pairs()},
        cards=cards,
        staged=_link(fields.need("staged")),
    )


def read_dtype(key: Entry) -> DType:
    """A dtype used as a key."""
    return DType(key.choice(*DType))


def _gpu(sku: str, entry: Entry) -> Card:
    keys = ("nvml", "source", "assumed", "memory", "flops", "kernel_floor", "links", "p2p", "price")
    fields = entry.fields(*keys)
    links = fields.need("links").fields("NVL", "C2C", "pcie")
    ports = {kind: links.need(kind).rate() for kind in ("NVL", "C2C") if kind in links}
    wire = links.need("pcie").fields("gen", "width")
    p2p, price = fields.get("p2p"), fields.get("price")
    priced = price.fields("per_hour", "source") if price else None
    return Card(
        sku=sku,
        rates=_rates(sku, fields, per_core=None),
        source=fields.need("source").text(),
        nvml_names=tuple(name.text() for name in fields.need("nvml").sequence()),
        port_bytes_per_s=ports,
        pcie=(read_generation(wire.need("gen")), wire.need("width").count()),
        copies_to_peers=p2p.flag() if p2p else True,
        usd_per_hour=priced.need("per_hour").price() if priced else None,
        price_source=priced.need("source").text() if priced else "",
    )


def read_generation(entry: Entry) -> int:
    """A PCIe generation with known lane rates."""
    return int(entry.choice(*map(str, LANE_BYTES_PER_S)))


def _cpu(sku: str, entry: Entry) -> ProcessorEntry:
    fields = entry.fields("names", "source", "assumed", "cores", "memory", "flops", "kernel_floor")
    names = fields.get("names")
    return ProcessorEntry(
        num_cores=fields.need("cores").count(),
        per_core=_rates(sku, fields, per_core=True),
        shared=_rates(sku, fields, per_core=False),
        names=tuple(name.text() for name in names.sequence()) if names else (),
        source=fields.need("source").text(),
    )


def _rates(sku: str, fields: Fields, per_core: bool | None) -> Rates:
    """An entry's rates: those marked `per: core`, those not, or (None) marks are errors."""
    marks = () if per_core is None else ("per",)
    levels: list[MemoryLevel] = []
    flops: dict[DType, float] = {}
    peak_bytes_per_s = 0.0
    for key, value in fields.need("memory").pairs():
        level = value.fields("capacity", "rate", "attainable", *marks)
        if _is_per_core(level) == bool(per_core):
            peak_bytes_per_s = level.need("rate").rate()
            rate = peak_bytes_per_s * _share(level)
            levels.append(MemoryLevel(key.text(), level.need("capacity").size(), rate))
    for key, value in fields.need("flops").pairs():
        peak = value.fields("peak", "attainable", *marks)
        if _is_per_core(peak) == bool(per_core):
            flops[read_dtype(key)] = peak.need("peak").flops() * _share(peak)
    assumed = fields.get("assumed")
    return Rates(
        memory=tuple(levels),
        flops_per_s=flops,
        kernel_floor_s=fields.need("kernel_floor").time(),
        origin=f"catalogue {sku}",
        origins=_origins(levels, flops, assumed.sequence() if assumed else []),
        peak_memory_bytes_per_s=peak_bytes_per_s,
    )


def _origins(
    levels: Iterable[MemoryLevel], flops: Iterable[DType], assumed: list[Entry]
) -> dict[str, Origin]:
    """What no source backs is named by `assumed`: a value, or a group of values by its start."""
    names = [f"memory.{level.name}.{what}" for level in levels for what in ("capacity", "rate")]
    names += [f"flops.{dtype}" for dtype in flops]
    named = [entry.text() for entry in assumed]

    def origin(name: str) -> Origin:
        is_guess = any(name == start or name.startswith(f"{start}.") for start in named)
        return Origin.ASSUMED if is_guess else Origin.SPEC

    return {name: origin(name) for name in (*names, "kernel_floor")}


def _is_per_core(fields: Fields) -> bool:
    mark = fields.get("per")
    return mark is not None and mark.choice("core") == "core"


def _share(fields: Fields) -> float:
    """The attainable share of a peak, 1 where left out."""
    entry = fields.get("attainable")
    share = 1.0 if entry is None else entry.ratio()
    if entry is not None and share > 1:
        raise entry.error(f"is {share}; what is attainable is at most 1 of the peak")
    return share


def _link(entry: Entry) -> LinkTraits:
    fields = entry.fields("attainable", "latency", "per_peer", "rate", "source")
    source = fields.need("source").text()
    rate = fields.get("rate")
    return LinkTraits(
        _share(fields),
        fields.need("latency").time(),
        fields.need("per_peer").time(),
        rate.rate() if rate else None,
        Origin.ASSUMED if source.startswith("assumed") else Origin.SPEC,
    )
