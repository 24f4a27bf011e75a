"""tpprof's readers against runs whose truth is known: every row, time, link and collective."""

from pathlib import Path

import numpy as np
import pytest
from tpprof.events import NONE, Kind, Trace
from tpprof.readers.read import read_traces

from tests.traces.catalogue import DAMAGED, SCENARIOS
from tests.traces.kernels import COMPUTE_STREAM
from tests.traces.kineto import EPOCH_NS, SECRET, KinetoStyle, write_kineto
from tests.traces.names import ENGINES, call_name, kernel_name
from tests.traces.nsight import NsightStyle, write_nsight, write_nsight_per_rank
from tests.traces.simulate import DeviceRow, RankRun, Run, simulate

Row = tuple[int, int, str, int, str]


def truly(rank: RankRun, engine: str) -> list[Row]:
    """(start, end, name, stream, call) of the rows that a recorder kept whole."""
    local = rank.clock.local
    return sorted(
        (
            local(row.start_ns),
            local(row.end_ns),
            kernel_name(engine, row.work).partition(" (P")[0].partition(" (D")[0],
            row.work.stream,
            call_name(row.call.kind),
        )
        for row in rank.rows
        if row.damage is None
    )


def as_read(trace: Trace, origin_ns: int) -> list[Row]:
    """The same of a trace."""
    return sorted(
        (
            int(trace.start_ns[row]) - origin_ns,
            int(trace.end_ns[row]) - origin_ns,
            trace.text(row).partition(" (P")[0].partition(" (D")[0],
            trace.lanes[trace.lane[row]].tid,
            trace.text(trace.launch[row]).partition("_v")[0] if trace.launch[row] >= 0 else "",
        )
        for row in np.flatnonzero(trace.is_device()).tolist()
    )


def origin_of(trace: Trace, rank: RankRun) -> int:
    """What to take from the trace's times to get the rank's clock: by the first step."""
    steps = [row for row in trace.rows_of(Kind.RANGE).tolist() if "step" in trace.text(row)]
    return int(trace.start_ns[steps[0]]) - rank.clock.local(rank.steps()[0].start_ns)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["clock drift", "graph", "hidden", "overlapped graphs"])
def test_kineto_rows(name: str, engine: str, tmp_path: Path) -> None:
    run = simulate(SCENARIOS[name])
    write_kineto(run, tmp_path, KinetoStyle(engine, shuffle_seed=3, has_graph_ids=True))
    traces = read_traces([tmp_path])
    assert [trace.rank for trace in traces] == list(range(run.scenario.num_ranks))
    for trace, rank in zip(traces, run.ranks, strict=True):
        assert as_read(trace, EPOCH_NS) == truly(rank, engine)
        assert trace.world_size == run.scenario.num_ranks and trace.num_lost == 0
        assert not [text for text in trace.strings if SECRET in text]
        in_graphs = sum(row.node >= 0 for row in rank.rows)
        assert int((trace.node[trace.is_device()] != NONE).sum()) == in_graphs


@pytest.mark.parametrize("kind", ["one", "per rank", "registered"])
@pytest.mark.parametrize("name", ["steady", "graph", "hidden", "eight ranks"])
def test_nsight_rows(name: str, kind: str, tmp_path: Path) -> None:
    run = simulate(SCENARIOS[name])
    if kind == "per rank":
        write_nsight_per_rank(run, tmp_path)
    else:
        write_nsight(run, tmp_path / "all.sqlite", NsightStyle(is_registered=kind == "registered"))
    traces = read_traces([tmp_path])
    assert [trace.rank for trace in traces] == list(range(run.scenario.num_ranks))
    for trace, rank in zip(traces, run.ranks, strict=True):
        assert as_read(trace, origin_of(trace, rank)) == truly(rank, "tpinfer")
        assert not [text for text in trace.strings if SECRET in text]
        in_graphs = sum(row.node >= 0 for row in rank.rows)
        assert int((trace.node[trace.is_device()] != NONE).sum()) == in_graphs
        assert int(trace.num_blocks[trace.rows_of(Kind.KERNEL)].min()) > 0


