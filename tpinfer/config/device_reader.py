"""What a topology file says about GPUs and MIG slices, and its `ceilings:` blocks."""

import re
from dataclasses import replace

from tpinfer.config.catalogue import Catalogue, read_dtype
from tpinfer.config.ceilings import CeilingOverrides, MemoryLevel, Rates
from tpinfer.config.dtypes import DType
from tpinfer.config.machine_parts import Device
from tpinfer.config.origin import Origin
from tpinfer.config.strict_yaml import Entry, Fields

_MEMORY_LEVELS = ("L1", "L2", "L3", "DRAM", "HBM")
_MIG_SLICES = 7
"""Compute slices of a card that MIG profiles count in: `3g` has three."""
_GPU_KEYS = ("sku", "name", "ids", "uuid", "numa", "mig", "parent", "mem", "mem_bw", "ceilings")
_UNKNOWN_MEMORY_SHARE, _UNKNOWN_FLOOR_S = 0.8, 4e-6
"""What a card that the catalogue lacks is taken to reach of its memory's peak, and its floor."""


def read_gpus(entry: Entry, catalogue: Catalogue) -> list[Device]:
    """`gpus`: a list of entries, or one. Raises TopologyError naming file and line."""
    devices: list[Device] = []
    for item in entry.items():
        for device in _gpus(item, catalogue):
            if any(known.id == device.id for known in devices):
                raise item.error(f"gives the id {device.id} again; ids are unique on a host")
            devices.append(device)
    if not devices:
        raise entry.error("is empty; list a GPU or leave the key out")
    _check_slices(entry, devices, catalogue)
    return devices


def read_origin(fields: Fields, default: Origin = Origin.SPEC) -> Origin:
    """`from: nvml`, or the default."""
    entry = fields.get("from")
    return Origin(entry.choice(*Origin)) if entry else default


def _gpus(entry: Entry, catalogue: Catalogue) -> list[Device]:
    """One entry of `gpus`: several alike by `ids`, or by `uuid`."""
    fields = entry.fields(*_GPU_KEYS, "from")
    if ("ids" in fields) == ("uuid" in fields):
        raise entry.error("needs either ids (such as 0..7) or uuid")
    if "sku" not in fields and "name" not in fields:
        fields.need("sku")
    sku = fields.need("sku").choice(*catalogue.gpus) if "sku" in fields else None
    names = fields.need("uuid" if "uuid" in fields else "ids")
    numa, mig, parent = (fields.get(key) for key in ("numa", "mig", "parent"))
    if mig and not parent:
        raise mig.error("is a slice of a card; name the card with parent (an index or UUID)")
    if parent and not mig:
        raise parent.error("is for MIG slices; give the profile with mig, like 3g.71gb")
    origin = read_origin(fields)
    file_overrides, set_overrides = read_overrides(fields.get("ceilings"))
    card = catalogue.cards[sku] if sku else None
    if card is None:
        rates = _unknown_card(fields, origin)
    else:
        rates = _stated(fields, _mig_rates(mig, card.rates) if mig else card.rates, origin)
    device = Device(
        id="",
        kind="gpu",
        sku=sku,
        mig=mig.text() if mig else None,
        parent=parent.text() if parent else None,
        rates=rates,
        overrides=file_overrides,
        set_overrides=set_overrides,
        pcie_bytes_per_s=card.pcie_bytes_per_s if card else None,
        copies_to_peers=card.copies_to_peers if card else True,
        usd_per_hour=card.usd_per_hour if card else None,
        origin=origin,
    )
    nodes = numa_of(numa, names.ids()) if numa else {}
    return [replace(device, id=name, numa=nodes.get(name)) for name in names.ids()]


def _unknown_card(fields: Fields, origin: Origin) -> Rates | None:
    """Rates of a card that is not in the catalogue, without its arithmetic, which `ceilings` must
    give; None where the file does not say what its memory is and does."""
    mem, mem_bw = fields.get("mem"), fields.get("mem_bw")
    if mem is None or mem_bw is None:
        return None
    peak = mem_bw.rate()
    return Rates(
        memory=(MemoryLevel("HBM", mem.size(), peak * _UNKNOWN_MEMORY_SHARE),),
        flops_per_s={},
        kernel_floor_s=_UNKNOWN_FLOOR_S,
        origin="a card that the catalogue lacks",
        origins={
            "memory.HBM.capacity": origin,
            "memory.HBM.rate": Origin.ASSUMED,
            "kernel_floor": Origin.ASSUMED,
        },
        peak_memory_bytes_per_s=peak,
    )


def _stated(fields: Fields, rates: Rates, origin: Origin) -> Rates:
    """`mem` and `mem_bw` of the device itself, in place of the catalogue's. `mem_bw` is the peak,
    as memory clock times bus width give it; what is attainable of it stays the card's share."""
    mem, mem_bw = fields.get("mem"), fields.get("mem_bw")
    *caches, last = rates.memory
    share = last.bytes_per_s / rates.peak_memory_bytes_per_s if mem_bw else 1.0
    level = MemoryLevel(
        last.name,
        mem.size() if mem else last.capacity_bytes,
        mem_bw.rate() * share if mem_bw else last.bytes_per_s,
    )
    origins = dict(rates.origins)
    for what, value in (("capacity", mem), ("rate", mem_bw)):
        if value:
            origins[f"memory.{last.name}.{what}"] = Origin.ASSUMED if value.is_set else origin
    return replace(rates, memory=(*caches, level), origins=origins)


