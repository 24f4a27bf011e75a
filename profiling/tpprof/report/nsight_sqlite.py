"""The events of all ranks in the SQLite schema of Nsight Systems, for `nsys stats` and its recipes.

Tables and columns as in exports of schema 3.x (see `nsys export --help` and its documentation);
what a trace does not know is 0 or NULL. Each rank is a process. Times are ns since the first event,
whose absolute time stands in TARGET_INFO_SESSION_START_TIME. Kernels keep name, stream, grid size
and graph node; annotations and operators become NVTX push/pop ranges, operators in the domain
`ops`. Nothing of a process environment is written.
"""

import re
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from tpprof.errors import TraceError
from tpprof.events import NONE, Kind, Trace

_SCHEMA = """
CREATE TABLE META_DATA_EXPORT (name TEXT NOT NULL, value TEXT);
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE PROCESSES (globalPid INTEGER, pid INTEGER, name TEXT);
CREATE TABLE ThreadNames (nameId INTEGER NOT NULL, priority INTEGER, globalTid INTEGER);
CREATE TABLE TARGET_INFO_SESSION_START_TIME (utcEpochNs INTEGER, utcTime TEXT, localTime TEXT);
CREATE TABLE TARGET_INFO_GPU (
    id INTEGER, name TEXT, totalMemory INTEGER, smCount INTEGER, memoryBandwidth INTEGER,
    l2CacheSize INTEGER);
CREATE TABLE ENUM_NSYS_EVENT_TYPE (id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
CREATE TABLE ENUM_CUDA_MEMCPY_OPER (id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
CREATE TABLE ENUM_CUDA_MEM_KIND (id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (
    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL,
    correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL,
    shortName INTEGER NOT NULL, mangledName INTEGER, launchType INTEGER, cacheConfig INTEGER,
    registersPerThread INTEGER NOT NULL, gridX INTEGER NOT NULL, gridY INTEGER NOT NULL,
    gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL, blockY INTEGER NOT NULL,
    blockZ INTEGER NOT NULL, staticSharedMemory INTEGER NOT NULL,
    dynamicSharedMemory INTEGER NOT NULL, localMemoryPerThread INTEGER NOT NULL,
    localMemoryTotal INTEGER NOT NULL, gridId INTEGER NOT NULL, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (
    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL,
    correlationId INTEGER, globalPid INTEGER, bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL,
    srcKind INTEGER, dstKind INTEGER, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET (
    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL,
    correlationId INTEGER, globalPid INTEGER, value INTEGER NOT NULL, bytes INTEGER NOT NULL,
    graphNodeId INTEGER, memKind INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_SYNCHRONIZATION (
    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL,
    correlationId INTEGER, globalPid INTEGER, syncType INTEGER NOT NULL, eventId INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (
    start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL, globalTid INTEGER,
    correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL,
    callchainId INTEGER);
CREATE TABLE NVTX_EVENTS (
    start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
    category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER,
    textId INTEGER, domainId INTEGER, uint64Value INTEGER, int64Value INTEGER, doubleValue REAL,
    uint32Value INTEGER, int32Value INTEGER, floatValue REAL, jsonTextId INTEGER, jsonText TEXT,
    binaryData TEXT);
"""
_SCHEMA_VERSION = {"": "3.11.0", "_MAJOR": "3", "_MINOR": "11", "_MICRO": "0"}
_PUSH_POP, _DOMAIN_CREATE = 59, 75
_OPS_DOMAIN = 1
_STREAM_WAIT = 2
_COPIES = {1: "hto?d|host-to-device", 2: "dto?h|device-to-host", 8: "dtod|device-to-device"}
_COPIES |= {10: "ptop|peer-to-peer"}
"""Number of a copy's direction -> how recorders spell it."""
_MEMORIES = {"Pageable": 0, "Pinned": 1, "Device": 2, "Array": 3, "Managed": 4, "Unknown": 7}
_ENUMS = {
    "ENUM_NSYS_EVENT_TYPE": [
        (59, "NvtxPushPopRange", "NvtxPushPopRange"),
        (60, "NvtxStartEndRange", "NvtxStartEndRange"),
        (75, "NvtxDomainCreate", "NvtxDomainCreate"),
    ],
    "ENUM_CUDA_MEMCPY_OPER": [
        (0, "CUDA_MEMCPY_KIND_UNKNOWN", "Unknown"),
        (1, "CUDA_MEMCPY_KIND_HTOD", "Host-to-Device"),
        (2, "CUDA_MEMCPY_KIND_DTOH", "Device-to-Host"),
        (8, "CUDA_MEMCPY_KIND_DTOD", "Device-to-Device"),
        (10, "CUDA_MEMCPY_KIND_PTOP", "Peer-to-Peer"),
    ],
    "ENUM_CUDA_MEM_KIND": [
        (i, f"CUDA_MEMOPR_MEMORY_KIND_{label.upper()}", label) for label, i in _MEMORIES.items()
    ],
}


