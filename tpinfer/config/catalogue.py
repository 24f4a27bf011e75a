"""The catalogue of known hardware: peaks, what is attainable of them, and the source of each.

It gives defaults. A topology file's own numbers go before it, a measurement before both.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import tpinfer
from tpinfer.config.ceilings import MemoryLevel, Rates
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import TopologyError
from tpinfer.config.strict_yaml import Entry, Fields, read_yaml

CATALOGUE_FILE = "catalogue.yaml"


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


@dataclass(frozen=True, slots=True)
class ProcessorEntry:
    """A host's processors as the catalogue knows them: what one core has, and what all share."""

    num_cores: int
    per_core: Rates
    shared: Rates

    def rates(self, num_cores: int | None) -> Rates:
        """Rates of a host with `num_cores` of these cores (None: as many as the catalogue says)."""
        count = num_cores or self.num_cores
        levels = [
            MemoryLevel(level.name, level.capacity_bytes * count, level.bytes_per_s * count)
            for level in self.per_core.memory
        ]
        flops = {dtype: rate * count for dtype, rate in self.per_core.flops_per_s.items()}
        return replace(
            self.shared,
            memory=(*levels, *self.shared.memory),
            flops_per_s={**self.shared.flops_per_s, **flops},
        )


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All entries."""

    gpus: dict[str, Rates]
    cpus: dict[str, ProcessorEntry]
    links: dict[str, LinkTraits]


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
    fields = document.fields("version", "gpus", "cpus", "links")
    fields.need("version").choice("1")
    return Catalogue(
        gpus={key.text(): _gpu(key.text(), entry) for key, entry in fields.need("gpus").pairs()},
        cpus={key.text(): _cpu(key.text(), entry) for key, entry in fields.need("cpus").pairs()},
        links={key.text(): _link(entry) for key, entry in fields.need("links").pairs()},
    )


def read_dtype(key: Entry) -> DType:
    """A dtype used as a key."""
    return DType(key.choice(*DType))


def _gpu(sku: str, entry: Entry) -> Rates:
    fields = entry.fields("source", "memory", "flops", "kernel_floor")
    return _rates(sku, fields, per_core=None)


def _cpu(sku: str, entry: Entry) -> ProcessorEntry:
    fields = entry.fields("source", "cores", "memory", "flops", "kernel_floor")
    return ProcessorEntry(
        num_cores=fields.need("cores").count(),
        per_core=_rates(sku, fields, per_core=True),
        shared=_rates(sku, fields, per_core=False),
    )


def _rates(sku: str, fields: Fields, per_core: bool | None) -> Rates:
    """An entry's rates: those marked `per: core`, those not, or (None) marks are errors."""
    fields.need("source").text()
    marks = () if per_core is None else ("per",)
    levels: list[MemoryLevel] = []
    flops: dict[DType, float] = {}
    for key, value in fields.need("memory").pairs():
        level = value.fields("capacity", "rate", "attainable", *marks)
        if _is_per_core(level) == bool(per_core):
            rate = level.need("rate").rate() * _share(level)
            levels.append(MemoryLevel(key.text(), level.need("capacity").size(), rate))
    for key, value in fields.need("flops").pairs():
        peak = value.fields("peak", "attainable", *marks)
        if _is_per_core(peak) == bool(per_core):
            flops[read_dtype(key)] = peak.need("peak").flops() * _share(peak)
    return Rates(
        memory=tuple(levels),
        flops_per_s=flops,
        kernel_floor_s=fields.need("kernel_floor").time(),
        origin=f"catalogue {sku}",
    )


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
    fields.need("source").text()
    rate = fields.get("rate")
    return LinkTraits(
        _share(fields),
        fields.need("latency").time(),
        fields.need("per_peer").time(),
        rate.rate() if rate else None,
    )
