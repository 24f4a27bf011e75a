"""With the real Nsight Systems: it records our ranks, and its reports agree with our export.

    TPINFER_NSYS=NSYS [TPINFER_NSYS_IMPORTER=IMPORTER] bash launch/test.sh tests/cpu/test_nsys.py

NSYS is the binary; IMPORTER is its QdstrmImporter, for packages whose nsys does not find it and
leaves .qdstrm files. Skipped without TPINFER_NSYS. The package nvtx must fit the nsys: ranges of
0.2.17 are lost by the one of 2023, so that one needs nvtx==0.2.10, in .venv or in a directory of
its own (pip install --target) that PYTHONPATH names.
"""

import csv
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from tpprof.cli.main import main
from tpprof.events import Kind, Trace
from tpprof.readers.read import read_traces

from tests.cpu.tpinfer_command import REPOSITORY, user_environment
from tests.traces.catalogue import SCENARIOS
from tests.traces.kineto import SECRET, KinetoStyle, write_kineto
from tests.traces.simulate import simulate

NSYS = os.environ.get("TPINFER_NSYS", "")
IMPORTER = os.environ.get("TPINFER_NSYS_IMPORTER", "")
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not NSYS, reason="TPINFER_NSYS names no nsys"),
]
NUM_TOKENS = 20
PROFILE_STEPS, PROFILE_SKIP = 6, 4
RECORD_S = 180
TOOL_S = 60
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
RECORD = ("--sample=none", "--cpuctxsw=none", "--trace-fork-before-exec=true", "--trace=nvtx")
GENERATE = ("generate", "--prompt", "One day", "--greedy", "--ignore-eos", "--nvtx")
RECORDERS_APART_NS = 100_000
"""Between the starts that two recorders give one op: one range lies in the other."""


