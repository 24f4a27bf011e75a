"""Writes a simulated run as Nsight Systems exports it: SQLite, all processes in one file or one
file a rank.

Tables and columns as in schema 3.25; correlation ids repeat across processes, as they do in real
files. Operators and their shapes are not in such a file.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tests.traces.kineto import ENDLESS_NS, SECRET
from tests.traces.names import call_name, kernel_name, moment_name, range_name, step_name
from tests.traces.scenario import NUM_SMS
from tests.traces.simulate import DeviceRow, HostCall, RankRun, Run

MACHINE = 1 << 48
PUSH_POP, DOMAIN_CREATE = 59, 75
STREAM_WAIT, STREAM_SYNCHRONIZE = 2, 3
PINNED, DEVICE = 1, 2
COPY_KINDS = {"h2d": (1, PINNED, DEVICE), "d2h": (2, DEVICE, PINNED)}
"""(copyKind, srcKind, dstKind)."""
VERSIONED = {
    "cudaLaunchKernel": "cudaLaunchKernel_v7000",
    "cudaGraphLaunch": "cudaGraphLaunch_v10000",
    "cudaMemcpyAsync": "cudaMemcpyAsync_v3020",
    "cudaEventRecord": "cudaEventRecord_v3020",
    "cudaStreamWaitEvent": "cudaStreamWaitEvent_v3020",
    "cudaStreamSynchronize": "cudaStreamSynchronize_v3020",
}

SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE META_DATA_EXPORT (name TEXT NOT NULL, value TEXT);
CREATE TABLE META_DATA_CAPTURE (name TEXT NOT NULL, value TEXT);
CREATE TABLE PROCESSES (globalPid INTEGER, pid INTEGER, name TEXT);
CREATE TABLE ThreadNames (nameId INTEGER NOT NULL, priority INTEGER, globalTid INTEGER);
CREATE TABLE TARGET_INFO_SYSTEM_ENV (globalVid INTEGER, devStateName TEXT NOT NULL,
    name TEXT NOT NULL, nameEnum INTEGER NOT NULL, value TEXT NOT NULL);
CREATE TABLE TARGET_INFO_SESSION_START_TIME (utcEpochNs INTEGER, utcTime TEXT, localTime TEXT,
    systemClockNs INTEGER);
CREATE TABLE ANALYSIS_DETAILS (globalVid INTEGER NOT NULL, duration INTEGER NOT NULL,
    startTime INTEGER NOT NULL, stopTime INTEGER NOT NULL);
CREATE TABLE TARGET_INFO_GPU (vmId INTEGER NOT NULL, id INTEGER NOT NULL, name TEXT,
    busLocation TEXT, isDiscrete INTEGER, l2CacheSize INTEGER, totalMemory INTEGER,
    memoryBandwidth INTEGER, clockRate INTEGER, smCount INTEGER, pwGpuId INTEGER, uuid TEXT,
    luid INTEGER, chipName TEXT, cuDevice INTEGER, ctxswDevPath TEXT, ctrlDevPath TEXT,
    revision INTEGER, nodeMask INTEGER, constantMemory INTEGER, maxIPC INTEGER,
    maxRegistersPerBlock INTEGER, maxShmemPerBlock INTEGER, maxShmemPerBlockOptin INTEGER,
    maxShmemPerSm INTEGER, maxRegistersPerSm INTEGER, threadsPerWarp INTEGER,
    asyncEngines INTEGER, maxWarpsPerSm INTEGER, maxBlocksPerSm INTEGER,
    maxThreadsPerBlock INTEGER, maxBlockDimX INTEGER, computeMajor INTEGER, computeMinor INTEGER);
CREATE TABLE ENUM_NSYS_EVENT_TYPE (id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL,
    rangeId INTEGER, category INTEGER, color INTEGER, text TEXT, globalTid INTEGER,
    endGlobalTid INTEGER, textId INTEGER, domainId INTEGER, uint64Value INTEGER,
    int64Value INTEGER, doubleValue REAL, uint32Value INTEGER, int32Value INTEGER,
    floatValue REAL, jsonTextId INTEGER, jsonText TEXT, binaryData TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL,
    eventClass INTEGER NOT NULL, globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL,
    returnValue INTEGER NOT NULL, callchainId INTEGER);
"""
"""What every file has; the tables below appear only where they hold rows."""
SYNCHRONIZATION = """
CREATE TABLE CUPTI_ACTIVITY_KIND_SYNCHRONIZATION (start INTEGER NOT NULL, end INTEGER NOT NULL,
    deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, greenContextId INTEGER,
    streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    deprecatedSyncType INTEGER, syncType INTEGER NOT NULL, eventId INTEGER NOT NULL,
    eventSyncId INTEGER NOT NULL);
"""
KERNEL = """
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL,
    deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, greenContextId INTEGER,
    streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER,
    launchType INTEGER, registersPerThread INTEGER NOT NULL, gridX INTEGER NOT NULL,
    gridY INTEGER NOT NULL, gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL,
    blockY INTEGER NOT NULL, blockZ INTEGER NOT NULL, gridId INTEGER NOT NULL,
    graphNodeId INTEGER, graphId INTEGER);
"""
MEMCPY = """
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL,
    deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, greenContextId INTEGER,
    streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, bytes INTEGER NOT NULL,
    copyKind INTEGER NOT NULL, srcKind INTEGER, dstKind INTEGER, graphNodeId INTEGER);
"""
SESSION_NS = 100_000_000_000
"""Times count from the session's start, which lies before everything."""
GRAPH_TRACE = """
CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INTEGER NOT NULL, end INTEGER NOT NULL,
    deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, greenContextId INTEGER,
    streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, graphId INTEGER NOT NULL,
    graphExecId INTEGER NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class NsightStyle:
    """What differs between exports of one run."""

    engine: str = "tpinfer"
    has_graph_nodes: bool = True
    """`--cuda-graph-trace=node`; by default Nsight writes one row a replay and no kernels."""
    is_registered: bool = False
    """NVTX strings were registered: the text lies in StringIds."""
    pids: tuple[int, ...] = ()
    """Process ids by rank."""
    device_of_all: int | None = None
    """Every process sees one device, under this number; None where rank r uses device r."""
    says_rank: bool = False
    """Each process marks its rank, as tpinfer does."""


def write_nsight(
    run: Run,
    path: Path,
    style: NsightStyle | None = None,
    ranks: Sequence[int] | None = None,
) -> Path:
    """Write one export that holds `ranks` (None: all), each a process with its own device."""
    style = style or NsightStyle()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    chosen = range(run.scenario.num_ranks) if ranks is None else ranks
    with closing(sqlite3.connect(path)) as db:
        _Export(db, run, style).write([run.ranks[rank] for rank in chosen])
        db.commit()
    return path


def write_nsight_per_rank(
    run: Run, directory: Path, style: NsightStyle | None = None
) -> list[Path]:
    """One export a rank, as `launch/nsys.sh` records them."""
    ranks = range(run.scenario.num_ranks)
    return [write_nsight(run, directory / f"rank{r}.sqlite", style, [r]) for r in ranks]


class _Export:
    def __init__(self, db: sqlite3.Connection, run: Run, style: NsightStyle) -> None:
        self.db, self.run, self.style = db, run, style
        self.strings: dict[str, int] = {}
        self.lazy: set[str] = set()

    def write(self, ranks: Sequence[RankRun]) -> None:
        """Every table."""
        self.db.execute("PRAGMA synchronous = OFF")
        self.db.executescript(SCHEMA)
        self._about(ranks)
        for rank in ranks:
            self._process(rank)
            self._nvtx(rank)
            for call in rank.calls:
                self._call(rank, call)
            self._device(rank)
        rows = [(number, text) for text, number in self.strings.items()]
        self.db.executemany("INSERT INTO StringIds VALUES (?, ?)", rows)

    @staticmethod
    def _at(rank: RankRun, true_ns: int) -> int:
        return SESSION_NS + rank.clock.local(true_ns)

    def _string(self, text: str) -> int:
        return self.strings.setdefault(text, len(self.strings) + 1)

    def _insert(self, table: str, schema: str = "", **columns: object) -> None:
        if schema and table not in self.lazy:
            self.db.executescript(schema)
            self.lazy.add(table)
        names, marks = ", ".join(columns), ", ".join("?" * len(columns))
        self.db.execute(
            f'INSERT INTO "{table}" ({names}) VALUES ({marks})', tuple(columns.values())
        )

    def _pid(self, rank: RankRun) -> int:
        pids = self.style.pids
        return pids[rank.rank] if pids else 700 + rank.rank

    def _global(self, rank: RankRun, tid: int = 0) -> int:
        return MACHINE | self._pid(rank) << 24 | tid

    def _device_id(self, rank: RankRun) -> int:
        shared = self.style.device_of_all
        return rank.rank if shared is None else shared

    def _about(self, ranks: Sequence[RankRun]) -> None:
        for name, value in (
            ("EXPORT_PRODUCT_NAME", "NVIDIA Nsight Systems"),
            ("EXPORT_SCHEMA_VERSION", "3.25.0"),
            ("EXPORT_SCHEMA_VERSION_MAJOR", "3"),
            ("EXPORT_SCHEMA_VERSION_MINOR", "25"),
            ("EXPORT_SCHEMA_VERSION_MICRO", "0"),
        ):
            self._insert("META_DATA_EXPORT", name=name, value=value)
        mode = "Node" if self.style.has_graph_nodes else "Graph"
        self._insert("META_DATA_CAPTURE", name="CUDA_GRAPH_TRACE_OPTIONS:MODE", value=mode)
        for number, (name, value) in enumerate(
            (("CpuCores", "18"), ("DeviceEnvironment", f'{{"HF_TOKEN": "{SECRET}"}}'))
        ):
            self._insert(
                "TARGET_INFO_SYSTEM_ENV",
                globalVid=MACHINE,
                devStateName="Local (CLI)",
                name=name,
                nameEnum=number,
                value=value,
            )
        self._insert(
            "TARGET_INFO_SESSION_START_TIME",
            utcEpochNs=1_775_078_550_000_000_000,
            utcTime="2026-04-01T21:22:30",
            localTime="2026-04-01T21:22:30",
            systemClockNs=35_255_823_190,
        )
        for number, name in ((PUSH_POP, "NvtxPushPopRange"), (DOMAIN_CREATE, "NvtxDomainCreate")):
            self._insert("ENUM_NSYS_EVENT_TYPE", id=number, name=name, label=name)
        for device in sorted({self._device_id(rank) for rank in ranks}):
            self._insert(
                "TARGET_INFO_GPU",
                vmId=0,
                id=device,
                name="NVIDIA H100 80GB HBM3",
                l2CacheSize=52_428_800,
                totalMemory=85_029_158_912,
                memoryBandwidth=3_352_000_000_000,
                smCount=NUM_SMS,
                chipName="GH100",
                cuDevice=device,
                computeMajor=9,
                computeMinor=0,
            )

    def _process(self, rank: RankRun) -> None:
        pid = self._pid(rank)
        self._insert("PROCESSES", globalPid=self._global(rank), pid=pid, name="python3")
        name = self._string("python3")
        self._insert("ThreadNames", nameId=name, priority=20, globalTid=self._global(rank, pid))
        if self.style.engine == "tpinfer":
            self._insert(
                "NVTX_EVENTS",
                start=0,
                eventType=DOMAIN_CREATE,
                text="tpinfer",
                globalTid=self._global(rank, pid),
                domainId=1,
            )

    def _ranges(self, rank: RankRun) -> Iterator[tuple[int, int, str]]:
        engine = self.style.engine
        if self.style.says_rank:
            first = rank.calls[0].start_ns - 1_000_000
            yield first, first, f"tpinfer.rank id={rank.rank} world={self.run.scenario.num_ranks}"
        for one in rank.ranges:
            if one.kind == "step":
                yield one.start_ns, one.end_ns, step_name(engine, self.run.scenario, one)
            elif range_name(engine, one):
                yield one.start_ns, one.end_ns, range_name(engine, one)
        for moment in rank.moments:
            name = moment_name(engine, moment.kind, moment.index)
            if name:
                yield moment.at_ns, moment.at_ns, name

    def _nvtx(self, rank: RankRun) -> None:
        registered = self.style.is_registered
        for start, end, text in self._ranges(rank):
            self._insert(
                "NVTX_EVENTS",
                start=self._at(rank, start),
                end=self._at(rank, end),
                eventType=PUSH_POP,
                text=None if registered else text,
                textId=self._string(text) if registered else None,
                globalTid=self._global(rank, self._pid(rank)),
                domainId=1 if self.style.engine == "tpinfer" else 0,
            )

    def _call(self, rank: RankRun, call: HostCall) -> None:
        self._insert(
            "CUPTI_ACTIVITY_KIND_RUNTIME",
            start=self._at(rank, call.start_ns),
            end=self._at(rank, call.end_ns),
            eventClass=0,
            globalTid=self._global(rank, self._pid(rank)),
            correlationId=call.correlation,
            nameId=self._string(VERSIONED[call_name(call.kind)]),
            returnValue=0,
        )
        if call.kind not in ("wait", "synchronize"):
            return
        waits = call.kind == "wait"
        self._insert(
            "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION",
            SYNCHRONIZATION,
            start=self._at(rank, call.start_ns + 100),
            end=self._at(rank, call.end_ns - 100),
            streamId=call.stream,
            **self._place(rank, call),
            syncType=STREAM_WAIT if waits else STREAM_SYNCHRONIZE,
            eventId=call.event if waits else 4_294_967_295,
            eventSyncId=call.event,
        )

    def _place(self, rank: RankRun, call: HostCall) -> dict[str, object]:
        return {
            "deviceId": self._device_id(rank),
            "contextId": 1,
            "correlationId": call.correlation,
            "globalPid": self._global(rank),
        }

    def _device(self, rank: RankRun) -> None:
        hidden: dict[int, list[DeviceRow]] = {}
        for row in rank.rows:
            if row.damage is not None and row.damage.kind == "lost":
                continue
            if row.node >= 0 and not self.style.has_graph_nodes:
                hidden.setdefault(id(row.call), []).append(row)
            else:
                self._row(rank, row)
        for rows in hidden.values():
            self._insert(
                "CUPTI_ACTIVITY_KIND_GRAPH_TRACE",
                GRAPH_TRACE,
                start=self._at(rank, rows[0].start_ns),
                end=self._at(rank, rows[-1].end_ns),
                streamId=rows[0].work.stream,
                graphId=3,
                graphExecId=4,
                **self._place(rank, rows[0].call),
            )

    def _row(self, rank: RankRun, row: DeviceRow) -> None:
        start, end = self._at(rank, row.start_ns), self._at(rank, row.end_ns)
        damage = row.damage.kind if row.damage is not None else ""
        if damage == "zero":
            start = end = 0
        elif damage == "backwards":
            start, end = end, start
        elif damage == "endless":
            end = start + ENDLESS_NS
        node = {"graphNodeId": 100 + row.node} if row.node >= 0 else {}
        shared = {"start": start, "end": end, "streamId": row.work.stream, **node}
        shared |= self._place(rank, row.call)
        if row.work.is_copy:
            kind, source, target = COPY_KINDS[row.work.role]
            self._insert(
                "CUPTI_ACTIVITY_KIND_MEMCPY",
                MEMCPY,
                **shared,
                bytes=row.work.num_bytes,
                copyKind=kind,
                srcKind=source,
                dstKind=target,
            )
            return
        name = kernel_name(self.style.engine, row.work)
        short = name.partition("(")[0].partition("<")[0].split(" ")[-1].split("::")[-1]
        self._insert(
            "CUPTI_ACTIVITY_KIND_KERNEL",
            KERNEL,
            **shared,
            demangledName=self._string(name),
            shortName=self._string(short),
            launchType=1,
            registersPerThread=168,
            gridX=row.work.num_blocks,
            gridY=1,
            gridZ=1,
            blockX=256,
            blockY=1,
            blockZ=1,
            gridId=row.call.correlation,
        )
