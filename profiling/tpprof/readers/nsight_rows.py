"""All rows of an Nsight Systems export, of all its processes, in the columns of `Rows`."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..events import NONE, Kind, Lane
from .assembly import MISSING, Rows, StringTable, join_rows, make_rows
from .kineto_columns import shape_text
from .nsight_tables import Tables, distinct_rows, distinct_values

THREAD = 0xFFFFFF
"""Bits of a globalTid that number the thread; those above it are the globalPid."""
_EVENT_TYPES = {
    "NvtxMark": 34, "NvtxPushPopRange": 59, "NvtxStartEndRange": 60,
    "NvtxtMark": 65, "NvtxtPushPopRange": 70, "NvtxtStartEndRange": 71,
}  # fmt: skip
"""What NVTX rows are kept. The others name threads, categories and domains, and have no length."""
_COPY_KINDS = {
    1: "HtoD", 2: "DtoH", 3: "HtoA", 4: "AtoH", 5: "AtoA", 6: "AtoD", 7: "DtoA", 8: "DtoD",
    9: "HtoH", 10: "PtoP", 11: "HtoD", 12: "DtoH", 13: "DtoD",
}  # fmt: skip
_MEMORY_KINDS = {0: "Pageable", 1: "Pinned", 2: "Device", 3: "Array", 4: "Managed"}
_SYNC_KINDS = {1: "Event Sync", 2: "Stream Wait Event", 3: "Stream Sync", 4: "Context Sync"}
"""Names as Kineto spells them, so that one run reads the same from both recorders."""
_API_VERSION = re.compile(r"_v\d+(?:_ptsz|_ptds)?\Z")
_TORCH_OP = re.compile(
    r"(?P<name>.*?)(?:, seq = -?\d+)?(?:, op_id = \d+)?(?:, sizes = (?P<sizes>\[.*?\]))?"
    r"(?:, input_op_ids = .*)?\Z",
    re.DOTALL,
)
"""What torch.autograd.profiler.emit_nvtx makes of an operator's name."""
_OPS_DOMAIN = "ops"
"""Where this project's own export puts operators."""
WHOLE_GRAPH = "CUDA graph (not recorded node by node)"


@dataclass
class Recording:
    """Rows of a whole file; `process` (globalPid) and `correlation` are columns beside them."""

    rows: Rows
    process: np.ndarray
    correlation: np.ndarray
    strings: StringTable
    lanes: list[Lane]
    num_whole_graphs: int = 0
    """Graph replays that are one row instead of one a kernel."""
    num_open: int = 0
    """Ranges that were still open when the recording ended."""


