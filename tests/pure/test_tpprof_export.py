"""Events for other tools: Nsight's SQLite schema with equal sums, read back the same; Arrow where
pyarrow is there."""

import importlib.util
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tpprof.errors import TraceError
from tpprof.events import Kind, Trace
from tpprof.readers.read import read_traces
from tpprof.report.arrow import write_arrow
from tpprof.report.nsight_sqlite import write_nsight

from tests.pure.tpprof_builders import Recording
from tests.traces.catalogue import SCENARIOS
from tests.traces.kineto import SECRET, KinetoStyle, write_kineto
from tests.traces.simulate import simulate

TABLES = {
    Kind.KERNEL: "CUPTI_ACTIVITY_KIND_KERNEL",
    Kind.COPY: "CUPTI_ACTIVITY_KIND_MEMCPY",
    Kind.MEMSET: "CUPTI_ACTIVITY_KIND_MEMSET",
    Kind.LAUNCH: "CUPTI_ACTIVITY_KIND_RUNTIME",
}
SOME = ("alone", "broadcast", "clock offset", "four ranks", "graph", "hidden")
KEPT = (*TABLES, Kind.RANGE, Kind.OP)


def generated(directory: Path, name: str) -> list[Trace]:
    write_kineto(simulate(SCENARIOS[name]), directory, KinetoStyle())
    return read_traces([directory])


def rows(path: Path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(query).fetchall()


@pytest.mark.parametrize("name", SOME)
def test_tables_hold_every_row_and_its_time(tmp_path: Path, name: str) -> None:
    traces = generated(tmp_path / "in", name)
    path = tmp_path / "out.sqlite"
    write_nsight(path, traces)
    for kind, table in TABLES.items():
        chosen = [(trace, trace.kind == kind) for trace in traces]
        expected = sum(int(picked.sum()) for _, picked in chosen)
        there = rows(path, f"SELECT 1 FROM sqlite_master WHERE name = '{table}'")
        assert bool(there) == bool(expected), "tables without rows are left out"
        if not expected:
            continue
        spent = sum(int((trace.end_ns - trace.start_ns)[picked].sum()) for trace, picked in chosen)
        [(count, total)] = rows(path, f"SELECT count(*), sum(end - start) FROM {table}")
        assert (count, total) == (expected, spent), table
    joined = """SELECT count(*) FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN CUPTI_ACTIVITY_KIND_RUNTIME r
        ON k.correlationId = r.correlationId AND k.globalPid = (r.globalTid & ~0xFFFFFF)"""
    linked = sum(int(((t.kind == Kind.KERNEL) & (t.launch >= 0)).sum()) for t in traces)
    assert rows(path, joined) == [(linked,)]
    assert SECRET.encode() not in path.read_bytes()


def names(trace: Trace, chosen: np.ndarray, kind: Kind) -> list[str]:
    """Of a copy, Nsight's tables tell the direction."""
    found = [trace.text(row) for row in chosen.tolist()]
    return [name[:11] for name in found] if kind == Kind.COPY else found


@pytest.mark.parametrize("name", SOME)
def test_what_was_written_is_read_back(tmp_path: Path, name: str) -> None:
    traces = generated(tmp_path / "in", name)
    write_nsight(tmp_path / "out.sqlite", traces)
    for before, after in zip(traces, read_traces([tmp_path / "out.sqlite"]), strict=True):
        for kind in KEPT:
            old, new = (np.flatnonzero(trace.kind == kind) for trace in (before, after))
            assert (before.start_ns[old] == after.start_ns[new]).all(), kind
            assert (before.end_ns[old] == after.end_ns[new]).all(), kind
            assert names(before, old, kind) == names(after, new, kind), kind
            assert ((before.launch[old] >= 0) == (after.launch[new] >= 0)).all(), kind


def test_processes_with_one_number_stay_apart(tmp_path: Path) -> None:
    """Ranks on several hosts may share a process number; joins go by it."""
    traces = []
    for rank in (0, 1):
        one = Recording(rank=rank)
        one.kernel("gemm", 20, 30 + rank, launch=one.call(5, 9))
        traces.append(one.build()[0])
    path = tmp_path / "out.sqlite"
    assert write_nsight(path, traces) == 4
    assert len(rows(path, "SELECT DISTINCT globalPid FROM CUPTI_ACTIVITY_KIND_KERNEL")) == 2
    assert [pid for (pid,) in rows(path, "SELECT pid FROM PROCESSES")] == [8388608, 8388609]


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.sqlite"
    path.write_text("mine")
    with pytest.raises(TraceError, match="exists"):
        write_nsight(path, [])
    assert path.read_text() == "mine"
    with pytest.raises(TraceError, match="cannot be written"):
        write_nsight(tmp_path / "absent" / "out.sqlite", [])


def test_arrow_needs_pyarrow_and_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(TraceError, match="pip install pyarrow"):
        write_arrow(tmp_path / "out.arrow", [])


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_arrow_holds_every_row(tmp_path: Path) -> None:
    traces = generated(tmp_path / "in", next(iter(SCENARIOS)))
    path = tmp_path / "out.arrow"
    assert write_arrow(path, traces) == sum(map(len, traces))
    pyarrow = importlib.import_module("pyarrow")
    importlib.import_module("pyarrow.ipc")
    with pyarrow.OSFile(str(path)) as file:
        table = pyarrow.ipc.open_file(file).read_all()
    assert table["start_ns"].to_pylist() == [int(t) for one in traces for t in one.start_ns]
    names = [one.text(row) for one in traces for row in range(len(one))]
    assert table["name"].to_pylist() == names
    assert table["launch"].null_count == sum(int((one.launch < 0).sum()) for one in traces)
