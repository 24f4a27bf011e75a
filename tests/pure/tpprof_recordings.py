"""Small recordings as recorders write them, and what a trace says in plain words."""

import gzip
import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tpprof.events import NONE, Kind, Trace

EPOCH_NS = 1_711_964_646_000_000_000
SECRET = "sk-live-very-secret"
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "traces"


def event(category: str, name: str, ts: Any, dur: Any, **rest: Any) -> dict[str, Any]:
    """One `X` event on thread (7, 7), or on stream 3 of device 0 for what a device does."""
    on_device = category.startswith(("kernel", "gpu_", "cuda_sync"))
    arguments = rest.pop("args", {})
    place = {"pid": 0, "tid": 3} if on_device else {"pid": 7, "tid": 7}
    shown = {"ph": "X", "cat": category, "name": name, **place, "ts": ts, "dur": dur}
    return {**shown, **rest, "args": arguments}


def document(events: Sequence[Any], **beside: Any) -> dict[str, Any]:
    """A whole file: rank 1 of 2, with an environment that must never be kept."""
    header = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA H100", "totalGlobalMem": 85, "numSms": 132}],
        "distributedInfo": {"backend": "nccl", "rank": 1, "world_size": 2},
        "env": {"HF_TOKEN": SECRET},
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": EPOCH_NS,
    }
    return {**header, **beside, "traceEvents": list(events), "traceName": f"/tmp/{SECRET}.json"}


def decode_step() -> list[dict[str, Any]]:
    """An operator with two kernels, a graph replay of two, a copy, an all-reduce, a step."""
    comm = {
        "Collective name": "_allgather_base", "In msg nelems": 1024, "Out msg nelems": 2048,
        "Group size": 2, "dtype": "BFloat16", "Process Group Name": "3",
        "Process Group Ranks": "[0, 1]", "Seq": 41,
    }  # fmt: skip
    shapes = {"Input Dims": [[2, 64], [64, 8]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}
    return [
        event("user_annotation", "tpinfer.step id=4 phase=decode", 100.000, 900.001),
        event("cpu_op", "aten::mm", 110.5, 40.25, args={"External id": 11, **shapes}),
        event("cpu_op", "aten::empty", 112.125, 2.0, args={"External id": 12}),
        event("cuda_runtime", "cudaLaunchKernel", 120.0, 4.0,
              args={"External id": 11, "correlation": 51}),
        event("kernel", "gemm", 130.001, 20.002,
              args={"External id": 11, "correlation": 51, "device": 0, "stream": 3,
                    "grid": [4, 5, 2], "block": [128, 1, 1], "warps per SM": 4.5}),
        event("cuda_runtime", "cudaGraphLaunch", 200.0, 9.5, args={"correlation": 52}),
        event("kernel", "node a", 215.0, 10.0,
              args={"correlation": 52, "device": 0, "stream": 3, "graph node id": 71}),
        event("kernel", "node b", 226.0, 10.0,
              args={"correlation": 52, "device": 0, "stream": 3, "graph node id": 72}),
        event("cpu_op", "record_param_comms", 300.0, 20.0, args={"External id": 13, **comm}),
        event("cuda_runtime", "cudaLaunchKernelExC", 305.0, 5.0,
              args={"External id": 13, "correlation": 53}),
        event("kernel", "ncclDevKernel_AllGather_RING_LL", 320.0, 30.0, tid=9,
              args={"External id": 13, "correlation": 53, "device": 0, "stream": 9, **comm}),
        event("cuda_runtime", "cudaMemcpyAsync", 400.0, 3.0, args={"correlation": 54}),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 410.0, 2.0,
              args={"correlation": 54, "device": 0, "stream": 3, "bytes": 4096}),
        {"ph": "s", "id": 51, "pid": 7, "tid": 7, "ts": 120.0, "cat": "ac2g", "name": "ac2g"},
        {"ph": "M", "name": "process_name", "pid": 7, "tid": 0, "ts": 0, "args": {"name": "py"}},
    ]  # fmt: skip


def write(path: Path, content: Any, packed: bool = False) -> Path:
    """A file of this JSON document, text or bytes."""
    raw = content if isinstance(content, bytes | str) else json.dumps(content)
    raw = raw.encode() if isinstance(raw, str) else raw
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


def said(trace: Trace, row: int) -> dict[str, Any]:
    """One row in words: references as the names of the rows they point to."""
    lane = trace.lanes[trace.lane[row]]

    def name_of(other: int) -> str | None:
        return None if other == NONE else trace.text(other)

    return {
        "start": int(trace.start_ns[row]),
        "end": int(trace.end_ns[row]),
        "kind": Kind(int(trace.kind[row])).name,
        "name": trace.text(row),
        "lane": (lane.is_device, lane.pid, lane.tid, lane.device),
        "launch": name_of(int(trace.launch[row])),
        "op": name_of(int(trace.op[row])),
        "node": int(trace.node[row]),
        "blocks": int(trace.num_blocks[row]),
        "bytes": int(trace.num_bytes[row]),
        "shapes": None if trace.shapes[row] == NONE else trace.strings[trace.shapes[row]],
    }