def write_nsight(path: Path, traces: Sequence[Trace]) -> int:
    """Write a new file; returns the number of events. Raises TraceError where it exists or cannot
    be written."""
    if path.exists():
        raise TraceError(f"{path} exists; remove it or name another file with --nsys-sqlite")
    zero = min((int(trace.start_ns[0]) for trace in traces if len(trace)), default=0)
    try:
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA journal_mode = OFF")
            database.executescript(_SCHEMA)
            strings = _Strings()
            count = 0
            for trace, pid in zip(traces, _pids(traces), strict=True):
                count += _Writer(database, trace, pid, zero, strings).write()
            _insert(database, "StringIds", enumerate(strings.texts))
            _insert(database, "META_DATA_EXPORT", _facts())
            _insert(database, "TARGET_INFO_SESSION_START_TIME", [(zero, None, None)])
            for name, rows in _ENUMS.items():
                _insert(database, name, rows)
            _drop_empty(database)
            database.commit()
    except sqlite3.Error as error:
        path.unlink(missing_ok=True)
        raise TraceError(f"{path} cannot be written: {error}; name another file") from None
    return count


def _drop_empty(database: sqlite3.Connection) -> None:
    """Nsight makes tables only where there are rows; its reports tell by that what was recorded."""
    tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (name,) in tables:
        if database.execute(f"SELECT NOT EXISTS (SELECT 1 FROM {name})").fetchone()[0]:
            database.execute(f"DROP TABLE {name}")


def _facts() -> list[tuple[str, str]]:
    return [
        *((f"EXPORT_SCHEMA_VERSION{part}", text) for part, text in _SCHEMA_VERSION.items()),
        ("EXPORT_PRODUCT_VERSION", "tpprof"),
    ]


def _insert(database: sqlite3.Connection, table: str, rows: Iterable[Sequence[object]]) -> None:
    """Rows with as many values as the table's first columns."""
    found = list(rows)
    if found:
        marks = ", ".join("?" * len(found[0]))
        database.executemany(f"INSERT INTO {table} VALUES ({marks})", found)


def _pids(traces: Sequence[Trace]) -> list[int]:
    """One process number a rank, its own where no other rank has the same; 24 bits."""
    own = [
        next((lane.pid for lane in trace.lanes if not lane.is_device and lane.pid > 0), 0)
        for trace in traces
    ]
    return [
        pid if 0 < pid < 1 << 24 and own.count(pid) == 1 else (1 << 23) + trace.rank
        for pid, trace in zip(own, traces, strict=True)
    ]


