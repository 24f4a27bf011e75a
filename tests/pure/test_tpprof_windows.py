"""Windows, integrity, groups and the report as a whole, on hand-made recordings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tpprof.analyze import AnalysisOptions, analyze, report_on
from tpprof.attribute.findings import RankFindings, prepare_works
from tpprof.attribute.grouping import GROUPINGS, UNATTRIBUTED
from tpprof.attribute.idle import LaunchFloors
from tpprof.attribute.integrity import short_launches
from tpprof.attribute.requests import find_requests, token_ready
from tpprof.classify.steps import find_steps
from tpprof.errors import TraceError
from tpprof.events import Kind
from tpprof.ranks.capture import read_capture
from tpprof.ranks.step_order import same_numbers
from tpprof.results import Report

from tests.pure.test_tpprof_sweep import recordings
from tests.pure.tpprof_builders import STREAM, THREAD, Recording
from tpinfer.costs.leaves import ROLLUP

FLOORS = LaunchFloors(kernel_ns=5, graph_ns=10)


def find(recordings: list[Recording]) -> RankFindings:
    built = [recording.build() for recording in recordings]
    return prepare_works([trace for trace, _ in built], [work for _, work in built], FLOORS)


def report_of(*recordings: Recording, **options: object) -> Report:
    return report_on(find(list(recordings)), AnalysisOptions(**options))  # type: ignore[arg-type]


def two_steps(rank: int = 0, shift: int = 0) -> Recording:
    """Two steps of 100 ns with a kernel and an all-reduce each; rank 1 starts 5 later."""
    recording = Recording(rank=rank)
    late = 5 * rank + shift
    for step in range(2):
        at = 100 * step + shift
        recording.step(step, at, at + 90, "prefill" if step == 0 else "decode")
        recording.kernel(
            "gemm", at + 10 + late - shift, at + 40 + late - shift, step=step, layer=step,
            key="mlp", launch=recording.call(at + 2, at + 4),
        )  # fmt: skip
        recording.comm("allreduce", at + 45, at + 80, step=step, bytes=100, size=2, group="tp")
    return recording


def test_all_runs_from_the_first_step_to_the_end_of_the_last():
    recording = two_steps()
    recording.range("warm up", -500, -400)
    recording.kernel("late", 400, 450)
    [window] = report_of(recording).windows
    assert (window.label, window.start_ns, window.end_ns) == ("all", 0, 190)


def test_without_steps_all_is_what_host_rows_span():
    recording = Recording()
    recording.range("mine", 100, 300)
    recording.add(Kind.OP, "aten::mm", 90, 95, THREAD)
    recording.kernel("gemm", 0, 500)
    report = report_of(recording)
    assert (report.windows[0].start_ns, report.windows[0].end_ns) == (90, 300)
    assert report.leaves == {"compute": 210}


def test_without_host_rows_device_rows_must_do_and_that_is_said():
    recording = Recording()
    recording.kernel("gemm", 10, 50)
    report = report_of(recording)
    assert report.wall_ns == 40
    assert any("recorded no host rows" in text for text in report.warnings)


def test_each_step_is_a_window_on_each_rank():
    report = report_of(two_steps(), two_steps(1), window="steps")
    assert [window.label for window in report.windows] == ["step 0 prefill", "step 1 decode"]
    assert [[split.wall_ns for split in window.ranks] for window in report.windows] == [
        [90, 90]
    ] * 2
    assert report.wall_ns == 180
    assert sum(report.leaves.values()) == 180


def test_a_step_that_one_rank_lacks_is_told():
    other = two_steps(1)
    other.step(2, 200, 290)
    report = report_of(two_steps(), other, window="steps")
    assert [len(window.ranks) for window in report.windows] == [2, 2, 1]
    assert any("1 of 3 steps" in text for text in report.warnings)
    assert any("different numbers of steps" in text for text in report.warnings)
    assert [split.wall_ns for split in report.ranks] == [180, 270]


def serving() -> Recording:
    """Two requests; the second waits for a row."""
    recording = two_steps()
    for name, at in (
        ("tpinfer.accept request=0", 1),
        ("tpinfer.admit request=0", 6),
        ("tpinfer.accept request=b", 2),
        ("tpinfer.admit request=b", 101),
        ("tpinfer.token request=0 index=0", 88),
        ("tpinfer.token request=0 index=1", 185),
        ("tpinfer.token request=b index=0", 186),
        ("tpinfer.token request=b index=1", 189),
        ("tpinfer.token request=b index=2", 190),
    ):
        recording.range(name, at, at)
    return recording


def test_requests_are_read_from_their_marks():
    trace, _ = serving().build()
    first, second = find_requests(trace)
    assert (first.request, first.accepted_ns, first.admitted_ns) == ("0", 1, 6)
    assert first.tokens_ns == (88, 185)
    assert second.tokens_ns == (186, 189, 190)


def test_time_to_first_token_begins_with_the_queue():
    report = report_of(serving(), window="ttft")
    assert [window.label for window in report.windows] == ["ttft request 0", "ttft request b"]
    first, second = (window.ranks[0] for window in report.windows)
    assert (first.wall_ns, first.rollup["queue"]) == (87, 5)
    assert (second.wall_ns, second.rollup["queue"]) == (184, 99)
    assert report.rollup["queue"] == 104


def test_between_tokens_each_pair_is_a_window():
    report = report_of(serving(), window="itl")
    assert [(w.label, w.start_ns, w.end_ns) for w in report.windows] == [
        ("itl request 0 token 1", 88, 185),
        ("itl request b token 1", 186, 189),
        ("itl request b token 2", 189, 190),
    ]
    assert report.wall_ns == 101


def test_a_request_accepted_before_recording_has_no_first_token_window():
    recording = two_steps()
    recording.range("tpinfer.token request=7 index=4", 88, 88)
    recording.range("tpinfer.token request=7 index=5", 185, 185)
    report = report_of(recording, window="ttft")
    assert [window.label for window in report.windows] == ["ttft step 0 prefill"]
    [window] = report_of(recording, window="itl").windows
    assert window.label == "itl request 7 token 5"


def test_windows_of_requests_leave_out_ranks_without_a_clock():
    report = report_of(serving(), two_steps(1, 7_000), window="ttft")
    assert [len(window.ranks) for window in report.windows] == [1, 1]
    assert any("leave out rank 1" in text for text in report.warnings)
    assert report.ranks[1].wall_ns == 0


def engine_steps(name: str) -> Recording:
    """Decode steps of an engine that launches ahead: tokens are copied and waited for later."""
    recording = Recording()
    for i in range(3):
        at = 1_000 * i
        recording.range(name, at, at + 300)
        recording.kernel(
            "gemm", at + 400, at + 800, step=i, launch=recording.call(at + 10, at + 20)
        )
        copy = recording.call(at + 25, at + 30, "cudaMemcpyAsync")
        recording.copy("Memcpy DtoH (Device -> Pinned)", at + 810, at + 815, step=i, launch=copy)
        recording.call(at + 500, at + 830, "cudaEventSynchronize")
    return recording


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("execute_context_0(0)_generation_4(4)", "decode"),
        ("execute_4_context_0(sq0sk0sqsq0sqsk0)_generation_4(sq4sk90sqsq4sqsk90)", "decode"),
        ("step[DECODE bs=4]", "decode"),
    ],
)
def test_other_engines_give_token_to_token_windows_by_their_steps(name, phase):
    recording = engine_steps(name)
    report = report_of(recording, window="itl")
    assert [window.label for window in report.windows] == [
        f"itl step {i} {phase}" for i in range(3)
    ]
    assert [(w.start_ns, w.end_ns) for w in report.windows] == [
        (0, 830), (830, 1830), (1830, 2830),
    ]  # fmt: skip
    assert report.wall_ns == 2830
    none = report_of(recording, window="ttft")
    assert none.windows == []
    assert none.wall_ns == 0 == sum(none.leaves.values())
    assert any("kind ttft; record a tpinfer run from its first" in text for text in none.warnings)


def test_tokens_are_ready_where_the_host_saw_them():
    trace, work = engine_steps("step[DECODE bs=4]").build()
    steps = find_steps(trace)
    assert token_ready(trace, work, steps) == [830, 1830, 2830]
    without = Recording()
    without.range("ProfilerStep#7", 0, 100)
    without.range("ProfilerStep#8", 100, 200)
    trace, work = without.build()
    assert [step.number for step in find_steps(trace)] == [7, 8]
    assert token_ready(trace, work, find_steps(trace)) == [100, 200]


def replays(counts: list[int], nodes: bool, other: int = 0) -> Recording:
    """One graph launch a step with so many kernels; `other` more, of other names, in step 0."""
    recording = Recording()
    for step, count in enumerate(counts):
        at = 1_000 * step + 1
        recording.step(step, at, at + 900)
        launch = recording.call(at + 10, at + 30, "cudaGraphLaunch")
        for i in range(count):
            start = at + 50 + 50 * i
            node = 7 + i if nodes else -1
            recording.kernel(f"k{i}", start, start + 40, step=step, launch=launch, node=node)
        for i in range(other if step == 0 else 0):
            start = at + 500 + 50 * i
            recording.kernel(f"o{i}", start, start + 40, step=step, launch=launch)
    return recording


@pytest.mark.parametrize("nodes", [True, False])
def test_a_replay_that_lost_kernels_is_unrecorded_not_idle(nodes):
    report = report_of(replays([8, 8, 5, 8], nodes), window="steps")
    for index, window in enumerate(report.windows):
        leaves = window.ranks[0].leaves
        if index == 2:
            assert leaves == {"compute": 200, "unrecorded": 700}
        else:
            assert "unrecorded" not in leaves
    assert any("1 graph launches have fewer kernels" in text for text in report.warnings)


def test_a_replay_without_any_kernel_is_unrecorded():
    report = report_of(replays([8, 0, 8], nodes=True), window="steps")
    assert report.windows[1].ranks[0].leaves == {"unrecorded": 900}


def test_another_graph_is_not_taken_for_a_damaged_one():
    recording = replays([8, 8, 8], nodes=False)
    at = 3_001
    recording.step(3, at, at + 900)
    launch = recording.call(at + 10, at + 30, "cudaGraphLaunch")
    recording.kernel("other", at + 50, at + 90, step=3, launch=launch)
    trace, _ = recording.build()
    assert len(short_launches(trace, find_steps(trace))) == 0


def test_a_kernel_longer_than_its_step_is_no_kernel():
    recording = replays([4, 4, 4], nodes=False)
    recording.kernel("endless", 1_300, 9_000_000, step=1, launch=recording.call(1_100, 1_110))
    recording.kernel("next", 2_500, 2_540, step=2, launch=recording.call(2_100, 2_110))
    report = report_of(recording, window="steps")
    assert report.windows[1].ranks[0].leaves == {"compute": 160, "unrecorded": 740}
    assert "unrecorded" not in report.windows[2].ranks[0].leaves
    assert any("impossible times" in text for text in report.warnings)


def test_a_long_kernel_of_an_engine_that_runs_ahead_is_believed():
    recording = Recording()
    for step in range(3):
        recording.step(step, 100 * step, 100 * step + 50)
        launch = recording.call(100 * step, 100 * step + 7)
        recording.kernel("long", 500 + 400 * step, 899 + 400 * step, step=step, launch=launch)
    recording.range("until stopped", 300, 2_000)
    assert not any("impossible" in text for text in report_of(recording).warnings)


def test_a_launch_whose_kernel_the_recorder_lost_spoils_its_step():
    recording = two_steps()
    recording.call(120, 122)
    assert "unrecorded" not in report_of(recording).leaves
    report = report_of(replace(recording, num_lost=1), window="steps")
    assert [("unrecorded" in w.ranks[0].leaves) for w in report.windows] == [False, True]


def test_rows_lost_nobody_knows_where_are_told():
    report = report_of(replace(two_steps(), num_lost=3))
    assert any("lost or damaged 3 rows" in text for text in report.warnings)
    assert "unrecorded" not in report.leaves


def test_a_group_has_what_ran_and_what_it_waited_for():
    report = report_of(two_steps(), by="layer")
    layers = {row.key: row for row in report.groups}
    assert layers["layers.0"].leaves == {
        "compute": 30,
        "host": 2,
        "launch_latency": 7,
        "idle_unexplained": 1,
    }
    assert layers["layers.1"].leaves["compute"] == 30
    assert layers["layers.1"].num_events == 1
    assert report.groups[-1].key == UNATTRIBUTED
    assert sum(row.wall_ns for row in report.groups) == report.wall_ns


@pytest.mark.parametrize(
    ("by", "keys"),
    [
        ("rank", ["rank 0"]),
        ("step", ["step 0 prefill", "step 1 decode"]),
        ("phase", ["decode", "prefill"]),
        ("op", ["mlp"]),
        ("kernel", ["gemm", "ncclDevKernel_allreduce"]),
        ("stream", ["device 0 stream 20", "device 0 stream 7"]),
    ],
)
def test_keys_of_groups(by, keys):
    groups = report_of(two_steps(), by=by).groups
    assert sorted({row.key for row in groups} - {UNATTRIBUTED}) == keys


@given(st.lists(recordings(), min_size=1, max_size=3), st.sampled_from(GROUPINGS))
@settings(max_examples=60, deadline=None)
def test_random_reports_sum_everywhere(recorded, by):
    ranks = [replace(recording, rank=rank) for rank, recording in enumerate(recorded)]
    for window in ("all", "steps", "ttft", "itl"):
        report = report_of(*ranks, window=window, by=by)
        assert report.residual_ns == 0
        for split in report.ranks:
            assert sum(split.leaves.values()) == split.wall_ns
            assert sum(split.rollup.values()) == split.wall_ns
            assert set(split.rollup) == set(ROLLUP)
            mine = [row for row in report.groups if row.rank == split.rank]
            assert sum(row.wall_ns for row in mine) == split.wall_ns
            total: dict[str, int] = {}
            for row in mine:
                for leaf, spent in row.leaves.items():
                    total[leaf] = total.get(leaf, 0) + spent
            assert total == split.leaves
        for op in report.ops:
            assert op.floor_ns + op.lost_ns == op.time_ns


def test_one_rank_alone_is_an_estimate_and_says_so():
    recording = Recording(world_size=2)
    recording.step(0, 0, 100)
    recording.comm("allreduce", 0, 80, floor=20, bytes=40, size=2)
    report = report_of(recording)
    assert report.leaves == {"comm_transfer": 20, "comm_wait": 60, "host_tail": 20}
    [found] = report.collectives
    assert (found.method, found.wait_ns, found.transfer_ns) == ("estimated", [60], [20])
    assert found.busbw_gbps == 2.0
    assert found.last_rank == -1
    assert any("estimated from a ceiling" in text for text in report.warnings)
    assert report.coverage.matched_ranks == 0


def pair(late_ns: int, count: int = 10) -> list[Recording]:
    """Two ranks, the second of which comes later to each all-reduce."""
    both = [Recording(rank=0), Recording(rank=1)]
    for i in range(count):
        at = i * 10_000
        for rank, recording in enumerate(both):
            recording.step(i, at, at + 9_000)
            recording.kernel("gemm", at + 100, at + 1_000 + rank * late_ns, step=i, key="mlp.up")
            recording.comm(
                "allreduce", at + 1_000 + rank * late_ns, at + 6_000,
                step=i, group="tp", size=2, bytes=4_000, sequence=i,
            )  # fmt: skip
    return both


def test_two_ranks_give_waits_bandwidth_and_a_name():
    report = report_of(*pair(2_000))
    assert report.ranks[0].leaves["comm_wait"] == 20_000
    assert report.ranks[1].leaves.get("comm_wait", 0) == 0
    assert len(report.collectives) == 10
    first = report.collectives[0]
    assert (first.wait_ns, first.transfer_ns) == ([2_000, 0], [3_000, 3_000])
    assert (first.last_rank, first.last_rank_was, first.method) == (1, "mlp.up", "matched")
    assert first.busbw_gbps == pytest.approx(4_000 / 3_000)
    assert report.clock_alignment["1"].accepted
    assert report.coverage.matched_ranks == report.coverage.comm_bytes == 1
    assert report.coverage.explained < 1


def test_an_absent_rank_leaves_communication_undivided():
    both = [replace(one, groups={"tp": (0, 1, 2)}, world_size=3) for one in pair(2_000)]
    report = report_of(*both)
    assert report.collectives == []
    assert report.ranks[0].leaves["comm_unsplit"] == 50_000
    assert any("ranks whose traces were not given" in text for text in report.warnings)


def test_dilation_comes_from_the_run_beside_the_traces(tmp_path: Path):
    (tmp_path / "run.json").write_text(json.dumps({"format_version": 1, "dilation": 1.2}))
    recording = replace(two_steps(), source=str(tmp_path / "rank0.trace.json"))
    report = report_of(recording)
    assert report.dilation == 1.2
    assert any("nothing is claimed about gaps" in text for text in report.warnings)
    assert report_of(recording, dilation=1.01).dilation == 1.01
    (tmp_path / "run.json").write_text('{"dilation": "much"')
    assert report_of(recording).dilation is None


def test_ranks_of_one_host_share_its_clock_where_the_host_is_the_device(tmp_path: Path):
    (tmp_path / "clock-here.json").write_text(json.dumps({"host": "here", "ranks": [0, 1]}))
    assert read_capture([str(tmp_path / "rank0.trace.json")]).shared_clocks == (frozenset({0, 1}),)
    both = [replace(one, source=str(tmp_path / f"rank{one.rank}")) for one in pair(2_000, 3)]
    assert not report_of(*both).clock_alignment["1"].accepted
    on_cpu = [replace(one, is_cpu=True) for one in both]
    report = report_of(*on_cpu)
    assert report.clock_alignment["1"].accepted
    assert "share" in report.clock_alignment["1"].reason
    assert report.ranks[0].leaves["comm_wait"] == 6_000


def unnumbered(first: int, count: int, phases: str, offset: int = 0) -> Recording:
    """Steps [first, first + count) of one run, by an engine that numbers none."""
    recording = Recording(rank=1 if first else 0)
    for i in range(first, first + count):
        at = 10_000 * i + offset
        name = "step[EXTEND bs=1 toks=9]" if phases[i] == "p" else "step[DECODE bs=4]"
        recording.range(name, at, at + 9_000)
        recording.comm(
            "allreduce", at + 1_000, at + 5_000 + 100 * i, lane=STREAM, step=i - first, group="tp",
            launch=recording.call(at, at + 5),
        )  # fmt: skip
    return recording


@pytest.mark.parametrize(
    ("phases", "offset", "expected"),
    [("pdddpddddddd", 10**9, 3), ("dddddddddddd", 0, 3), ("dddddddddddd", 10**9, None)],
)
def test_recordings_that_begin_at_other_steps_are_lined_up_or_not_matched(phases, offset, expected):
    found = find([unnumbered(0, 11, phases), unnumbered(3, 9, phases, offset)])
    if expected is None:
        assert len(found.matched) == 0
        assert any("nothing tells which" in text for text in found.warnings)
        return
    assert len(found.matched) == 8
    assert [step.number for step in found.hosts[1].steps] == list(range(expected, expected + 9))
    assert any("began to record 3 steps later" in text for text in found.warnings)
    assert (
        report_on(found, AnalysisOptions(window="steps", by="step")).windows[3].ranks[1].rank == 1
    )


def test_numbered_steps_keep_their_numbers():
    built = [two_steps(rank).build() for rank in range(2)]
    steps = [find_steps(trace) for trace, _ in built]
    same, works, matching, told = same_numbers([0, 1], steps, [work for _, work in built])
    assert (same, told) == (steps, [])
    assert works[1] is matching[1] is built[1][1]


def test_empty_traces_and_bad_questions():
    empty = report_of(Recording(), Recording(rank=1))
    assert empty.wall_ns == 0
    assert len(empty.ranks) == 2
    assert sum("holds no events" in text for text in empty.warnings) == 2
    mixed = report_of(two_steps(), Recording(rank=1), window="steps", by="op")
    assert [split.wall_ns for split in mixed.ranks] == [180, 0]
    with pytest.raises(TraceError, match="no traces"):
        analyze([])
    trace, _ = two_steps().build()
    with pytest.raises(TraceError, match="rank 0 is in"):
        analyze([trace, trace])
    with pytest.raises(TraceError, match="window 'minutes' does not exist"):
        analyze([trace], AnalysisOptions(window="minutes"))
    with pytest.raises(TraceError, match="grouping by 'colour'"):
        analyze([trace], AnalysisOptions(by="colour"))


def test_hand_made_traces_pass_the_real_classifier():
    trace, _ = two_steps().build()
    report = analyze([trace], AnalysisOptions(by="kernel"))
    assert report.wall_ns == 190
    assert sum(report.leaves.values()) == 190
    assert report.leaves["unmodelled"] == 60


def test_kernels_that_start_before_their_launch_are_counted():
    recording = two_steps()
    recording.kernel("early", 50, 55, launch=recording.call(60, 62), step=0)
    assert any("1 kernels start before the call" in text for text in report_of(recording).warnings)


def test_long_recordings_sum_exactly_far_from_zero():
    base = 1_700_000_000_000_000_000
    recording = Recording()
    for i in range(50):
        at = base + i * 1_000_003
        recording.step(i, at, at + 900_001)
        recording.kernel("gemm", at + 7, at + 500_009, step=i, launch=recording.call(at, at + 3))
    report = report_of(recording)
    assert report.wall_ns == 49 * 1_000_003 + 900_001
    assert report.leaves["compute"] == 50 * 500_002
    assert np.sum(list(report.leaves.values())) == report.wall_ns