def numa_of(entry: Entry, ids: tuple[str, ...]) -> dict[str, int]:
    """`1` for all, or `{0: 0..3, 1: 4..7}`."""
    if entry.is_scalar:
        return dict.fromkeys(ids, entry.count(least=0))
    nodes: dict[str, int] = {}
    for key, value in entry.pairs():
        for name in value.ids():
            if name not in ids and name.isdigit() and int(name) < len(ids):
                name = ids[int(name)]
            if name not in ids:
                raise value.error(f"names device {name!r}; ids here are {', '.join(ids)}")
            if name in nodes:
                raise value.error(f"puts device {name} on a second node; give it one")
            nodes[name] = key.count(least=0)
    return nodes


def _mig_rates(entry: Entry, card: Rates) -> Rates:
    """Rates of a MIG slice: `3g.71gb` has 3/7 of the card's arithmetic and 71 GB of its memory,
    with bandwidth in proportion to the memory (NVIDIA MIG User Guide, "GPU instance")."""
    slices, num_bytes = _profile(entry.text())
    whole = card.memory[-1].capacity_bytes
    if not 0 < num_bytes <= whole * 1.05:
        raise entry.error(f"is {entry.text()!r}; write a profile of this card, like 3g.71gb")
    compute_share = slices / _MIG_SLICES
    memory_share = min(1.0, num_bytes / whole)
    return replace(
        card,
        memory=tuple(
            MemoryLevel(m.name, int(m.capacity_bytes * memory_share), m.bytes_per_s * memory_share)
            for m in card.memory
        ),
        flops_per_s={dtype: rate * compute_share for dtype, rate in card.flops_per_s.items()},
        peak_memory_bytes_per_s=card.peak_memory_bytes_per_s * memory_share,
    )


def _profile(text: str) -> tuple[int, int]:
    """(compute slices, bytes) of `3g.71gb` or `1g.10gb+me`; zeros for anything else."""
    match = re.fullmatch(r"([1-7])g\.(\d+)gb(\+\w+(\.\w+)*)?", text)
    return (int(match[1]), int(match[2]) * 10**9) if match else (0, 0)


def _check_slices(entry: Entry, devices: list[Device], catalogue: Catalogue) -> None:
    """MIG slices fit their card, and a card that is cut is not used whole."""
    whole = {device.id for device in devices if not device.mig}
    for parent in dict.fromkeys(device.parent for device in devices if device.parent):
        slices = [device for device in devices if device.parent == parent]
        if parent in whole:
            raise entry.error(
                f"lists card {parent} whole and in slices; a card in MIG mode is used in slices "
                "only, so drop one"
            )
        profiles = [_profile(device.mig or "") for device in slices]
        compute, memory = (sum(column) for column in zip(*profiles, strict=True))
        if slices[0].sku is None:
            continue
        capacity = catalogue.gpus[slices[0].sku].memory[-1].capacity_bytes
        if compute > _MIG_SLICES or memory > capacity * 1.05:
            named = ", ".join(str(device.mig) for device in slices)
            raise entry.error(
                f"cuts card {parent} into {named}, more than its {_MIG_SLICES} compute slices and "
                f"{capacity / 1e9:g} GB; take smaller profiles or other parents"
            )


def read_overrides(entry: Entry | None) -> tuple[CeilingOverrides, CeilingOverrides]:
    """A `ceilings:` block, as the file gives it and as `--set` does."""
    if entry is None:
        return CeilingOverrides(), CeilingOverrides()
    stated, supposed = (_overrides(entry, is_set) for is_set in (False, True))
    return stated.marked(Origin.SPEC), supposed.marked(Origin.ASSUMED)


def _overrides(entry: Entry, is_set: bool) -> CeilingOverrides:
    """The values of a `ceilings:` block that come from `--set`, or (False) from the file."""

    def mine(fields: Fields, key: str) -> Entry | None:
        found = fields.get(key)
        return found if found and found.is_set == is_set else None

    fields = entry.fields("memory", "flops", "kernel_floor", "all_reduce")
    memory, flops, reduce = (fields.get(key) for key in ("memory", "flops", "all_reduce"))
    levels: dict[str, tuple[int | None, float | None]] = {}
    for key, value in memory.pairs() if memory else ():
        level = value.fields("capacity", "rate")
        capacity, rate = mine(level, "capacity"), mine(level, "rate")
        name = key.choice(*_MEMORY_LEVELS)
        if capacity or rate:
            levels[name] = (
                capacity.size() if capacity else None,
                rate.rate() if rate else None,
            )
    rates: dict[DType, float] = {}
    for key, value in flops.pairs() if flops else ():
        dtype = read_dtype(key)
        if value.is_set == is_set:
            rates[dtype] = value.flops()
    collective = reduce.fields("latency", "rate") if reduce else Fields(entry, {})
    floor = mine(fields, "kernel_floor")
    latency, bandwidth = mine(collective, "latency"), mine(collective, "rate")
    return CeilingOverrides(
        memory=levels,
        flops_per_s=rates,
        kernel_floor_s=floor.time() if floor else None,
        collective_latency_s=latency.time() if latency else None,
        collective_bytes_per_s=bandwidth.rate() if bandwidth else None,
    )