@dataclass
class _Collector:
    tables: Tables
    strings: StringTable = field(default_factory=StringTable)
    lanes: dict[Lane, int] = field(default_factory=dict)
    devices: dict[int, set[int]] = field(default_factory=dict)
    """By process (globalPid without its low 24 bits): the devices its streams are on."""
    pieces: list[Rows] = field(default_factory=list)
    process: list[np.ndarray] = field(default_factory=list)
    correlation: list[np.ndarray] = field(default_factory=list)

    def add(
        self,
        table: dict[str, np.ndarray],
        kind: int | np.ndarray,
        lane: np.ndarray,
        **columns: np.ndarray,
    ) -> None:
        """Rows of one table; `process` is made of globalTid or globalPid."""
        count = len(table["start"])
        if "globalTid" in table:
            process = np.where(table["globalTid"] >= 0, table["globalTid"] & ~THREAD, NONE)
        else:
            process = table["globalPid"]
        correlation = table.get("correlationId", np.full(count, NONE, np.int64))
        start = np.where(table["start"] == NONE, MISSING, table["start"])
        self.pieces.append(
            make_rows(
                count,
                start_ns=start,
                end_ns=table["end"],
                ordinal=correlation,
                lane=lane,
                kind=kind,
                **columns,
            )
        )
        self.process.append(process)
        self.correlation.append(correlation)

    def threads(self, table: dict[str, np.ndarray]) -> np.ndarray:
        """Lanes by globalTid."""
        told = table["globalTid"]
        process = np.where(told >= 0, told >> 24, NONE)
        distinct, back = distinct_rows(process, np.where(told >= 0, told & THREAD, NONE))
        lanes = [Lane(False, _pid(process), thread) for process, thread in distinct]
        return self._numbers(lanes)[back]

    def streams(self, table: dict[str, np.ndarray]) -> np.ndarray:
        """Lanes by process, device and stream."""
        told = table["globalPid"]
        process = np.where(told >= 0, told >> 24, NONE)
        distinct, back = distinct_rows(process, table["deviceId"], table["streamId"])
        lanes = []
        for one, device, stream in distinct:
            lanes.append(Lane(True, _pid(one), stream, device))
            self.devices.setdefault(one, set()).add(device)
        return self._numbers(lanes)[back]

    def texts(self, ids: np.ndarray, clean: bool = False) -> np.ndarray:
        """String numbers of StringIds; `clean` cuts the API version off."""
        named = self.tables.names(ids)
        distinct, back = distinct_values(ids)
        numbers = []
        for one in distinct.tolist():
            text = named.get(one)
            if text is not None and clean:
                text = _API_VERSION.sub("", text)
            numbers.append(self.strings[text])
        return np.array(numbers, np.int32)[back]

    def labels(self, *codes: np.ndarray, label: Callable[..., str]) -> np.ndarray:
        """String numbers of what `label` makes of each combination of codes."""
        distinct, back = distinct_rows(*codes)
        numbers = [self.strings[label(*row)] for row in distinct]
        return np.array(numbers, np.int32)[back]

    def _numbers(self, lanes: list[Lane]) -> np.ndarray:
        return np.array([self.lanes.setdefault(lane, len(self.lanes)) for lane in lanes], np.int32)


def read_rows(tables: Tables) -> Recording:
    """Everything that has a length, of all processes. Raises TraceError for a damaged file."""
    collector = _Collector(tables)
    num_whole = _add_kernels(collector)
    _add_copies(collector)
    _add_waits(collector)
    _add_calls(collector)
    num_open = _add_ranges(collector)
    rows = join_rows(collector.pieces)
    process = np.concatenate(collector.process)
    correlation = np.concatenate(collector.correlation)
    return Recording(
        rows, process, correlation, collector.strings, list(collector.lanes), num_whole, num_open
    )


_DEVICE = ["start", "end", "globalPid", "deviceId", "streamId", "correlationId", "graphNodeId"]


def _add_kernels(to: _Collector) -> int:
    """Kernels, and graph replays of which only the whole was recorded: how many of those."""
    name = "CUPTI_ACTIVITY_KIND_KERNEL"
    wanted = [*_DEVICE, "demangledName", "shortName", "gridX", "gridY", "gridZ"]
    table = to.tables.integers(name, wanted)
    ids = np.where(table["demangledName"] >= 0, table["demangledName"], table["shortName"])
    blocks = table["gridX"] * np.maximum(table["gridY"], 1) * np.maximum(table["gridZ"], 1)
    to.add(
        table,
        Kind.KERNEL,
        to.streams(table),
        name=to.texts(ids),
        node=_nodes(table),
        num_blocks=np.where(blocks > 0, blocks, NONE),
    )
    graphs = to.tables.integers("CUPTI_ACTIVITY_KIND_GRAPH_TRACE", _DEVICE)
    count = len(graphs["start"])
    named = np.full(count, to.strings[WHOLE_GRAPH] if count else NONE, np.int32)
    to.add(graphs, Kind.KERNEL, to.streams(graphs), name=named)
    return count