def all_said(trace: Trace) -> list[dict[str, Any]]:
    """Every row in words, collectives beside them."""
    rows = [said(trace, row) for row in range(len(trace))]
    found = trace.collectives
    for i, row in enumerate(found.row.tolist()):
        group = int(found.group[i])
        rows[row]["collective"] = (
            trace.strings[found.op[i]],
            int(found.num_bytes[i]),
            None if group == NONE else trace.strings[group],
            int(found.group_size[i]),
            int(found.sequence[i]),
        )
    return rows


def row_named(trace: Trace, name: str) -> dict[str, Any]:
    """The one row of that name."""
    [row] = [said for said in all_said(trace) if said["name"] == name]
    return row


def check_promises(trace: Trace) -> None:
    """What `Trace` guarantees of any file."""
    keys = list(zip(trace.start_ns.tolist(), (-trace.end_ns).tolist(), strict=True))
    assert keys == sorted(keys)
    assert (trace.end_ns >= trace.start_ns).all()
    count = len(trace)
    for column in (trace.launch, trace.op):
        assert ((column >= NONE) & (column < count)).all()
    linked = trace.launch[trace.launch >= 0]
    assert (trace.kind[linked] == Kind.LAUNCH).all()
    assert (trace.kind[trace.op[trace.op >= 0]] == Kind.OP).all()
    rows = trace.collectives.row
    assert ((rows >= 0) & (rows < count)).all() and (rows[1:] >= rows[:-1]).all()
    assert SECRET not in repr((trace, trace.strings, trace.warnings, trace.devices, trace.groups))


class Nsight:
    """An export in the making: tables appear with their first row."""

    MACHINE = 1 << 48

    def __init__(self, path: Path, **tables: Sequence[Mapping[str, Any]]) -> None:
        self.path = path
        self._strings: dict[str, int] = {}
        self._rows: dict[str, list[Mapping[str, Any]]] = {}
        self.add("META_DATA_EXPORT", name="EXPORT_SCHEMA_VERSION", value="3.25.0")
        self.add("TARGET_INFO_SYSTEM_ENV", name="DeviceEnvironment", value=SECRET)
        self.string(f"a log that says {SECRET}")
        for table, rows in tables.items():
            for row in rows:
                self.add(table, **row)

    def string(self, text: str) -> int:
        """Its number in StringIds."""
        return self._strings.setdefault(text, len(self._strings) + 5)

    def process(self, pid: int) -> int:
        """globalPid; plus a thread's number it is a globalTid."""
        return self.MACHINE | pid << 24

    def add(self, table: str, **row: Any) -> "Nsight":
        """One row; columns it does not name are NULL or absent."""
        self._rows.setdefault(table, []).append(row)
        return self

    def kernel(self, pid: int, name: str, start: int, end: int, **rest: Any) -> "Nsight":
        """A kernel on stream 7 of device 0."""
        row = {
            "start": start, "end": end, "deviceId": 0, "streamId": 7, "correlationId": 1,
            "globalPid": self.process(pid), "demangledName": self.string(name),
            "shortName": self.string("short"), "gridX": 3, "gridY": 2, "gridZ": 1,
            "graphNodeId": None, **rest,
        }  # fmt: skip
        return self.add("CUPTI_ACTIVITY_KIND_KERNEL", **row)

    def call(self, pid: int, name: str, start: int, end: int, **rest: Any) -> "Nsight":
        """An API call on the thread whose number is the process's."""
        row = {
            "start": start, "end": end, "globalTid": self.process(pid) + rest.pop("tid", pid),
            "correlationId": 1, "nameId": self.string(name), **rest,
        }  # fmt: skip
        return self.add("CUPTI_ACTIVITY_KIND_RUNTIME", **row)

    def range(
        self, pid: int, text: str | None, start: int, end: int | None, **rest: Any
    ) -> "Nsight":
        """A push/pop range there."""
        row = {
            "start": start, "end": end, "eventType": 59, "text": text, "textId": None,
            "domainId": 0, "globalTid": self.process(pid) + rest.pop("tid", pid), **rest,
        }  # fmt: skip
        return self.add("NVTX_EVENTS", **row)

    def save(self) -> Path:
        """Write the file."""
        self.path.unlink(missing_ok=True)
        for text, number in self._strings.items():
            self.add("StringIds", id=number, value=text)
        with closing(sqlite3.connect(self.path)) as database:
            for table, rows in self._rows.items():
                names = list(dict.fromkeys(name for row in rows for name in row))
                database.execute(f'CREATE TABLE "{table}" ({", ".join(names)})')
                marks = ", ".join("?" * len(names))
                database.executemany(
                    f'INSERT INTO "{table}" VALUES ({marks})',
                    [[row.get(name) for name in names] for row in rows],
                )
            database.commit()
        return self.path