class _Strings:
    """StringIds: one number a text."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._number: dict[str, int] = {}

    def number(self, text: str) -> int:
        if text not in self._number:
            self._number[text] = len(self.texts)
            self.texts.append(text)
        return self._number[text]


class _Writer:
    """The rows of one rank."""

    def __init__(
        self, database: sqlite3.Connection, trace: Trace, pid: int, zero_ns: int, strings: _Strings
    ) -> None:
        self._database = database
        self._trace = trace
        self._global_pid = (1 << 48) | (pid << 24)
        self._zero_ns = zero_ns
        self._names = [strings.number(text) for text in trace.strings]
        self._title = strings.number(f"rank {trace.rank}")
        self._process = (self._global_pid, pid, f"rank {trace.rank}")

    def write(self) -> int:
        """Insert everything; returns the number of events."""
        trace, insert = self._trace, _insert
        insert(self._database, "PROCESSES", [self._process])
        devices = [
            (i, d.name, d.memory_bytes, d.num_sms, int(d.memory_bytes_per_s), d.l2_bytes)
            for i, d in sorted(trace.devices.items())
        ]
        known = {row[0] for row in self._database.execute("SELECT id FROM TARGET_INFO_GPU")}
        insert(self._database, "TARGET_INFO_GPU", [row for row in devices if row[0] not in known])
        insert(self._database, "ThreadNames", self._thread_names())
        tables = {
            "CUPTI_ACTIVITY_KIND_KERNEL": self._kernels(),
            "CUPTI_ACTIVITY_KIND_MEMCPY": self._copies(),
            "CUPTI_ACTIVITY_KIND_MEMSET": self._memsets(),
            "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION": self._waits(),
            "CUPTI_ACTIVITY_KIND_RUNTIME": self._calls(),
            "NVTX_EVENTS": self._ranges(),
        }
        for name, rows in tables.items():
            insert(self._database, name, rows)
        return sum(len(rows) for rows in tables.values())

    def _times(self, rows: np.ndarray) -> list[tuple[int, int]]:
        start, end = (self._trace.start_ns - self._zero_ns, self._trace.end_ns - self._zero_ns)
        return list(zip(start[rows].tolist(), end[rows].tolist(), strict=True))

    def _device_columns(self, rows: np.ndarray) -> list[tuple[object, ...]]:
        """deviceId, contextId, greenContextId, streamId, correlationId, globalPid."""
        trace = self._trace
        lanes = [trace.lanes[i] for i in trace.lane[rows].tolist()]
        launches = trace.launch[rows].tolist()
        return [
            (
                max(lane.device, 0), 1, None, max(lane.tid, 0),
                launch + 1 if launch != NONE else None, self._global_pid,
            )
            for lane, launch in zip(lanes, launches, strict=True)
        ]  # fmt: skip

    def _kernels(self) -> list[tuple[object, ...]]:
        trace = self._trace
        rows = trace.rows_of(Kind.KERNEL)
        columns = (trace.name[rows], np.maximum(trace.num_blocks[rows], 1), trace.node[rows], rows)
        each = zip(
            self._times(rows),
            self._device_columns(rows),
            *(c.tolist() for c in columns),
            strict=True,
        )
        return [
            (
                *times, *device, self._names[name], self._names[name], None, None, None, 0, blocks,
                1, 1, 0, 1, 1, 0, 0, 0, 0, row, None if node == NONE else node,
            )
            for times, device, name, blocks, node, row in each
        ]  # fmt: skip

    def _copies(self) -> list[tuple[object, ...]]:
        trace = self._trace
        rows = trace.rows_of(Kind.COPY)
        kinds = [_copy_kinds(text) for text in trace.strings]
        columns = (trace.name[rows], np.maximum(trace.num_bytes[rows], 0), trace.node[rows])
        each = zip(
            self._times(rows),
            self._device_columns(rows),
            *(c.tolist() for c in columns),
            strict=True,
        )
        return [
            (*times, *device, size, *kinds[name], None if node == NONE else node)
            for times, device, name, size, node in each
        ]

    def _memsets(self) -> list[tuple[object, ...]]:
        trace = self._trace
        rows = trace.rows_of(Kind.MEMSET)
        columns = (np.maximum(trace.num_bytes[rows], 0), trace.node[rows])
        each = zip(
            self._times(rows),
            self._device_columns(rows),
            *(c.tolist() for c in columns),
            strict=True,
        )
        return [
            (*times, *device, 0, size, None if node == NONE else node, 7)
            for times, device, size, node in each
        ]

    def _waits(self) -> list[tuple[object, ...]]:
        trace = self._trace
        on_stream = np.array([lane.is_device for lane in trace.lanes] or [False], bool)
        rows = trace.rows_of(Kind.SYNC)
        rows = rows[on_stream[trace.lane[rows]]] if len(rows) else rows
        each = zip(self._times(rows), self._device_columns(rows), strict=True)
        return [(*times, *device, _STREAM_WAIT, 0) for times, device in each]

    def _calls(self) -> list[tuple[object, ...]]:
        trace = self._trace
        rows = trace.rows_of(Kind.LAUNCH)
        driver = [bool(re.match(r"cu[A-Z]", text)) for text in trace.strings]
        each = zip(
            self._times(rows), self._threads(rows), trace.name[rows].tolist(), rows.tolist(),
            strict=True,
        )  # fmt: skip
        return [
            (*times, int(driver[name]), thread, row + 1, self._names[name], 0, None)
            for times, thread, name, row in each
        ]

    def _ranges(self) -> list[tuple[object, ...]]:
        trace = self._trace
        rows = trace.rows_of(Kind.RANGE, Kind.OP)
        each = zip(
            self._times(rows), self._threads(rows), trace.name[rows].tolist(),
            (trace.kind[rows] == Kind.OP).tolist(), strict=True,
        )  # fmt: skip
        empty = (None,) * 9
        found: list[tuple[object, ...]] = [
            (
                *times, _PUSH_POP, None, None, None, None, thread, None, self._names[name],
                _OPS_DOMAIN if is_op else 0, *empty,
            )
            for times, thread, name, is_op in each
        ]  # fmt: skip
        if any(row[10] == _OPS_DOMAIN for row in found):
            # Reports take a domain's name from `text` alone.
            domain = (
                0, None, _DOMAIN_CREATE, None, None, None, "ops", self._global_pid, None,
                None, _OPS_DOMAIN, *empty,
            )  # fmt: skip
            found.insert(0, domain)
        return found

    def _thread_names(self) -> list[tuple[object, ...]]:
        """nameId, priority, globalTid: without names the report of API calls is refused."""
        rows = self._trace.rows_of(Kind.LAUNCH, Kind.RANGE, Kind.OP)
        return [(self._title, 0, thread) for thread in sorted(set(self._threads(rows)))]

    def _threads(self, rows: np.ndarray) -> list[int]:
        tids = [(lane.tid if lane.tid > 0 else 0) & 0xFFFFFF for lane in self._trace.lanes]
        return [self._global_pid | tids[lane] for lane in self._trace.lane[rows].tolist()]


def _copy_kinds(text: str) -> tuple[int, int, int]:
    """copyKind, srcKind and dstKind of `Memcpy DtoH (Device -> Pinned)` and its like."""
    lower = text.lower()
    kind = next((kind for kind, spelled in _COPIES.items() if re.search(spelled, lower)), 0)
    ends = re.search(r"\((\w+) -> (\w+)\)", text)
    source, target = (_MEMORIES.get(ends[i], 7) if ends else 7 for i in (1, 2))
    return kind, source, target