def _add_copies(to: _Collector) -> None:
    wanted = [*_DEVICE, "bytes", "copyKind", "srcKind", "dstKind"]
    table = to.tables.integers("CUPTI_ACTIVITY_KIND_MEMCPY", wanted)
    names = to.labels(table["copyKind"], table["srcKind"], table["dstKind"], label=_copy_label)
    to.add(
        table,
        Kind.COPY,
        to.streams(table),
        name=names,
        node=_nodes(table),
        num_bytes=table["bytes"],
    )
    table = to.tables.integers("CUPTI_ACTIVITY_KIND_MEMSET", [*_DEVICE, "bytes", "memKind"])
    to.add(
        table,
        Kind.MEMSET,
        to.streams(table),
        name=to.labels(table["memKind"], label=_fill_label),
        node=_nodes(table),
        num_bytes=table["bytes"],
    )


def _add_waits(to: _Collector) -> None:
    table = to.tables.integers("CUPTI_ACTIVITY_KIND_SYNCHRONIZATION", [*_DEVICE, "syncType"])
    # Waits are noted under device 0 even by processes that use another one.
    for process, devices in to.devices.items():
        if len(devices) == 1:
            mine = table["globalPid"] >> 24 == process
            table["deviceId"] = np.where(mine, next(iter(devices)), table["deviceId"])
    names = to.labels(table["syncType"], label=_wait_label)
    to.add(table, Kind.SYNC, to.streams(table), name=names)


def _add_calls(to: _Collector) -> None:
    wanted = ["start", "end", "globalTid", "correlationId", "nameId"]
    table = to.tables.integers("CUPTI_ACTIVITY_KIND_RUNTIME", wanted)
    to.add(table, Kind.LAUNCH, to.threads(table), name=to.texts(table["nameId"], clean=True))
    for name in ("CUPTI_ACTIVITY_KIND_OVERHEAD", "PROFILER_OVERHEAD"):
        table = to.tables.integers(name, ["start", "end", "globalTid", "nameId"])
        to.add(table, Kind.OVERHEAD, to.threads(table), name=to.texts(table["nameId"]))


def _add_ranges(to: _Collector) -> int:
    """NVTX ranges and marks; returns how many were still open, which end with the recording."""
    tables = to.tables
    if not tables.has("NVTX_EVENTS"):
        return 0
    known = _event_types(tables)
    # In the order of the file, because names and numbers are asked for one after the other.
    kept = ", ".join(str(known[name]) for name in _EVENT_TYPES)
    where = f"eventType IN ({kept}) ORDER BY rowid"
    columns = ["start", "end", "eventType", "globalTid", "domainId"]
    if "textId" in tables.columns("NVTX_EVENTS"):
        columns.append("textId")
    table = tables.integers("NVTX_EVENTS", columns, where)
    count = len(table["start"])
    kinds, names, shapes = _range_texts(to, table, where)
    is_open = table["end"] == NONE
    marks = np.isin(table["eventType"], [known["NvtxMark"], known["NvtxtMark"]])
    last = max((int(piece.end_ns.max()) for piece in to.pieces if len(piece)), default=0)
    last = max(last, int(table["end"].max()) if count else 0)
    table["end"] = np.where(
        is_open, np.where(marks, table["start"], np.maximum(last, table["start"])), table["end"]
    )
    to.add(table, kinds, to.threads(table), name=names, shapes=shapes)
    return int((is_open & ~marks).sum())


