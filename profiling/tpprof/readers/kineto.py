"""Kineto's JSON (.json, .json.gz), of torch's profiler and whoever uses it, to one `Trace`."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..errors import TraceError
from ..events import NONE, Device, Trace
from .assembly import LATEST_NS, Facts, Rows, assemble, broken_times
from .kineto_columns import Columns, as_number
from .kineto_json import BLOCK_BYTES, EventStream, Header
from .kineto_links import collectives, link

_STOPPED_EARLY = re.compile(r"CUPTI stopped early\? = ([1-9]\d*)")


def read_kineto(path: Path, rank: int | None = None, block_bytes: int = BLOCK_BYTES) -> Trace:
    """One rank's file as a `Trace`.

    Args:
        path: as torch's profiler exports it, plain or gzip, of any age.
        rank: what the file's name or the user says; else the file's own word counts, and NONE
            stands where it has none.
        block_bytes: how much is read at a time.
    Raises TraceError, naming file and byte, where no array of events begins. A file that breaks
    off later, or holds broken events, gives what is whole, with a warning.
    """
    stream, columns = EventStream(path, block_bytes), Columns()
    for events in stream:
        columns.add(events)
    header = stream.header
    if header.merged is not None:
        raise TraceError(
            f"{path} is what `tpprof merge` made of several ranks; name the ranks' own files"
        )
    facts = _facts(header, path, rank)
    rows, correlation, external = columns.rows()
    _tell_damage(facts, stream, columns)
    drop = broken_times(rows, facts)
    if drop.any():
        rows, correlation, external = _keep(~drop, rows, correlation, external, columns)
    link(rows, correlation, external, columns.strings)
    found = collectives(rows, columns.collectives, columns.strings)
    offset_ns = as_number(header.offset_ns) if header.offset_ns is not None else 0
    if abs(offset_ns) < LATEST_NS:
        rows = replace(rows, start_ns=rows.start_ns + offset_ns, end_ns=rows.end_ns + offset_ns)
    _add_groups(facts, columns)
    _name_devices(facts, columns)
    return assemble(rows, columns.strings.texts(), list(columns.lanes), found, facts)


def looks_recorded(path: Path) -> bool:
    """Whether JSON that nobody named may be one rank's recording, by its beginning: not a list of
    something else, nor what `tpprof merge` wrote."""
    stream = EventStream(path, 1 << 20)
    try:
        held = stream.read_header()
    except TraceError:
        return False
    return stream.header.merged is None and (not stream.is_bare or b'"ph"' in held)


def rank_in_header(path: Path) -> int | None:
    """The rank that the file says it is of, read without its events; None where it does not say.

    Raises TraceError where no array of events begins.
    """
    stream = EventStream(path, 1 << 20)
    stream.read_header()
    return _own_rank(stream.header)


def _own_rank(header: Header) -> int | None:
    told = header.distributed.get("rank") if isinstance(header.distributed, dict) else None
    number = as_number(told) if isinstance(told, int | str) and str(told).strip() else NONE
    return number if 0 <= number < 2**31 else None


def _facts(header: Header, path: Path, rank: int | None) -> Facts:
    own = _own_rank(header)
    facts = Facts(rank=rank if rank is not None else NONE, source=str(path), recorder="kineto")
    if rank is None and own is not None:
        facts.rank = own
    distributed = header.distributed if isinstance(header.distributed, dict) else {}
    size = as_number(distributed.get("world_size"))
    facts.world_size = size if 0 < size < 2**31 else NONE
    facts.devices = _devices(header.devices)
    facts.groups = _groups(distributed.get("pg_config"))
    log = header.log if isinstance(header.log, list) else [header.log]
    if any(isinstance(line, str) and _STOPPED_EARLY.search(line) for line in log):
        facts.lose(1, "CUPTI stopped before the recording ended; later kernels are missing")
    return facts


def _devices(listed: Any) -> dict[int, Device]:
    devices = {}
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            devices[entry["id"]] = Device(
                name=str(entry.get("name") or ""),
                num_sms=max(as_number(entry.get("numSms")), 0),
                memory_bytes=max(as_number(entry.get("totalGlobalMem")), 0),
            )
    return devices


def _groups(listed: Any) -> dict[str, tuple[int, ...]]:
    groups = {}
    entries = list(listed.values()) if isinstance(listed, dict) else listed
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and entry.get("pg_name") is not None:
            ranks = _ranks(entry.get("ranks"))
            if ranks:
                groups[str(entry["pg_name"])] = ranks
    return groups


def _ranks(listed: Any) -> tuple[int, ...]:
    """Ranks of a group: a list, or the text of one; nothing where a long one was cut short."""
    if isinstance(listed, str):
        try:
            listed = msgspec.json.decode(listed.strip())
        except msgspec.MsgspecError:
            return ()
    whole = isinstance(listed, list) and all(type(rank) is int and rank >= 0 for rank in listed)
    return tuple(listed) if whole else ()


def _add_groups(facts: Facts, columns: Columns) -> None:
    """Groups that only the collectives' own arguments list."""
    groups = dict(facts.groups)
    for arguments in columns.collectives.arguments:
        name = arguments.group_name
        if name is not None and str(name) not in groups:
            ranks = _ranks(arguments.group_ranks)
            if ranks:
                groups[str(name)] = ranks
    facts.groups = groups


def _name_devices(facts: Facts, columns: Columns) -> None:
    """Devices that are used under a number that nobody describes, where only one kind is there.

    ROCm numbers devices over the host in the events and over the visible ones in the header.
    """
    used = {lane.device for lane in columns.lanes if lane.is_device and lane.device != NONE}
    kinds = set(facts.devices.values())
    if len(kinds) == 1:
        kind = next(iter(kinds))
        facts.devices = {**dict.fromkeys(used, kind), **facts.devices}


def _tell_damage(facts: Facts, stream: EventStream, columns: Columns) -> None:
    for damage in stream.damage:
        facts.lose(1, f"{damage}; what is whole was read; record it again for the rest")
    facts.lose(stream.num_broken, "{n} events are not JSON and were left out")
    if columns.num_rounded:
        facts.warnings.append(
            f"{facts.source}: {columns.num_rounded} times are too large to be exact to the ns"
        )
    if columns.unknown:
        listed = ", ".join(f"{name} ({n})" for name, n in columns.unknown.most_common(5))
        facts.warnings.append(
            f"{facts.source}: rows of categories that are not known were left out: {listed}"
        )
    if not len(columns):
        facts.warnings.append(f"{facts.source}: it holds no events; was the profiler stopped?")


def _keep(
    kept: np.ndarray, rows: Rows, correlation: np.ndarray, external: np.ndarray, columns: Columns
) -> tuple[Rows, np.ndarray, np.ndarray]:
    """The rows kept, and the collectives on their new places."""
    place = np.cumsum(kept) - 1
    found = columns.collectives
    on = [index for index, row in enumerate(found.rows) if kept[row]]
    found.arguments = [found.arguments[index] for index in on]
    found.rows = [int(place[found.rows[index]]) for index in on]
    return rows.take(np.flatnonzero(kept)), correlation[kept], external[kept]
