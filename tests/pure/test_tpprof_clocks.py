"""lost = clocks + rest, against made-up runs whose clocks are known, and of anything at all."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpprof.attribute.clock_losses import clock_losses, device_clock
from tpprof.classify.classify import classify_trace
from tpprof.classify.work import Work
from tpprof.report.advice import advise
from tpprof.report.html import render_html
from tpprof.report.jsonform import decode_report, encode_report
from tpprof.report.text import render_report
from tpprof.results import DeviceClock, OpResult, Report

from tests.pure.golden import check_golden
from tests.pure.tpprof_reports import two_ranks
from tests.pure.tpprof_rows import Rows
from tests.pure.tpprof_works import BF16, CEILINGS, GEMM, mm
from tests.traces.agreement import analysed, recorded
from tests.traces.catalogue import SCENARIOS
from tests.traces.kernels import roofs_ns
from tests.traces.kineto import EPOCH_NS
from tests.traces.scenario import CEILINGS as GENERATED
from tests.traces.simulate import Run
from tpinfer.config.ceilings import Ceilings
from tpinfer.config.clock_samples import (
    NO_REASON,
    ClockSamples,
    clock_samples_path,
    write_clock_samples,
)

MS = 1_000_000


def samples_of(
    moments: Sequence[int],
    compute: Sequence[float | None],
    memory: Sequence[float | None] | None = None,
    reasons: Sequence[list[str] | None] | None = None,
    pairs: tuple[tuple[int, int], ...] = ((0, 0),),
    rank: int = 0,
) -> ClockSamples:
    """One a given moment of the monotonic clock."""
    count = len(moments)
    return ClockSamples(
        rank=rank, kind="gpu", device="made up", period_ns=20 * MS, clock_pairs=list(pairs),
        monotonic_ns=list(moments), compute_mhz=list(compute),
        memory_mhz=list(memory or [None] * count),
        power_w=[690.0] * count, temperature_c=[float(60 + i) for i in range(count)],
        reasons=list(reasons or [["sw_power_cap"]] * count), most_compute_mhz=2000.0,
        most_memory_mhz=2600.0, power_limit_w=700.0,
    )  # fmt: skip


def beside(directory: Path, run: Run, compute: float, memory: float) -> None:
    """Samples of every rank on a monotonic clock of its own, every 20 ms of the run."""
    for rank in run.ranks:
        began = EPOCH_NS + rank.clock.local(0) - 5 * MS
        last = max(row.end_ns for row in rank.rows)
        moments = [7_000 + i * 20 * MS for i in range(last // (20 * MS) + 3)]
        count = len(moments)
        write_clock_samples(
            samples_of(
                moments, [compute] * count, [memory] * count,
                pairs=((7_000, began), (moments[-1], began + moments[-1] - 7_000)), rank=rank.rank,
            ),
            clock_samples_path(directory, rank.rank),
        )  # fmt: skip


def expected_ns(run: Run, rank: int, compute: float, memory: float) -> tuple[int, int]:
    """(sum over products of what the clocks cost, number of products), in true time."""
    total, number = 0, 0
    for row in run.ranks[rank].rows:
        if row.work.product is None or row.work.leaf == "latency":
            continue
        by_arithmetic, by_memory = roofs_ns(row.work.product)
        floor = round(max(by_arithmetic, by_memory))
        slower = max(by_arithmetic * 2000 / compute, by_memory * 2600 / memory)
        total += round(min(slower - floor, max(row.end_ns - row.start_ns - floor, 0)))
        number += 1
    return total, number


@pytest.mark.parametrize("name", ["alone", "steady", "graph", "clock offset", "overlapped steps"])
@pytest.mark.parametrize(("compute", "memory"), [(1900.0, 2600.0), (1000.0, 2340.0)])
def test_a_run_at_known_clocks(name: str, compute: float, memory: float, tmp_path: Path) -> None:
    """At 95 % all of what the clock adds was lost; at half some kernels lost less than that."""
    run, paths = recorded(SCENARIOS[name], tmp_path)
    without = analysed(paths)
    assert without.device_clocks == [] and all(op.lost_to == {} for op in without.ops)
    beside(tmp_path, run, compute, memory)
    report = analysed(paths)
    assert [one.rank for one in report.device_clocks] == [rank.rank for rank in run.ranks]
    assert [replace(op, lost_to={}) for op in report.ops] == without.ops
    for one in report.device_clocks:
        true, number = expected_ns(run, one.rank, compute, memory)
        assert number and abs(one.clocks_ns - true) <= 4 * number
        assert one.reasons_ns == {"power cap": one.clocks_ns}
        assert (one.compute_mhz, one.full_compute_mhz) == (compute, 2000.0)
        assert (one.memory_mhz, one.full_memory_mhz) == (memory, 2600.0)
        assert one.coverage == 1.0
        mine = [op for op in report.ops if op.rank == one.rank]
        assert sum(op.lost_to["clocks"] for op in mine) == one.clocks_ns
        assert sum(op.lost_ns for op in mine if op.floor_ns) == one.lost_ns
    check_sums(report)


def check_sums(report: Report) -> None:
    for op in report.ops:
        if op.lost_to:
            assert sum(op.lost_to.values()) == op.lost_ns == op.time_ns - op.floor_ns
            assert op.lost_to["clocks"] >= 0
    for one in report.device_clocks:
        assert sum(one.reasons_ns.values()) == one.clocks_ns


def test_ceilings_that_were_measured_at_that_clock_lose_nothing_to_it(tmp_path: Path) -> None:
    run, paths = recorded(SCENARIOS["alone"], tmp_path)
    beside(tmp_path, run, 1500.0, 2600.0)
    [one] = analysed(paths, ceilings=replace(GENERATED, compute_mhz=1500.0)).device_clocks
    assert (one.clocks_ns, one.full_compute_mhz, one.reasons_ns) == (0, 1500.0, {})
    [one] = analysed(paths, ceilings=replace(GENERATED, compute_mhz=1600.0)).device_clocks
    assert one.clocks_ns > 0


def test_samples_of_another_time_say_nothing(tmp_path: Path) -> None:
    _, paths = recorded(SCENARIOS["alone"], tmp_path)
    write_clock_samples(samples_of([1, 2], [1000.0] * 2), clock_samples_path(tmp_path, 0))
    assert analysed(paths).device_clocks == []
    clock_samples_path(tmp_path, 0).write_bytes(b"{}")
    assert analysed(paths).device_clocks == []


PRODUCTS = {"compute": mm(4096, 4096, 4096), "memory": mm(1, 4096, 4096), "small": mm(8, 64, 64)}


def worked(*kinds: tuple[str, int]) -> Work:
    """Kernels of PRODUCTS one after the other, each of a length in ns."""
    rows = Rows()
    for kind, length in kinds:
        rows.launched(GEMM, length, op=PRODUCTS.get(kind, ("x", [([3], BF16)])), num_blocks=400)
    return classify_trace(rows.trace(), CEILINGS)


def test_each_bound_goes_by_its_own_clock() -> None:
    work = worked(("compute", 10 * MS), ("memory", 10 * MS), ("small", 10 * MS), ("?", 10 * MS))
    moments = [20 * MS * i for i in range(4)]
    for compute, memory, moved in ((1000.0, 2600.0, 0), (2000.0, 1300.0, 1), (None, None, None)):
        losses = clock_losses(work, samples_of(moments, [compute] * 4, [memory] * 4), CEILINGS)
        if moved is None:
            assert losses is None
            continue
        assert losses is not None
        expected = np.zeros(4, np.int64)
        expected[moved] = work.floor_ns[moved]
        assert losses.clocks_ns.tolist() == expected.tolist()


def test_a_kernel_in_a_cache_does_not_go_by_the_memory_clock() -> None:
    work = worked(("memory", 10 * MS))
    work.floor_ns[:] = work.ceilings_ns["L2"]
    losses = clock_losses(work, samples_of([0, 20 * MS], [2000.0] * 2, [1300.0] * 2), CEILINGS)
    assert losses is not None and losses.clocks_ns.tolist() == [0]


def test_the_clock_of_a_long_kernel_is_its_mean_and_idle_samples_do_not_count() -> None:
    """2000 MHz for 100 ms, falling to 1000 over 100 ms, then idle at 200 MHz."""
    work = worked(("compute", 200 * MS))
    start = int(work.start_ns[0])
    moments = [start, start + 100 * MS, start + 200 * MS, start + 220 * MS]
    reasons: list[list[str] | None] = [[], [], ["hw_thermal_slowdown"], ["gpu_idle"]]
    samples = samples_of(moments, [2000.0, 2000.0, 1000.0, 200.0], None, reasons)
    losses = clock_losses(work, samples, CEILINGS)
    assert losses is not None
    assert losses.compute_mhz.tolist() == pytest.approx([1750.0])
    assert losses.clocks_ns[0] == round(work.floor_ns[0] * (2000 / 1750 - 1))
    one = device_clock(work, np.arange(1), samples, losses)
    assert one.reasons_ns == {NO_REASON: one.clocks_ns}
    assert one.num_samples == 3 and one.temperature_c == 63.0


def test_kernels_out_of_reach_of_the_samples_lose_nothing() -> None:
    work = worked(("compute", 10 * MS), ("?", 300 * MS), ("compute", 10 * MS))
    losses = clock_losses(work, samples_of([0, 20 * MS], [1000.0] * 2), CEILINGS)
    assert losses is not None
    assert losses.clocks_ns.tolist() == [int(work.floor_ns[0]), 0, 0]
    one = device_clock(work, np.arange(3), samples_of([0, 20 * MS], [1000.0] * 2), losses)
    assert one.coverage == pytest.approx(10 / 320)


clock = st.none() | st.floats(1.0, 4000.0)
said = st.none() | st.lists(
    st.sampled_from(["gpu_idle", "sw_power_cap", "hw_thermal_slowdown", "of the future"]),
    max_size=2,
)
sample = st.tuples(st.integers(1, 60 * MS), clock, clock, said)
kernel = st.tuples(st.sampled_from([*PRODUCTS, "?"]), st.integers(1, 50 * MS))


@given(st.lists(kernel, min_size=1, max_size=6), st.lists(sample, max_size=8), clock)
def test_of_anything_the_parts_are_sound(
    kernels: list[tuple[str, int]],
    taken: list[tuple[int, float | None, float | None, list[str] | None]],
    measured_at: float | None,
) -> None:
    work = worked(*kernels)
    moments = np.cumsum(np.array([step for step, *_ in taken], np.int64)).tolist()
    compute, memory = [one[1] for one in taken], [one[2] for one in taken]
    samples = samples_of(moments, compute, memory, [one[3] for one in taken])
    ceilings: Ceilings = replace(CEILINGS, compute_mhz=measured_at)
    losses = clock_losses(work, samples, ceilings)
    if losses is None:
        return
    lost = work.end_ns - work.start_ns - work.floor_ns
    assert (losses.clocks_ns >= 0).all()
    assert (losses.clocks_ns <= np.maximum(lost, 0)).all()
    assert (losses.clocks_ns[work.floor_ns == 0] == 0).all()
    one = device_clock(work, np.arange(len(work)), samples, losses)
    assert sum(one.reasons_ns.values()) == one.clocks_ns <= max(one.lost_ns, one.clocks_ns)
    assert 0 <= one.coverage <= 1


def throttled() -> Report:
    """The example of the reports with clocks on rank 0: half of what is lost where it can be."""
    report = two_ranks()

    def split(op: OpResult) -> OpResult:
        held = op.bound in ("compute", "memory")
        clocks = op.lost_ns // 2 if held else 0
        return replace(op, lost_to={"clocks": clocks, "rest": op.lost_ns - clocks})

    ops = [split(op) if op.rank == 0 else op for op in report.ops]
    mine = [op for op in ops if op.rank == 0]
    clocks = sum(op.lost_to["clocks"] for op in mine)
    one = DeviceClock(
        rank=0, kind="gpu", device="NVIDIA H100 80GB HBM3", num_samples=1500, coverage=0.998,
        compute_mhz=1410.2, full_compute_mhz=1980.0, memory_mhz=2095.2, full_memory_mhz=2619.0,
        power_w=698.4, power_limit_w=700.0, temperature_c=74.0,
        lost_ns=sum(op.lost_ns for op in mine if op.floor_ns), clocks_ns=clocks,
        reasons_ns={"power cap": clocks - clocks // 5, "thermal": clocks // 5},
    )  # fmt: skip
    report = replace(report, ops=ops, device_clocks=[one], groups=[], by="")
    check_sums(report)
    return replace(report, advice=advise(report))


def test_the_report_is_the_golden_one(tmp_path: Path) -> None:
    text = render_report(throttled())
    check_golden("tpprof-report-clocks.txt", text + "\n", tmp_path)
    assert max(map(len, text.splitlines())) <= 100


def test_json_and_page_hold_the_clocks() -> None:
    report = throttled()
    again = decode_report(encode_report(report), "here")
    assert again.device_clocks == report.device_clocks
    assert again.ops == report.ops
    page = render_html(report)
    assert "power cap 80%, thermal 20%" in page and '<th scope="col">clocks</th>' in page
    older = msgspec.json.decode(encode_report(two_ranks()))
    del older["device_clocks"]
    for op in older["ops"]:
        del op["lost_to"]
    assert decode_report(msgspec.json.encode(older), "older").device_clocks == []
