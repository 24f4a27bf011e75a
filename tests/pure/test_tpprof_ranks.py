"""Matching, clocks and waits across ranks, on traces made with known offsets and delays."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tpprof.classify.collective_kinds import busbw_factor, synchronises
from tpprof.classify.work import Work
from tpprof.events import Trace
from tpprof.ranks.clock import Clock, fit_clocks
from tpprof.ranks.match import Matched, match
from tpprof.ranks.wait import (
    HOST_LATE,
    Waits,
    arrivals,
    columns_of,
    divide,
    estimated,
    ready_of,
    what_last_did,
)

from tests.pure.tpprof_builders import STREAM, Recording

TRANSFER_NS = 20_000
EVERY_NS = 200_000


def run(
    skews: np.ndarray,
    offsets: tuple[int, ...] = (0, 0),
    drifts: tuple[float, ...] = (0.0, 0.0),
    begin: int = 1_000_000,
    kind: str = "allreduce",
    **verdict: object,
) -> list[tuple[Trace, Work]]:
    """Ranks that all-reduce every 200 us; rank r comes `skews[i, r]` ns late to the i-th."""
    recordings = [Recording(rank=rank) for rank in range(skews.shape[1])]
    for i, late in enumerate(skews.tolist()):
        due = begin + i * EVERY_NS
        end = due + max(late) + TRANSFER_NS
        for rank, recording in enumerate(recordings):

            def local(moment: int, rank: int = rank) -> int:
                since = moment - begin
                return moment + offsets[rank] + round(drifts[rank] * since)

            recording.kernel("gemm", local(due - 50_000), local(due + late[rank]), key="mlp")
            more = {"group": "tp", "sequence": i, "size": len(recordings), "bytes": 1 << 20}
            recording.comm(kind, local(due + late[rank]), local(end), **{**more, **verdict})
    return [recording.build() for recording in recordings]


def skews_of(count: int, ranks: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 80_000, (count, ranks))


def solve(built: list[tuple[Trace, Work]], **more: object) -> tuple[Matched, list[Clock], Waits]:
    traces, works = [trace for trace, _ in built], [work for _, work in built]
    matched = match(traces, works)
    ends = columns_of(matched, [work.end_ns for work in works])
    lengths = columns_of(matched, [work.end_ns - work.start_ns for work in works])
    starts = [int(trace.start_ns[0]) if len(trace) else 0 for trace in traces]
    clocks = fit_clocks([t.rank for t in traces], starts, matched, ends, lengths, **more)  # type: ignore[arg-type]
    return matched, clocks, divide(matched, works, clocks)


@pytest.mark.parametrize("offset", [0, 7_777, -3_000_000, 10**12, 17 * 10**17])
@pytest.mark.parametrize("drift", [0.0, 50e-6, -100e-6])
def test_waits_survive_another_clock(offset, drift):
    skews = skews_of(100)
    built = run(skews, (0, offset), (0.0, drift))
    matched, clocks, waits = solve(built)
    assert len(matched) == 100
    assert clocks[1].accepted
    assert clocks[1].drift == pytest.approx(-drift, rel=1e-3, abs=1e-9)
    assert clocks[1].offset_ns == pytest.approx(-offset, abs=10)
    expected = skews.max(1)[:, None] - skews
    assert np.abs(waits.wait_ns - expected).max() <= 10
    assert np.abs(waits.transfer_ns - TRANSFER_NS).max() <= 10
    told = np.abs(skews[:, 0] - skews[:, 1]) > 10
    assert (waits.last[told] == skews.argmax(1)[told]).all()


def test_noise_in_the_ends_becomes_the_residual_and_hides_small_waits():
    skews = skews_of(200)
    skews[:, 1] = skews[:, 0]
    built = run(skews)
    random = np.random.default_rng(1)
    noisy = []
    for trace, work in built:
        is_comm = work.comm_op >= 0
        jitter = np.where(is_comm, random.normal(0, 1_000, len(work)).astype(int), 0)
        noisy.append((trace, replace(work, end_ns=work.end_ns + jitter)))
    _, clocks, waits = solve(noisy)
    assert 500 < clocks[1].residual_ns < 1_500
    assert clocks[1].accepted
    assert not waits.wait_ns.any()
    assert (waits.last == -1).all()


def test_ends_too_far_apart_are_refused_with_the_reason():
    built = run(skews_of(50))
    random = np.random.default_rng(1)
    trace, work = built[1]
    end = work.end_ns + random.integers(0, 40_000, len(work))
    built[1] = trace, replace(work, end_ns=end)
    _, clocks, waits = solve(built)
    assert not clocks[1].accepted
    assert "20% of their median duration" in clocks[1].reason
    assert len(waits.row) == 0
    assert not ready_of(
        match([t for t, _ in built], [w for _, w in built]), waits, 0, work
    ).known.any()


def test_seven_collectives_are_too_few():
    _, clocks, waits = solve(run(skews_of(7)))
    assert clocks[0].accepted
    assert not clocks[1].accepted
    assert clocks[1].reason.startswith("7 collectives are matched with rank 0, 8 are needed")
    assert len(waits.row) == 0
    _, clocks, waits = solve(run(skews_of(8)))
    assert clocks[1].accepted
    assert len(waits.row) == 8


def test_ranks_of_one_host_share_its_clock():
    skews = skews_of(3)
    _, clocks, waits = solve(run(skews), shared=[frozenset({0, 1})])
    assert clocks[1].alignment().offset_ns == 0
    assert clocks[1].accepted
    assert "share" in clocks[1].reason
    assert (waits.wait_ns == skews.max(1)[:, None] - skews).all()


def test_a_clock_maps_there_and_back():
    clock = Clock(1, 10**18, offset_ns=-5_000_000_000, drift=80e-6, reference=0)
    times = 10**18 + np.arange(0, 10**10, 10**8)
    assert np.abs(clock.from_reference(clock.to_reference(times)) - times).max() <= 1


def test_two_groups_without_a_common_collective_are_aligned_each_to_itself():
    built = run(skews_of(20), (0, 500))
    others = run(skews_of(20, seed=3), (9_000, 9_100))
    for index, (trace, work) in enumerate(others):
        keys = ["tp1" if key == "tp" else key for key in work.keys]
        built.append((replace(trace, rank=2 + index), replace(work, keys=keys)))
    matched, clocks, waits = solve(built)
    assert len(matched) == 40
    assert [clock.accepted for clock in clocks] == [True, True, False, False]
    assert clocks[3].reason.startswith("aligned to rank 2 only")
    assert len(waits.row) == 40
    assert (waits.transfer_ns[:, :2].max(1) >= TRANSFER_NS - 10)[:20].all()


def test_without_sequences_order_within_the_step_matches():
    skews = skews_of(30)
    built = run(skews, sequence=-1)
    for index, (trace, work) in enumerate(built):
        built[index] = trace, replace(work, step=np.arange(len(work)) // 6)
    matched, _, waits = solve(built)
    assert len(matched) == 30
    assert (waits.wait_ns == skews.max(1)[:, None] - skews).all()


def _without(work: Work, entry: int) -> Work:
    """The work less one collective (its row of the trace stays)."""
    victim = np.flatnonzero(work.comm_op >= 0)[entry]
    keep = np.arange(len(work)) != victim
    columns = {
        name: column[keep] for name, column in vars(work).items() if isinstance(column, np.ndarray)
    }
    return replace(work, **columns)


def test_a_lost_collective_spoils_only_its_step():
    built = run(skews_of(30), sequence=-1)
    built = [(t, replace(w, step=np.arange(len(w)) // 6)) for t, w in built]
    built[1] = built[1][0], _without(built[1][1], 4)
    matched, _, _ = solve(built)
    assert len(matched) == 27
    assert matched.warnings == (
        "3 collectives without a sequence number stay comm_unsplit: ranks differ in their number, "
        "names or bytes within a step",
    )


def test_a_lost_collective_with_sequences_spoils_only_itself():
    skews = skews_of(30)
    built = run(skews)
    built[1] = built[1][0], _without(built[1][1], 4)
    matched, _, waits = solve(built)
    assert len(matched) == 29
    assert "not on the trace of every rank" in matched.warnings[0]
    expected = np.delete(skews.max(1)[:, None] - skews, 4, 0)
    assert (waits.wait_ns == expected).all()


def test_different_bytes_or_names_are_not_matched():
    built = run(skews_of(10), sequence=-1)
    trace, work = built[1]
    assert len(match([t for t, _ in built], [w for _, w in built])) == 10
    renamed = replace(work, keys=["allgather" if k == "allreduce" else k for k in work.keys])
    assert len(match([built[0][0], trace], [built[0][1], renamed])) == 0
    resized = replace(work, comm_bytes=np.where(work.comm_bytes > 0, 1 << 19, -1))
    assert len(match([built[0][0], trace], [built[0][1], resized])) == 0


def test_without_a_group_order_on_the_stream_matches():
    skews = skews_of(12)
    matched, _, waits = solve(run(skews, sequence=-1, group=None))
    assert len(matched) == 12
    assert (waits.wait_ns == skews.max(1)[:, None] - skews).all()


def test_inside_graphs_order_within_the_launch_matches():
    recordings = [Recording(rank=0), Recording(rank=1)]
    for rank, recording in enumerate(recordings):
        for replay in range(10):
            at = replay * 100_000
            launch = recording.call(at, at + 10, "cudaGraphLaunch")
            for node in range(3):
                start = at + 1_000 + node * 20_000 + rank * 300
                end = at + 12_000 + node * 20_000
                recording.comm("allreduce", start, end, launch=launch, node=node, lane=STREAM)
    built = [recording.build() for recording in recordings]
    matched, _, waits = solve(built)
    assert len(matched) == 30
    assert (waits.wait_ns == [[300, 0]]).all()
    lost = [built[0], (built[1][0], _without(built[1][1], 1))]
    assert len(solve(lost)[0]) == 27


def test_groups_of_one_name_are_told_apart_by_their_ranks():
    pairs = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
    skews = skews_of(10, ranks=4)
    built = run(skews, (0,) * 4, (0.0,) * 4)
    built = [(replace(t, groups={"tp": pairs[t.rank]}), w) for t, w in built]
    matched, _, _ = solve(built)
    assert len(matched) == 20
    assert (matched.takes_part.sum(1) == 2).all()
    assert matched.size.tolist() == [4] * 20


def test_broadcast_and_send_are_matched_but_not_divided():
    for op in ("broadcast", "send", "reduce", "sendrecv"):
        assert not synchronises(op)
        matched, clocks, waits = solve(run(skews_of(10), kind=op))
        assert len(matched) == 10
        assert not clocks[1].accepted
        assert len(waits.row) == 0


def test_a_kernel_that_started_ahead_of_its_inputs_arrives_with_its_predecessor():
    recording = Recording()
    recording.kernel("gemm", 0, 50)
    recording.comm("allreduce", 30, 90, lane=STREAM)
    recording.comm("allreduce", 95, 99, lane=STREAM)
    recording.kernel("gemm", 40, 200, lane=replace(STREAM, tid=9))
    _, work = recording.build()
    assert arrivals(work)[work.comm_op >= 0].tolist() == [50, 95]


def test_the_last_rank_is_named_with_what_it_did():
    recordings = [Recording(rank=0), Recording(rank=1), Recording(rank=2)]
    for i in range(12):
        at = i * 100_000
        late = {0: at + 1_000, 1: at + 9_000, 2: at + 2_000}
        slow = recordings[1]
        kind = i % 3
        if kind == 0:
            slow.kernel("big_gemm", at + 500, at + 8_500, key="layers.0.mlp.up")
        elif kind == 1:
            slow.comm("broadcast", at + 500, at + 8_500, lane=STREAM)
        for rank, recording in enumerate(recordings):
            recording.comm("allreduce", late[rank], at + 20_000, group="tp", sequence=i)
    built = [recording.build() for recording in recordings]
    matched, clocks, waits = solve(built)
    traces, works = [t for t, _ in built], [w for _, w in built]
    told = what_last_did(matched, waits, traces, works, clocks)
    assert (waits.last == 1).all()
    assert told[:3] == ["layers.0.mlp.up", "earlier broadcast", HOST_LATE]


def test_one_file_alone_gives_an_estimate():
    recording = Recording()
    recording.comm("allreduce", 0, 100, floor=30)
    recording.comm("allreduce", 200, 220, floor=30)
    recording.comm("allreduce", 300, 320)
    recording.comm("allreduce", 400, 420, floor=5, size=1)
    _, work = recording.build()
    ready = estimated(work)
    assert ready.known.tolist() == [True, True, False, True]
    assert ready.at_ns.tolist() == [70, 200, 300, 400]


def test_bus_bandwidth_factors():
    assert busbw_factor("allreduce", 4) == 1.5
    assert busbw_factor("reduce_scatter_tensor", 4) == 0.75
    assert busbw_factor("AllGather", 2) == 0.5
    assert busbw_factor("broadcast", 8) == 1.0


def test_nothing_to_match_is_no_error():
    empty = Recording().build()
    assert len(match([empty[0]], [empty[1]])) == 0
    other = Recording(rank=1).build()
    matched, clocks, waits = solve([empty, other])
    assert len(matched) == len(waits.row) == 0
    assert not clocks[1].accepted
    alone = run(skews_of(10))[:1]
    assert len(match([alone[0][0]], [alone[0][1]])) == 0


@given(
    st.integers(2, 5),
    st.integers(8, 20),
    st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_wait_and_transfer_make_the_kernel_and_somebody_waits_for_nobody(ranks, count, random):
    skews = np.array([[random.randrange(60_000) for _ in range(ranks)] for _ in range(count)])
    offsets = tuple(random.randrange(10**9) for _ in range(ranks))
    built = run(skews, offsets, (0.0,) * ranks)
    matched, _, waits = solve(built)
    works = [work for _, work in built]
    lengths = columns_of(matched, [work.end_ns - work.start_ns for work in works])[waits.row]
    assert (waits.wait_ns + waits.transfer_ns == lengths).all()
    assert (waits.wait_ns >= 0).all()
    assert (waits.wait_ns.min(1) == 0).all()
    assert np.abs(waits.wait_ns - (skews.max(1)[:, None] - skews)[waits.row]).max() <= 2