def collectives_of(trace: Trace) -> list[tuple[int, str, int, int, int]]:
    """(start, op, bytes, group size, Seq), as the trace's table has them."""
    table = trace.collectives
    return [
        (
            int(trace.start_ns[row]) - EPOCH_NS,
            trace.strings[table.op[i]],
            int(table.num_bytes[i]),
            int(table.group_size[i]),
            int(table.sequence[i]),
        )
        for i, row in enumerate(table.row.tolist())
    ]


def described(run: Run, rank: RankRun) -> list[DeviceRow]:
    """Collectives outside graphs, by start."""
    rows = [row for row in rank.rows if row.work.collective and row.node < 0]
    return sorted(rows, key=lambda row: row.start_ns)


@pytest.mark.parametrize("args", ["seq", "plain"])
@pytest.mark.parametrize("name", ["steady", "graph", "two groups", "broadcast"])
def test_what_kineto_tells_of_collectives(name: str, args: str, tmp_path: Path) -> None:
    run = simulate(SCENARIOS[name])
    write_kineto(run, tmp_path, KinetoStyle(collective_args=args))
    for trace, rank in zip(read_traces([tmp_path]), run.ranks, strict=True):
        local = rank.clock.local
        found = [one for one in collectives_of(trace) if one[3] != NONE]
        assert [(one[0], *one[2:]) for one in found] == [
            (
                local(row.start_ns),
                row.work.num_bytes,
                run.scenario.tp,
                900 + row.meeting if args == "seq" else NONE,
            )
            for row in described(run, rank)
        ]
        spelled = [one[1].removesuffix("base").strip("_") for one in found]
        assert spelled == [row.work.collective for row in described(run, rank)]
        members = tuple(run.scenario.group(rank.rank))
        assert members in trace.groups.values()


def test_operators_carry_shapes(tmp_path: Path) -> None:
    run = simulate(SCENARIOS["steady"])
    write_kineto(run, tmp_path)
    for trace, rank in zip(read_traces([tmp_path]), run.ranks, strict=True):
        rows = sorted(
            np.flatnonzero(trace.is_device()).tolist(), key=lambda row: int(trace.start_ns[row])
        )
        in_order = sorted(rank.rows, key=lambda row: row.start_ns)
        for row, true in zip(rows, in_order, strict=True):
            if true.work.product is None:
                continue
            m, k, n = true.work.product
            operator = trace.op[row]
            assert trace.text(operator) == "aten::mm"
            assert trace.strings[trace.shapes[operator]].startswith(f"[[[{m},{k}],[{k},{n}]]")


@pytest.mark.parametrize("kind", ["kineto", "nsight"])
@pytest.mark.parametrize("name", DAMAGED)
def test_broken_rows_never_reach_the_columns(name: str, kind: str, tmp_path: Path) -> None:
    """A row with time 0 or an end before its start is gone or empty, and told."""
    run = simulate(DAMAGED[name])
    [damage] = run.scenario.damages
    if kind == "kineto":
        write_kineto(run, tmp_path)
    else:
        write_nsight_per_rank(run, tmp_path)
    for trace, rank in zip(read_traces([tmp_path]), run.ranks, strict=True):
        assert (trace.end_ns >= trace.start_ns).all()
        spoilt = rank.rank == damage.rank and damage.kind in ("zero", "backwards")
        assert (trace.num_lost > 0) == spoilt
        spans = trace.end_ns - trace.start_ns
        whole = int((trace.is_device() & (spans > 0) & (trace.start_ns > 10**9)).sum())
        lost = sum(row.damage is not None for row in rank.rows)
        assert whole == len(rank.rows) - lost * (damage.kind != "endless")
        assert int((trace.kind == Kind.LAUNCH).sum()) >= len({id(r.call) for r in rank.rows})


def test_streams_keep_their_numbers(tmp_path: Path) -> None:
    write_kineto(simulate(SCENARIOS["hidden"]), tmp_path)
    [first, _] = read_traces([tmp_path])
    streams = {lane.tid for lane in first.lanes if lane.is_device}
    assert COMPUTE_STREAM in streams and len(streams) == 2
