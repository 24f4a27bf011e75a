"""What Nsight's reports ask of an export besides events: names of domains and of threads. With the
real reports: tests/cpu/test_nsys.py."""

import sqlite3
from contextlib import closing
from pathlib import Path

from tpprof.events import Kind
from tpprof.readers.read import read_traces
from tpprof.report.nsight_sqlite import write_nsight

from tests.traces.catalogue import SCENARIOS
from tests.traces.kineto import KinetoStyle, write_kineto
from tests.traces.simulate import simulate


def test_domains_and_threads_have_names(tmp_path: Path) -> None:
    write_kineto(simulate(SCENARIOS["hidden"]), tmp_path / "in", KinetoStyle())
    traces = read_traces([tmp_path / "in"])
    path = tmp_path / "out.sqlite"
    write_nsight(path, traces)
    with closing(sqlite3.connect(path)) as database:
        domains = database.execute(
            "SELECT text, globalTid FROM NVTX_EVENTS WHERE eventType = 75"
        ).fetchall()
        named = database.execute(
            "SELECT s.value, t.globalTid FROM ThreadNames t JOIN StringIds s ON s.id = t.nameId"
        ).fetchall()
        calling = database.execute(
            "SELECT DISTINCT globalTid FROM CUPTI_ACTIVITY_KIND_RUNTIME"
        ).fetchall()
    assert all(len(trace.rows_of(Kind.OP)) for trace in traces)
    assert [text for text, _ in domains] == ["ops", "ops"]
    assert {text for text, _ in named} == {"rank 0", "rank 1"}
    assert len(named) == len(set(named)) and {tid for (tid,) in calling} <= {t for _, t in named}
    processes = {tid >> 24 for _, tid in named}
    assert processes == {tid >> 24 for _, tid in domains} and len(processes) == 2