def tool(*command: str | Path) -> None:
    """Run Nsight Systems or its importer."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=TOOL_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def export(recording: Path) -> Path:
    """A recording (its path without suffix) as SQLite."""
    report, target = recording.with_suffix(".nsys-rep"), recording.with_suffix(".sqlite")
    if not report.exists():
        assert IMPORTER, f"nsys left no {report.name}: TPINFER_NSYS_IMPORTER must name its importer"
        tool(IMPORTER, "-i", recording.with_suffix(".qdstrm"), "-o", report)
    tool(NSYS, "export", "--type", "sqlite", "--output", target, report)
    return target


@pytest.fixture(scope="module", params=("a report a rank", "one report"))
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """SQLite files of two ranks that ran under torchrun: as launch/nsys.sh makes them, or with one
    nsys around everything. Kineto's files and the cost manifests of the same run lie beside them.
    """
    folder = tmp_path_factory.mktemp("nsys")
    profile = ("--profile", folder, "--profile-steps", PROFILE_STEPS, "--profile-skip")
    program = (*GENERATE, "--max-tokens", NUM_TOKENS, *profile, PROFILE_SKIP)
    if request.param == "one report":
        around = (NSYS, "profile", *RECORD, "--output", folder / "both", *TORCHRUN)
        command, names = (*around, "-m", "tpinfer", *program), ["both"]
    else:
        around = (*TORCHRUN, "--no-python", NSYS, "profile", *RECORD)
        around = (*around, "--output", folder / "rank%q{RANK}")
        command = (*around, sys.executable, "-m", "tpinfer", *program)
        names = ["rank0", "rank1"]
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env=user_environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "API_TOKEN": SECRET}),
        capture_output=True,
        text=True,
        timeout=RECORD_S,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    files = [export(folder / name) for name in names]
    for path in files:
        with closing(sqlite3.connect(path)) as database:
            found = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'NVTX_EVENTS'")
            assert found.fetchall(), f"nvtx {version('nvtx')} may be too new for this nsys"
    return [str(path) for path in files]


def steps_of(trace: Trace) -> dict[str, list[tuple[str, int]]]:
    """Ops of each step as (id, row), both in order."""
    steps: dict[str, list[tuple[str, int]]] = {}
    current = ""
    for row in trace.rows_of(Kind.RANGE).tolist():
        kind, _, rest = trace.text(row).partition(" ")
        if kind == "tpinfer.step":
            current = rest
            steps[current] = []
        elif kind == "tpinfer.op":
            steps[current].append((rest, row))
    return steps


def test_both_processes_and_their_steps_are_read(recorded: list[str]) -> None:
    traces = read_traces(recorded)
    assert [trace.rank for trace in traces] == [0, 1]
    pids = [{lane.pid for lane in trace.lanes} for trace in traces]
    assert len(pids[0]) == len(pids[1]) == 1 and pids[0] != pids[1]
    first, second = map(steps_of, traces)
    assert list(first) == list(second), "the ranks took different steps"
    assert [text.split()[0] for text in first] == [f"id={i}" for i in range(NUM_TOKENS)]
    assert ["phase=decode" in text for text in first] == [False] + [True] * (NUM_TOKENS - 1)
    manifest = json.loads(Path(recorded[0]).with_name("rank0.manifest.json").read_text())
    program = [op["id"] for op in manifest["manifest"]["ops"]]
    for steps in (first, second):
        assert all([op for op, _ in ops] == program for ops in steps.values())


@pytest.mark.parametrize("window", ["all", "steps"])
def test_the_analysis_adds_up_and_names_collectives(
    recorded: list[str], window: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    assert main(["analyze", *recorded, "--window", window, "--json", str(path)]) == 0
    assert SECRET not in path.read_text()
    report = json.loads(path.read_text())
    splits = [*report["ranks"], *(one for each in report["windows"] for one in each["ranks"])]
    for split in [report, *splits]:
        assert sum(split["leaves"].values()) == sum(split["rollup"].values()) == split["wall_ns"]
    assert report["residual_ns"] == 0 and report["wall_ns"] > 0
    if window == "steps":
        assert len(report["windows"]) == NUM_TOKENS
    waiting = {op["key"] for op in report["ops"] if op["bound"] == "communication"}
    ends = {op["key"] for op in report["ops"] if op["key"].endswith((".reduce", ".gather"))}
    assert waiting == ends != set()
    assert {one["name"] for one in report["collectives"]} == {"allreduce", "allgather"}
    assert all(one["ranks"] == [0, 1] for one in report["collectives"])
    assert {"comm_transfer", "comm_wait"} <= set(report["leaves"])
    assert "comm_unsplit" not in report["leaves"]


def test_collectives_are_known_without_a_manifest(recorded: list[str], tmp_path: Path) -> None:
    """Nsight records no manifest, and launch/nsys.sh asks for none on CPU ranks."""
    alone = [str(shutil.copy(path, tmp_path)) for path in recorded]
    path = tmp_path / "report.json"
    assert main(["analyze", *alone, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    waiting = {op["key"] for op in report["ops"] if op["bound"] == "communication"}
    assert waiting and all(key.endswith((".reduce", ".gather")) for key in waiting)
    assert {"comm_transfer", "comm_wait"} <= set(report["leaves"])
    assert sum(report["leaves"].values()) == report["wall_ns"]


def test_both_recorders_saw_the_same_ops(recorded: list[str]) -> None:
    """The same run as Kineto recorded it: equal names, and times on one clock."""
    folder = Path(recorded[0]).parent
    kineto = read_traces([str(path) for path in sorted(folder.glob("*.trace.json.gz"))])
    assert len(kineto) == 2
    for nsight, other in zip(read_traces(recorded), kineto, strict=True):
        all_steps, steps = steps_of(nsight), steps_of(other)
        assert len(steps) == PROFILE_STEPS
        pairs = [
            (row, match)
            for text, ops in steps.items()
            for (op, row), (same, match) in zip(ops, all_steps[text], strict=True)
            if op == same
        ]
        assert len(pairs) == sum(map(len, steps.values())) > 0
        ours, theirs = np.array(pairs).T
        apart = np.abs(other.start_ns[ours] - nsight.start_ns[theirs])
        assert np.median(apart) < RECORDERS_APART_NS
        lengths = (other.end_ns - other.start_ns)[ours], (nsight.end_ns - nsight.start_ns)[theirs]
        assert np.median(np.abs(lengths[0] - lengths[1])) < RECORDERS_APART_NS


REPORTS = ("cuda_gpu_kern_sum", "nvtx_sum", "nvtx_gpu_proj_trace", "cuda_api_trace")


@pytest.fixture(scope="module", params=("broadcast", "graph", "hidden", "overlapped graphs"))
def reported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Trace], dict[str, list[dict[str, str]]]]:
    """A generated GPU run, and the rows of Nsight's reports on our export of it."""
    folder = tmp_path_factory.mktemp("stats")
    write_kineto(simulate(SCENARIOS[request.param]), folder / "in", KinetoStyle())
    path = folder / "out.sqlite"
    assert main(["export", str(folder / "in"), "--nsys-sqlite", str(path)]) == 0
    asked = ("stats", "--report", ",".join(REPORTS), "--format", "csv", "--output", folder / "is")
    tool(NSYS, *asked, path)
    rows = {}
    for report in REPORTS:
        with (folder / f"is_{report}.csv").open(newline="", encoding="utf-8") as file:
            rows[report] = list(csv.DictReader(file))
        assert rows[report], f"nsys refuses the report {report}"
    return read_traces([folder / "in"]), rows