def _range_texts(
    to: _Collector, table: dict[str, np.ndarray], where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kind, name and shapes of NVTX rows. A name is its registered string, else its own text."""
    count = len(table["start"])
    ids = table.get("textId", np.full(count, NONE, np.int64))
    named = to.tables.names(ids)
    of_text: dict[str | None, tuple[int, int, int]] = {}
    for text in [None, *named.values()]:
        of_text[text] = _split_text(text, to.strings)
    entries = np.empty((count, 3), np.int32)
    distinct, back = distinct_values(ids)
    found = [of_text[named.get(one)] for one in distinct.tolist()]
    entries[:] = np.array(found, np.int32).reshape(-1, 3)[back]
    own = ids < 0
    if own.any() and "text" in to.tables.columns("NVTX_EVENTS"):
        unregistered = "COALESCE(textId, -1) < 0 AND " if "textId" in table else ""
        texts = to.tables.rows(f"SELECT text FROM NVTX_EVENTS WHERE {unregistered}{where}")
        places = []
        for (text,) in texts:
            entry = of_text.get(text)
            if entry is None:
                entry = of_text[text] = _split_text(text, to.strings)
            places.append(entry)
        entries[own] = np.array(places, np.int32).reshape(-1, 3)
    kinds = np.where(_in_ops_domain(to.tables, table), int(Kind.OP), entries[:, 0])
    return kinds.astype(np.int8), entries[:, 1], entries[:, 2]


def _split_text(text: str | None, strings: StringTable) -> tuple[int, int, int]:
    """(kind, name, shapes) of a range's text: torch's operators carry ids and sizes in theirs."""
    if text is None or not (", op_id = " in text or ", seq = " in text or ", sizes = " in text):
        return int(Kind.RANGE), strings[text], NONE
    found = _TORCH_OP.match(text)
    if found is None:
        return int(Kind.RANGE), strings[text], NONE
    name, sizes = found["name"], found["sizes"]
    shapes = shape_text(sizes.encode(), b"") if sizes else None
    is_op = "::" in name or name.startswith("detach")
    kind = Kind.OP if is_op else Kind.RANGE
    return int(kind), strings[name], NONE if shapes is None else strings[shapes]


def _in_ops_domain(tables: Tables, table: dict[str, np.ndarray]) -> np.ndarray:
    """bool: rows of the domain `ops`; domains are numbered per process."""
    there = tables.columns("NVTX_EVENTS")
    found = np.zeros(len(table["start"]), bool)
    if not {"domainId", "globalTid", "text"} <= there:
        return found
    number = _event_types(tables)["NvtxDomainCreate"]
    registered = "textId" in there and tables.has("StringIds")
    text = "COALESCE(s.value, n.text)" if registered else "n.text"
    join = " LEFT JOIN StringIds s ON s.id = n.textId" if registered else ""
    query = f"SELECT n.globalTid, n.domainId FROM NVTX_EVENTS n{join}"
    query += f" WHERE n.eventType = {number} AND {text} = ?"
    for thread, domain in tables.rows(query, (_OPS_DOMAIN,)):
        process = thread & ~THREAD
        found |= (table["globalTid"] & ~THREAD == process) & (table["domainId"] == domain)
    return found


def _event_types(tables: Tables) -> dict[str, int]:
    """Numbers of NVTX rows, as the file lists them or as they always were."""
    known = {**_EVENT_TYPES, "NvtxDomainCreate": 75}
    if {"id", "name"} <= tables.columns("ENUM_NSYS_EVENT_TYPE"):
        for number, name in tables.rows("SELECT id, name FROM ENUM_NSYS_EVENT_TYPE"):
            if name in known and isinstance(number, int):
                known[name] = number
    return known


def _nodes(table: dict[str, np.ndarray]) -> np.ndarray:
    return np.where(table["graphNodeId"] == 0, NONE, table["graphNodeId"])


def _pid(process: int) -> int:
    return process & 0xFFFFFF if process >= 0 else NONE


def _copy_label(kind: int, source: int, target: int) -> str:
    name = f"Memcpy {_COPY_KINDS.get(kind, 'Unknown')}"
    if source in _MEMORY_KINDS and target in _MEMORY_KINDS:
        name += f" ({_MEMORY_KINDS[source]} -> {_MEMORY_KINDS[target]})"
    return name


def _fill_label(kind: int) -> str:
    return f"Memset ({_MEMORY_KINDS.get(kind, 'Unknown')})"


def _wait_label(kind: int) -> str:
    return _SYNC_KINDS.get(kind, "Sync")
