"""Merged traces: one clock, slices that nest on every line, waiting and transfer that sum to the
collectives."""

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpprof.classify.work import Work
from tpprof.errors import TraceError
from tpprof.events import Kind, Trace
from tpprof.ranks.clock import fit_clocks
from tpprof.ranks.match import match
from tpprof.ranks.wait import columns_of, divide
from tpprof.report.merging import TITLE, merge_ranks
from tpprof.report.perfetto import Track, lines_of, write_perfetto

from tests.pure.tpprof_builders import STREAM, THREAD, Recording

OFFSETS = (0, 7_000_000)
COUNT, TRANSFER_NS, LATE_NS = 20, 20_000, 50_000
START_NS = 1_790_000_000_123_456_789


def two_ranks() -> list[tuple[Trace, Work]]:
    """Rank 1 comes 50 us late to each of 20 all-reduces; its clock is 7 ms ahead."""
    built = []
    for rank, offset in enumerate(OFFSETS):
        one = Recording(rank=rank)
        for i in range(COUNT):
            due = START_NS + offset + i * 300_000
            arrive = due + LATE_NS * rank
            one.step(i, due - 60_000, due + 200_000)
            launch = one.call(due - 40_000, due - 35_000)
            one.kernel('gemm "x" \\ <b>', due - 30_000, arrive, launch=launch, key="mlp")
            end = due + LATE_NS + TRANSFER_NS
            more = {"group": "tp", "size": 2, "sequence": i, "bytes": 1024}
            one.comm("allreduce", arrive, end, **more)
        built.append(one.build())
    return built


def merge(path: Path) -> dict[str, Any]:
    built = two_ranks()
    traces, works = [trace for trace, _ in built], [work for _, work in built]
    matched = match(traces, works)
    ends = columns_of(matched, [work.end_ns for work in works])
    lengths = ends - columns_of(matched, [work.start_ns for work in works])
    clocks = fit_clocks([0, 1], [int(t.start_ns[0]) for t in traces], matched, ends, lengths)
    merged = merge_ranks(path, traces, works, matched, divide(matched, works, clocks), clocks)
    assert merged.warnings == []
    assert [line[:14] for line in merged.clocks] == ["clock of rank ", "clock of rank "]
    found = json.loads(
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_text()
    )
    assert merged.num_slices == sum(event["ph"] == "X" for event in found["traceEvents"])
    return found


def nanoseconds(value: float | str) -> int:
    return round(float(value) * 1000)


def slices(found: dict[str, Any], pid: int) -> dict[str, list[dict[str, Any]]]:
    """Slices by the title of their line."""
    titles = {
        event["tid"]: event["args"]["name"]
        for event in found["traceEvents"]
        if event["name"] == "thread_name" and event["pid"] == pid
    }
    by_title: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in found["traceEvents"]:
        if event["ph"] == "X" and event["pid"] == pid:
            by_title[titles[event["tid"]]].append(event)
    return by_title


@pytest.mark.parametrize("name", ["merged.json", "merged.json.gz"])
def test_ranks_lie_on_one_clock_with_waiting_above_them(tmp_path: Path, name: str) -> None:
    found = merge(tmp_path / name)
    for rank in (0, 1):
        lines = slices(found, rank)
        assert set(lines) == {TITLE, "device 0 stream 7", "device 0 stream 20", "thread 100"}
        spent = defaultdict(int)
        for event in lines[TITLE]:
            spent[event["name"]] += nanoseconds(event["dur"])
        expected = {"transfer (allreduce)": COUNT * TRANSFER_NS}
        if rank == 0:
            expected["wait for rank 1 (allreduce)"] = COUNT * LATE_NS
        assert spent == expected
    ends = [
        [
            nanoseconds(e["ts"]) + nanoseconds(e["dur"])
            for e in slices(found, r)["device 0 stream 20"]
        ]
        for r in (0, 1)
    ]
    assert max(abs(a - b) for a, b in zip(*ends, strict=True)) <= 2


def test_times_are_exact_to_the_nanosecond(tmp_path: Path) -> None:
    [(trace, _), _] = two_ranks()
    path = tmp_path / "one.json"
    assert write_perfetto(path, [trace], [lambda t: t], [Track(TITLE)]) == len(trace)
    text = path.read_text()
    found = json.loads(text, parse_float=str)
    base = found["baseTimeNanoseconds"]
    written = [e for e in found["traceEvents"] if e["ph"] == "X"]
    for event, start, end, row in zip(
        written, trace.start_ns.tolist(), trace.end_ns.tolist(), range(len(trace)), strict=True
    ):
        whole, _, decimals = event["ts"].partition(".")
        assert base + int(whole) * 1000 + int(decimals) == start
        whole, _, decimals = event["dur"].partition(".")
        assert int(whole) * 1000 + int(decimals) == end - start
        assert event["name"] == trace.text(row)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), max_size=25))
def test_slices_of_one_line_nest(pairs: list[tuple[int, int]]) -> None:
    one = Recording()
    for start, length in pairs:
        one.add(Kind.KERNEL, "k", start, start + length, STREAM)
        one.add(Kind.DEVICE_RANGE, "r", start, start + length, STREAM)
        one.add(Kind.OP, "o", start, start + length, THREAD)
    trace, _ = one.build()
    lines, titles = lines_of(trace, trace.start_ns, trace.end_ns)
    assert len(set(titles)) == len(titles)
    for line in range(len(titles)):
        rows = np.flatnonzero(lines == line)
        spans = list(zip(trace.start_ns[rows].tolist(), trace.end_ns[rows].tolist(), strict=True))
        for i, (start, end) in enumerate(spans):
            for begin, stop in spans[i + 1 :]:
                assert begin >= end or stop <= end, "slices overlap without nesting"
                assert begin >= start


def test_nothing_to_merge_is_an_empty_trace(tmp_path: Path) -> None:
    trace, _ = Recording().build()
    path = tmp_path / "empty.json.gz"
    assert write_perfetto(path, [trace], [lambda t: t], [Track(TITLE)]) == 0
    assert json.loads(gzip.decompress(path.read_bytes()))["baseTimeNanoseconds"] == 0


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    trace, _ = Recording().build()
    with pytest.raises(TraceError, match="cannot be written"):
        write_perfetto(tmp_path / "no" / "x.json", [trace], [lambda t: t], [Track(TITLE)])
    with pytest.raises(TraceError, match="cannot be written"):
        write_perfetto(tmp_path, [trace], [lambda t: t], [Track(TITLE)])
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(TraceError, match="cannot be written"):
        write_perfetto(full, [trace], [lambda t: t], [Track(TITLE)])
    assert full.is_symlink(), "a device is not taken away"