def lengths_by_name(traces: list[Trace], *kinds: Kind) -> dict[str, list[int]]:
    """ns of each row."""
    found: dict[str, list[int]] = {}
    for trace in traces:
        for row in trace.rows_of(*kinds).tolist():
            length_ns = int(trace.end_ns[row] - trace.start_ns[row])
            found.setdefault(range_name(trace, row), []).append(length_ns)
    return found


def range_name(trace: Trace, row: int) -> str:
    """As the reports print it: with the domain in front, where it is not the default one."""
    return ("ops:" if trace.kind[row] == Kind.OP else "") + trace.text(row)


def summary(rows: list[dict[str, str]], name: str) -> dict[str, tuple[int, ...]]:
    """(total, count, least, most) of each row of a summary; newer tools put `:` before ranges of
    the default domain."""
    columns = ("Total Time (ns)", "Instances", "Min (ns)", "Max (ns)")
    return {row[name].removeprefix(":"): tuple(int(row[c]) for c in columns) for row in rows}


def test_kernels_and_ranges_have_equal_sums(
    reported: tuple[list[Trace], dict[str, list[dict[str, str]]]],
) -> None:
    traces, rows = reported
    for report, name, kinds in (
        ("cuda_gpu_kern_sum", "Name", (Kind.KERNEL,)),
        ("nvtx_sum", "Range", (Kind.RANGE, Kind.OP)),
    ):
        lengths = lengths_by_name(traces, *kinds)
        expected = {key: (sum(ns), len(ns), min(ns), max(ns)) for key, ns in lengths.items()}
        assert summary(rows[report], name) == expected


def test_ranges_are_projected_on_the_same_kernels(
    reported: tuple[list[Trace], dict[str, list[dict[str, str]]]],
) -> None:
    """Nsight joins kernels, calls and ranges by our numbers: every one must find its own."""
    traces, rows = reported
    zero_ns = min(int(trace.start_ns[0]) for trace in traces)
    expected: Counter[tuple[str, int, int, int, int]] = Counter()
    for trace in traces:
        work = np.flatnonzero(trace.is_device() & (trace.launch >= 0))
        calls = trace.launch[work]
        for row in trace.rows_of(Kind.RANGE, Kind.OP).tolist():
            inside = trace.lane[calls] == trace.lane[row]
            inside &= trace.start_ns[calls] >= trace.start_ns[row]
            inside &= trace.end_ns[calls] <= trace.end_ns[row]
            if inside.any():
                start_ns = int(trace.start_ns[work[inside]].min())
                length_ns = int(trace.end_ns[work[inside]].max()) - start_ns
                own_ns = int(trace.start_ns[row]) - zero_ns
                count = len(np.unique(calls[inside]))  # it counts launches, a replay once
                expected[range_name(trace, row), start_ns - zero_ns, length_ns, own_ns, count] += 1
    columns = ("Projected Start (ns)", "Projected Duration (ns)", "Orig Start (ns)", "NumGPUOps")
    found = Counter(
        (row["Name"].removeprefix(":"), *(int(row[column]) for column in columns))
        for row in rows["nvtx_gpu_proj_trace"]
        if row["Name"]  # what was launched outside all ranges stands in a row without a name
    )
    assert found == expected and found


def test_calls_are_listed_with_their_ranks(
    reported: tuple[list[Trace], dict[str, list[dict[str, str]]]],
) -> None:
    traces, rows = reported
    found = Counter(
        (row["Thread Name"], row["Name"], int(row["Duration (ns)"]))
        for row in rows["cuda_api_trace"]
    )
    expected = Counter(
        (f"rank {trace.rank}", trace.text(row), int(trace.end_ns[row] - trace.start_ns[row]))
        for trace in traces
        for row in trace.rows_of(Kind.LAUNCH).tolist()
    )
    assert found == expected
