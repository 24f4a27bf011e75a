"""The sweep: known cases leaf by leaf, and random ones against a moment-by-moment reading."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tpprof.attribute.idle import LaunchFloors
from tpprof.attribute.sweep import Recorded, sweep
from tpprof.attribute.timeline import Timeline, add_splits
from tpprof.classify.work import Work, WorkKind
from tpprof.events import Kind, Lane, Trace
from tpprof.ranks.wait import Ready, nothing_ready
from tpprof.results import Split

from tests.pure.tpprof_builders import COMM_STREAM, STREAM, THREAD, Recording

FLOORS = LaunchFloors(kernel_ns=5, graph_ns=10)
OTHER_STREAM = Lane(is_device=True, pid=-1, tid=8, device=0)
NO_LOSS = (np.empty(0, np.int64), np.empty(0, np.int64))


def whole(work: Work, low: int = -1_000, high: int = 10_000) -> Recorded:
    """A recording in which nothing is amiss."""
    return Recorded(low, high, np.zeros(len(work), bool), NO_LOSS)


def timeline_of(recording: Recording, ready: Ready | None = None) -> Timeline:
    trace, work = recording.build()
    ready = ready or nothing_ready(work)
    return sweep(trace, work, ready, whole(work), (-1_000, 10_000), FLOORS)


def split_of(recording: Recording, start_ns: int, end_ns: int, **more: Ready) -> Split:
    return timeline_of(recording, **more).split(start_ns, end_ns)


def test_each_stage_before_a_kernel_has_its_leaf():
    recording = Recording()
    recording.kernel("gemm", 50, 80, launch=recording.call(20, 30))
    split = split_of(recording, 0, 100)
    assert split.leaves == {
        "compute": 30,
        "host": 20,
        "launch_latency": 15,
        "idle_unexplained": 15,
        "host_tail": 20,
    }
    assert split.host_parts == {"python": 20}
    assert split.rollup["host"] == 70


def test_the_launch_floor_counts_from_when_the_device_could_start():
    recording = Recording()
    recording.kernel("gemm", 50, 80, launch=recording.call(20, 30))
    recording.kernel("gemm", 83, 100, launch=recording.call(31, 35))
    assert split_of(recording, 50, 100).leaves == {"compute": 47, "launch_latency": 3}


def test_a_launch_after_its_kernel_began_is_clamped_and_counted():
    recording = Recording()
    recording.kernel("gemm", 50, 80, launch=recording.call(60, 70))
    timeline = timeline_of(recording)
    assert timeline.num_negative_launches == 1
    assert timeline.split(0, 80).leaves == {"compute": 30, "host": 50}


def test_a_kernel_without_a_launch_leaves_the_gap_unexplained():
    recording = Recording()
    recording.kernel("gemm", 50, 80)
    assert split_of(recording, 0, 80).leaves == {"compute": 30, "idle_unexplained": 50}


@pytest.mark.parametrize(
    ("name", "kind", "lane", "at_ns", "expected"),
    [
        ("Stream Wait Event", Kind.SYNC, STREAM, (32, 50), "dependency_wait"),
        ("Stream Wait Event", Kind.SYNC, OTHER_STREAM, (32, 50), "idle_unexplained"),
        ("Stream Wait Event", Kind.SYNC, STREAM, (15, 16), "dependency_wait"),
        ("cudaStreamWaitEvent", Kind.LAUNCH, THREAD, (15, 16), "dependency_wait"),
        ("cudaStreamWaitEvent", Kind.LAUNCH, THREAD, (5, 6), "idle_unexplained"),
        ("cudaStreamSynchronize", Kind.LAUNCH, THREAD, (31, 80), "idle_unexplained"),
        ("Context Sync", Kind.SYNC, THREAD, (31, 80), "idle_unexplained"),
    ],
)
def test_only_a_wait_between_streams_explains_a_late_start(name, kind, lane, at_ns, expected):
    recording = Recording()
    recording.kernel("first", 11, 14, launch=recording.call(8, 10))
    recording.kernel("gemm", 50, 80, launch=recording.call(20, 30))
    recording.kernel("other", 1, 2, lane=OTHER_STREAM)
    recording.add(kind, name, at_ns[0], at_ns[1], lane)
    leaves = split_of(recording, 14, 80).leaves
    assert leaves == {"compute": 30, "host": 6, "launch_latency": 15, expected: 15}


def test_between_nodes_of_one_graph_is_graph_gap():
    recording = Recording()
    launch = recording.call(10, 20, "cudaGraphLaunch")
    recording.kernel("a", 28, 40, launch=launch, node=1)
    recording.kernel("b", 45, 60, launch=launch, node=2)
    assert split_of(recording, 10, 60).leaves == {
        "compute": 27,
        "launch_latency": 18,
        "graph_gap": 5,
    }


def test_graph_nodes_whose_launch_was_cut_off_still_have_graph_gaps():
    recording = Recording()
    recording.kernel("a", 28, 40, node=1)
    recording.kernel("b", 45, 60, node=2)
    assert split_of(recording, 28, 60).leaves == {"compute": 27, "graph_gap": 5}


def test_compute_owns_what_communication_shares_with_it():
    recording = Recording()
    recording.kernel("gemm", 0, 60)
    recording.comm("allreduce", 20, 100)
    split = split_of(recording, 0, 100)
    assert split.leaves == {"compute": 60, "comm_unsplit": 40}
    assert split.comm_hidden_ns == 40


def test_communication_comes_before_copies():
    recording = Recording()
    recording.copy("Memcpy DtoH", 0, 50)
    recording.comm("allreduce", 20, 40)
    assert split_of(recording, 0, 50).leaves == {"copy": 30, "comm_unsplit": 20}


def test_a_collective_is_divided_at_its_last_arrival():
    recording = Recording()
    recording.comm("allreduce", 0, 100)
    ready = Ready(np.array([70]), np.array([True]))
    leaves = split_of(recording, 0, 100, ready=ready).leaves
    assert leaves == {"comm_transfer": 30, "comm_wait": 70}


def test_a_fused_kernel_keeps_its_own_leaf_behind_the_wait():
    recording = Recording()
    recording.comm("allreduce", 0, 100, kind=WorkKind.FUSED_COMM)
    ready = Ready(np.array([70]), np.array([True]))
    assert split_of(recording, 0, 100, ready=ready).leaves == {"comm_wait": 70, "fused_comm": 30}


def test_under_programmatic_dependent_launch_the_earlier_kernel_keeps_the_overlap():
    recording = Recording()
    recording.kernel("attention", 0, 50, leaf="memory")
    recording.kernel("gemm", 30, 90)
    assert split_of(recording, 0, 90).leaves == {"compute": 40, "memory": 50}


def test_a_kernel_launched_ahead_hides_nothing_of_a_collective_on_its_own_stream():
    recording = Recording()
    recording.comm("allreduce", 0, 50, lane=STREAM)
    recording.kernel("gemm", 30, 90)
    split = split_of(recording, 0, 90)
    assert split.leaves == {"compute": 40, "comm_unsplit": 50}
    assert split.comm_hidden_ns == 0


def test_among_streams_the_earlier_start_counts_even_where_its_stream_was_taken():
    recording = Recording()
    recording.kernel("a", 0, 50)
    recording.kernel("b", 30, 90, leaf="memory")
    recording.kernel("c", 40, 100, lane=OTHER_STREAM, leaf="latency")
    assert split_of(recording, 0, 100).leaves == {"compute": 50, "memory": 40, "latency": 10}


def test_host_time_is_named_by_what_is_open_on_the_thread():
    recording = Recording()
    recording.range("tpinfer.host schedule", 0, 40)
    recording.range("tpinfer.host prepare", 10, 20)
    recording.add(Kind.OP, "aten::empty", 15, 50, THREAD)
    recording.add(Kind.LAUNCH, "cudaMalloc", 45, 55, THREAD)
    recording.add(Kind.OVERHEAD, "Buffer flush", 35, 37, THREAD)
    recording.add(Kind.PYTHON, "step", 0, 100, THREAD)
    recording.kernel("gemm", 100, 120, launch=recording.call(90, 100))
    split = split_of(recording, 0, 120)
    assert split.host_parts == {
        "recorder": 2,
        "runtime": 10,
        "python": 40,
        "schedule": 28,
        "prepare": 10,
    }
    assert split.leaves["host"] == 90


def test_on_cpu_ranks_all_time_between_ops_is_the_host():
    recording = Recording(is_cpu=True)
    recording.range("tpinfer.host prepare", 5, 10)
    recording.kernel("attn", 10, 30, lane=THREAD)
    recording.kernel("mlp", 34, 50, lane=THREAD)
    recording.range("tpinfer.host sample", 50, 58)
    split = split_of(recording, 0, 60)
    assert split.leaves == {"compute": 36, "host": 24}
    assert split.host_parts == {"prepare": 5, "sample": 8, "python": 11}


def test_lost_stretches_claim_no_idle_time():
    recording = Recording()
    recording.kernel("gemm", 50, 80, launch=recording.call(20, 30))
    trace, work = recording.build()
    recorded = replace(whole(work), lost=(np.array([10]), np.array([90])))
    timeline = sweep(trace, work, nothing_ready(work), recorded, (0, 100), FLOORS)
    leaves = timeline.split(0, 100).leaves
    assert leaves == {"compute": 30, "host": 10, "host_tail": 10, "unrecorded": 50}


def test_a_broken_kernel_owns_nothing():
    recording = Recording()
    recording.kernel("broken", 0, 900)
    recording.kernel("gemm", 10, 40)
    trace, work = recording.build()
    recorded = replace(whole(work), broken=work.end_ns > 800)
    timeline = sweep(trace, work, nothing_ready(work), recorded, (0, 100), FLOORS)
    assert timeline.split(0, 40).leaves == {"compute": 30, "idle_unexplained": 10}


def test_outside_the_recording_is_unrecorded():
    recording = Recording()
    recording.kernel("gemm", 10, 40, launch=recording.call(5, 8))
    trace, work = recording.build()
    recorded = replace(whole(work), start_ns=5, end_ns=60)
    timeline = sweep(trace, work, nothing_ready(work), recorded, (0, 80), FLOORS)
    leaves = timeline.split(-10, 100).leaves
    assert leaves == {"compute": 30, "launch_latency": 5, "host_tail": 20, "unrecorded": 55}


def test_waiting_for_admission_is_queue_whatever_ran():
    recording = Recording()
    recording.kernel("gemm", 0, 100)
    split = timeline_of(recording).split(0, 100, begun_ns=30)
    assert split.leaves == {"compute": 70, "queue": 30}
    assert split.rollup["queue"] == 30
    assert timeline_of(recording).split(0, 10, begun_ns=10).leaves == {"queue": 10}


def test_what_follows_the_last_op_of_a_window_is_its_tail():
    recording = Recording()
    recording.kernel("gemm", 0, 50)
    recording.kernel("gemm", 90, 100, launch=recording.call(60, 89))
    timeline = timeline_of(recording)
    assert timeline.split(0, 80).leaves == {"compute": 50, "host_tail": 30}
    assert timeline.split(0, 100).leaves == {"compute": 60, "host": 10, "launch_latency": 30}
    assert timeline.split(55, 56).leaves == {"host_tail": 1}


def test_nothing_recorded_still_sums():
    assert split_of(Recording(), 0, 100).leaves == {"host_tail": 100}
    assert split_of(Recording(), 50, 50).leaves == {}


def test_windows_add_up():
    recording = Recording()
    recording.kernel("gemm", 10, 50, launch=recording.call(2, 5))
    timeline = timeline_of(recording)
    total = add_splits([timeline.split(0, 30), timeline.split(30, 50)])
    assert total == timeline.split(0, 50)


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    """Kernels, collectives and copies on three streams, launches by call and graph, annotations."""
    recording = Recording(is_cpu=draw(st.booleans()))
    moments, lengths = st.integers(0, 120), st.integers(0, 30)
    calls = []
    for _ in range(draw(st.integers(0, 5))):
        start, name = draw(moments), draw(st.sampled_from(["cudaLaunchKernel", "cudaGraphLaunch"]))
        calls.append(recording.call(start, start + draw(lengths), name))
    for _ in range(draw(st.integers(0, 8))):
        start, what = draw(moments), draw(st.sampled_from(["kernel", "comm", "copy"]))
        launch = draw(st.sampled_from([None, *calls]))
        end = start + draw(lengths)
        if what == "kernel":
            lane = draw(st.sampled_from([STREAM, OTHER_STREAM]))
            leaf = draw(st.sampled_from(["compute", "memory", "latency"]))
            recording.kernel("k", start, end, lane=lane, leaf=leaf, launch=launch, layer=start % 3)
        elif what == "comm":
            lane = draw(st.sampled_from([STREAM, COMM_STREAM]))
            recording.comm("allreduce", start, end, launch=launch, lane=lane)
        else:
            recording.copy("Memcpy", start, end, launch=launch)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(moments)
        name = draw(st.sampled_from(["tpinfer.host schedule", "tpinfer.host sample", "mine"]))
        recording.range(name, start, start + draw(lengths))
    return recording


@st.composite
def swept(draw: st.DrawFn) -> tuple[Recording, Ready, tuple[int, int]]:
    """A recording, moments at which its collectives were complete, and a window."""
    recording = draw(recordings())
    _, work = recording.build()
    length = work.end_ns - work.start_ns
    shares = [draw(st.integers(0, 10)) for _ in range(len(work))]
    known = [draw(st.booleans()) for _ in range(len(work))]
    ready = Ready(work.start_ns + length * np.array(shares, np.int64) // 10, np.array(known, bool))
    start = draw(st.integers(-20, 100))
    return recording, ready, (start, start + draw(st.integers(0, 100)))


def leaf_of_moment(trace: Trace, work: Work, ready: Ready, moment: int) -> str | None:
    """The busy leaf of one ns by the rules, read one by one; None where nothing runs."""
    alone: dict[int, int] = {}
    for i in range(len(work)):
        if work.start_ns[i] <= moment < work.end_ns[i]:
            alone.setdefault(int(work.lane[i]), i)
    running = list(alone.values())
    for kinds in ((WorkKind.COMPUTE,), (WorkKind.COMM, WorkKind.FUSED_COMM), (WorkKind.COPY,)):
        mine = [i for i in running if work.kind[i] in kinds]
        if not mine:
            continue
        first = min(mine, key=lambda i: (work.start_ns[i], i))
        if work.kind[first] == WorkKind.COMM and ready.known[first]:
            return "comm_wait" if moment < ready.at_ns[first] else "comm_transfer"
        return (
            {0: "compute", 1: "memory"}.get(int(work.leaf[first]))
            or ("copy" if kinds == (WorkKind.COPY,) else None)
            or ("latency" if kinds == (WorkKind.COMPUTE,) else "comm_unsplit")
        )
    return None


@given(swept())
@settings(max_examples=200, deadline=None)
def test_random_recordings_sum_and_own_each_moment_rightly(case):
    recording, ready, (start, end) = case
    trace, work = recording.build()
    timeline = sweep(trace, work, ready, whole(work), (start, end), FLOORS)
    split = timeline.split(start, end)
    assert sum(split.leaves.values()) == end - start == split.wall_ns
    assert sum(split.rollup.values()) == end - start
    assert sum(split.host_parts.values()) == split.leaves.get("host", 0)
    expected: dict[str, int] = {}
    for moment in range(start, end):
        leaf = leaf_of_moment(trace, work, ready, moment) or "idle"
        expected[leaf] = expected.get(leaf, 0) + 1
    found = dict(split.leaves)
    idle = ("host", "launch_latency", "dependency_wait", "host_tail", "idle_unexplained")
    gaps = sum(found.pop(leaf, 0) for leaf in (*idle, "graph_gap"))
    assert gaps == expected.pop("idle", 0)
    assert found == expected


@given(swept(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_rows_does_not_matter(case, random):
    recording, _, (start, end) = case
    split = split_of(recording, start, end)
    shuffled = replace(recording, rows=list(recording.rows))
    random.shuffle(shuffled.rows)
    twice = split_of(shuffled, start, end)
    assert twice.wall_ns == split.wall_ns
    assert busy_total(twice) == busy_total(split)
    if len({row.start_ns for row in recording.rows}) == len(recording.rows):
        assert twice == split


def busy_total(split: Split) -> int:
    """ns in which something ran; equal rows may swap owners of equal rank, never the total."""
    idle = ("host", "launch_latency", "dependency_wait", "host_tail", "idle_unexplained")
    return split.wall_ns - sum(split.leaves.get(leaf, 0) for leaf in (*idle, "graph_gap"))


@given(swept(), st.integers(-(10**18), 10**18))
@settings(max_examples=60, deadline=None)
def test_moving_all_times_changes_nothing(case, shift):
    recording, ready, (start, end) = case
    trace, work = recording.build()
    here = sweep(trace, work, ready, whole(work), (start, end), FLOORS).split(start, end)
    moved_trace = replace(trace, start_ns=trace.start_ns + shift, end_ns=trace.end_ns + shift)
    moved_work = replace(work, start_ns=work.start_ns + shift, end_ns=work.end_ns + shift)
    moved = sweep(
        moved_trace,
        moved_work,
        Ready(ready.at_ns + shift, ready.known),
        whole(work, shift - 1_000, shift + 10_000),
        (start + shift, end + shift),
        FLOORS,
    )
    assert moved.split(start + shift, end + shift) == here


@given(swept(), st.lists(st.integers(-20, 200), max_size=4))
@settings(max_examples=60, deadline=None)
def test_windows_that_tile_a_span_give_its_busy_leaves(case, cuts):
    recording, ready, (start, end) = case
    trace, work = recording.build()
    timeline = sweep(trace, work, ready, whole(work), (start, end), FLOORS)
    bounds = sorted({start, end, *(min(max(point, start), end) for point in cuts)})
    if len(bounds) < 2:
        return
    windows = [timeline.split(a, b) for a, b in pairwise(bounds)]
    total = add_splits(windows)
    assert total.wall_ns == end - start
    assert sum(total.leaves.values()) == end - start
    assert busy_total(total) == busy_total(timeline.split(start, end))
