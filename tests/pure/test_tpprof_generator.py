"""The generator of synthetic traces against arithmetic done by hand, and its files against plain
readers of their formats.
"""

import gzip
import json
import re
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces.catalogue import DAMAGED, FAR_CLOCKS, SCENARIOS
from tests.traces.kernels import COMPUTE_STREAM, DeviceWork, class_of, products, roofs_ns
from tests.traces.kineto import SECRET, KinetoStyle, write_kineto
from tests.traces.names import ENGINES
from tests.traces.nsight import NsightStyle, write_nsight, write_nsight_per_rank
from tests.traces.program import Action, Busy, Launch, Pop, Push, Synchronize
from tests.traces.scenario import Clock, Damage, Delay, Scenario
from tests.traces.simulate import Run, simulate
from tests.traces.truth import SplitTruth, Truth, truth_of

ALL = {**SCENARIOS, **DAMAGED}


def by_hand(busy_ns: int, kernel_ns: int) -> list[Action]:
    """A step of one kernel and one all-reduce of 10 us."""
    kernel = DeviceWork("out", kernel_ns, "memory")
    reduce = DeviceWork("all_reduce", 10_000, "comm_transfer", collective="allreduce", num_bytes=64)
    return [
        Push("step", "0 decode 1"),
        Busy(busy_ns),
        Launch((kernel,), 3000, 2500),
        Launch((reduce,), 3000, 3000),
        Synchronize(COMPUTE_STREAM),
        Pop(),
    ]


def test_two_ranks_by_hand() -> None:
    """Rank 0: host 10, launch 2.5, kernel 20 until 32.5. Rank 1: host 15, launch 2.5, kernel 30
    until 47.5. So rank 0 waits 15, both transfer 10 until 57.5, and wake up 1.5 later.
    """
    run = simulate(Scenario("by hand"), [by_hand(10_000, 20_000), by_hand(15_000, 30_000)])
    truth = truth_of(run)
    ends = {"comm_transfer": 10_000, "launch_latency": 2500, "host_tail": 1500}
    first = {"host": 10_000, "memory": 20_000, "comm_wait": 15_000, **ends}
    second = {"host": 15_000, "memory": 30_000, **ends}
    assert truth.split(0, *truth.whole(0)) == SplitTruth(59_000, first, 0, {"python": 10_000})
    assert truth.split(1, *truth.whole(1)) == SplitTruth(59_000, second, 0, {"python": 15_000})
    [met] = truth.collectives()
    assert (met.wait_ns, met.transfer_ns) == ([15_000, 0], [10_000, 10_000])
    assert (met.last_rank, met.margin_ns) == (1, 15_000)


def test_clocks_shift_and_stretch_what_is_recorded() -> None:
    scenario = Scenario("by hand", clocks=(Clock(), Clock(-2_000_000_000, 100)))
    truth = truth_of(simulate(scenario, [by_hand(10_000, 20_000), by_hand(15_000, 30_000)]))
    assert truth.whole(0) == (5_000_000, 5_059_000)
    assert truth.whole(1) == (5_000_500 - 2_000_000_000, 5_059_505 - 2_000_000_000)
    assert truth.split(1, *truth.whole(1)).leaves["memory"] in (30_003, 30_004)
    assert truth.on_clock(1, 10_000_000) == (10_001_000 - 2_000_000_000,)


def windows(truth: Truth, rank: int) -> list[tuple[int, int]]:
    accepted, _, first = truth.ttft()
    requests = [truth.on_clock(rank, a, b) for a, b in [(accepted, first), *truth.itl()]]
    return [truth.whole(rank), *truth.steps(rank), *[(a, b) for a, b in requests]]


@pytest.mark.parametrize("name", ALL)
def test_leaves_of_every_window_sum_to_its_wall(name: str) -> None:
    truth = truth_of(simulate(ALL[name]))
    for rank in range(ALL[name].num_ranks):
        for start, end in windows(truth, rank):
            split = truth.split(rank, start, end)
            assert sum(split.leaves.values()) == split.wall_ns == end - start
            assert sum(split.host_parts.values()) == split.leaves.get("host", 0)


def test_queue_takes_what_lies_before_admission() -> None:
    truth = truth_of(simulate(SCENARIOS["steady"]))
    accepted, admitted, first = truth.ttft()
    split = truth.split(0, accepted, first, queued_until=admitted)
    assert split.leaves["queue"] == admitted - accepted > 50_000
    assert sum(split.leaves.values()) == first - accepted


def whole(scenario: Scenario, rank: int) -> SplitTruth:
    truth = truth_of(simulate(scenario))
    return truth.split(rank, *truth.whole(rank))


@settings(max_examples=10)
@given(st.integers(2, 5), st.integers(0, 3), st.integers(1000, 900_000), st.integers(0, 99))
def test_a_late_kernel_makes_exactly_the_others_wait(
    ranks: int, late: int, delay_ns: int, seed: int
) -> None:
    late %= ranks
    quiet = Scenario("quiet", num_ranks=ranks, num_layers=1, seed=seed)
    truth = truth_of(simulate(quiet))
    delayed = truth_of(simulate(replace(quiet, delays=(Delay(late, delay_ns, "kernel", 1, 0),))))
    before = next(c for c in truth.collectives() if c.step == 1)
    after = next(c for c in delayed.collectives() if c.step == 1)
    slack = before.wait_ns[late]
    more = max(0, delay_ns - slack)
    assert after.transfer_ns == before.transfer_ns
    for rank in range(ranks):
        expected = max(0, slack - delay_ns) if rank == late else before.wait_ns[rank] + more
        assert after.wait_ns[rank] == expected
    if delay_ns > slack:
        assert after.last_rank == late


def test_each_scenario_shows_what_it_is_for() -> None:
    late = SCENARIOS["kernel late"]
    assert all(c.last_rank == 2 for c in truth_of(simulate(late)).collectives()[:1])
    assert whole(SCENARIOS["hidden"], 0).comm_hidden_ns > 100_000
    assert whole(SCENARIOS["graph"], 0).leaves["graph_gap"] > 30_000
    assert whole(SCENARIOS["device late"], 0).leaves["idle_unexplained"] > 100_000
    assert whole(SCENARIOS["event late"], 0).leaves["dependency_wait"] > 500_000
    assert whole(SCENARIOS["fused reduce"], 1).leaves["fused_comm"] > 50_000
    assert whole(SCENARIOS["host bound"], 0).leaves["host"] > 1_500_000
    steady = whole(SCENARIOS["steady"], 0).leaves
    assert {"compute", "memory", "latency", "unmodelled", "comm_wait", "host_tail"} <= set(steady)
    for scenario in DAMAGED.values():
        [damage] = scenario.damages
        truth = truth_of(simulate(scenario))
        for step, times in enumerate(truth.steps(damage.rank)):
            lost = truth.split(damage.rank, *times).leaves.get("unrecorded", 0)
            assert (lost > 0) == (step == damage.step)


def test_dependent_launch_starts_before_the_predecessor_ends() -> None:
    run = simulate(SCENARIOS["dependent launch"])
    rows = [row for row in run.ranks[0].rows if row.step == 0]
    early = [b for a, b in pairwise(rows) if b.start_ns < a.end_ns]
    assert len(early) > 15
    assert all(row.arrival_ns - row.start_ns == 1800 for row in early)


def test_classes_follow_from_the_ceilings() -> None:
    assert class_of((2048, 8192, 5120), 420_000, 264) == "compute"
    assert class_of((8, 8192, 5120), 60_000, 264) == "memory"
    assert class_of((8, 256, 64), 2000, 16) == "latency"
    assert class_of((8, 8192, 768), 35_000, 12) == "latency"
    with pytest.raises(ValueError, match="border"):
        class_of((350, 8192, 8192), 200_000, 264)
    # 2 * 2048 * 8192 * 5120 FLOPs at 500 TFLOP/s; 2 B * (2048*8192 + 8192*5120 + 2048*5120).
    assert roofs_ns((2048, 8192, 5120)) == pytest.approx((343_597.4, 69_206.0), rel=1e-5)
    for ranks in range(1, 9):
        assert len(products(ranks)) == 8


def test_a_run_is_the_same_every_time() -> None:
    first, second = (simulate(SCENARIOS["hidden and late"]) for _ in range(2))
    assert [[(r.start_ns, r.end_ns) for r in rank.rows] for rank in first.ranks] == [
        [(r.start_ns, r.end_ns) for r in rank.rows] for rank in second.ranks
    ]


def load(path: Path) -> dict[str, Any]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return json.loads(raw, parse_float=Decimal)


def absolute(event: dict[str, Any], base: int) -> tuple[int, int]:
    start = base + int(event["ts"] * 1000)
    return start, start + int(event["dur"] * 1000)


@pytest.mark.parametrize("engine", ENGINES)
def test_kineto_files_hold_the_run(engine: str, tmp_path: Path) -> None:
    scenario = Scenario("drift", num_ranks=3, clocks=FAR_CLOCKS, num_steps=2)
    run = simulate(scenario)
    style = KinetoStyle(engine, has_modules=True, shuffle_seed=1)
    for rank, path in zip(run.ranks, write_kineto(run, tmp_path, style), strict=True):
        found = load(path)
        events, base = found["traceEvents"], found["baseTimeNanoseconds"]
        kinds = Counter(event.get("cat") for event in events)
        assert kinds["kernel"] + kinds["gpu_memcpy"] == len(rank.rows)
        assert kinds["cuda_runtime"] == len(rank.calls)
        assert found["distributedInfo"]["rank"] == rank.rank
        assert all(re.fullmatch(r"-?\d+\.\d{3}", str(e["ts"])) for e in events if e["ph"] == "X")
        kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy")]
        recorded = sorted(absolute(event, base) for event in kernels)
        local = rank.clock.local
        origin = recorded[0][0] - local(rank.rows[0].start_ns)
        assert [(a - origin, b - origin) for a, b in recorded] == sorted(
            (local(row.start_ns), local(row.end_ns)) for row in rank.rows
        )
        by_number = {e["args"]["External id"]: e for e in events if e.get("cat") == "cpu_op"}
        calls = {e["args"]["correlation"]: e for e in events if e.get("cat") == "cuda_runtime"}
        products_seen = 0
        for event in kernels:
            call = absolute(calls[event["args"]["correlation"]], base)
            operator = by_number.get(event["args"]["External id"])
            if operator is not None and operator["name"] == "aten::mm":
                products_seen += 1
                start, end = absolute(operator, base)
                assert start < call[0] and call[1] < end
                assert len(operator["args"]["Input Dims"]) == 2
        assert products_seen == sum(row.work.product is not None for row in rank.rows)


def test_kineto_variants(tmp_path: Path) -> None:
    run = simulate(SCENARIOS["graph"])

    def nccl(style: KinetoStyle) -> list[dict[str, Any]]:
        path = write_kineto(run, tmp_path / str(hash(style)), style, ranks=[1])[0]
        return [e["args"] for e in load(path)["traceEvents"] if "ncclDev" in e["name"]]

    # Two layers of two all-reduces and one all-gather in each of six steps; the prefill is eager.
    with_number = nccl(KinetoStyle())
    assert len(with_number) == 30
    assert [a["Seq"] for a in with_number if "Seq" in a] == [900, 901, 902, 903, 904]
    plain = nccl(KinetoStyle(collective_args="plain", is_compressed=False))
    assert sum("Group size" in a for a in plain) == 5 and not any("Seq" in a for a in plain)
    assert not any("Group size" in a for a in nccl(KinetoStyle(collective_args="none")))
    nodes = nccl(KinetoStyle(has_graph_ids=True))
    assert sum("graph node id" in a for a in nodes) == 25
    assert len({a["correlation"] for a in nodes}) == 5 + 5


def test_every_file_is_poisoned(tmp_path: Path) -> None:
    """Else the tests that look for the secret in outputs would prove nothing."""
    run = simulate(SCENARIOS["steady"])
    for path in write_kineto(run, tmp_path):
        assert SECRET in json.dumps(load(path)["env"])
    with closing(sqlite3.connect(write_nsight(run, tmp_path / "all.sqlite"))) as db:
        rows = db.execute("SELECT name, value FROM TARGET_INFO_SYSTEM_ENV").fetchall()
    assert any(name == "DeviceEnvironment" and SECRET in value for name, value in rows)


def nsight_rows(path: Path, pid: int) -> list[tuple[int, int]]:
    """(start, end) of everything on one process's streams."""
    parts = " UNION ALL ".join(
        f"SELECT start, end FROM CUPTI_ACTIVITY_KIND_{table} WHERE (globalPid>>24)&0xFFFFFF = ?"
        for table in ("KERNEL", "MEMCPY")
    )
    with closing(sqlite3.connect(path)) as db:
        return sorted(db.execute(parts, (pid, pid)).fetchall())


@pytest.mark.parametrize("registered", [False, True])
def test_nsight_files_hold_the_run(registered: bool, tmp_path: Path) -> None:
    run = simulate(SCENARIOS["graph"])
    style = NsightStyle(is_registered=registered, pids=(31, 30))
    path = write_nsight(run, tmp_path / "both.sqlite", style)
    for rank, pid in zip(run.ranks, style.pids, strict=True):
        origin = nsight_rows(path, pid)[0][0] - min(row.start_ns for row in rank.rows)
        assert [(a - origin, b - origin) for a, b in nsight_rows(path, pid)] == sorted(
            (row.start_ns, row.end_ns) for row in rank.rows
        )
    with closing(sqlite3.connect(path)) as db:
        ids = db.execute(
            "SELECT correlationId, COUNT(DISTINCT globalTid) FROM CUPTI_ACTIVITY_KIND_RUNTIME "
            "GROUP BY 1"
        ).fetchall()
        assert sum(count == 2 for _, count in ids) > 50, "ids must collide across processes"
        names = db.execute(
            "SELECT COALESCE(s.value, n.text) FROM NVTX_EVENTS n LEFT JOIN StringIds s "
            "ON s.id = n.textId WHERE n.eventType = 59"
        ).fetchall()
    found = Counter(name.split()[0] for (name,) in names)
    assert found["tpinfer.step"] == 12 and found["tpinfer.token"] == 6


def test_nsight_tables_come_lazily(tmp_path: Path) -> None:
    def tables(run: Run, style: NsightStyle) -> set[str]:
        path = write_nsight(run, tmp_path / "one.sqlite", style, [0])
        with closing(sqlite3.connect(path)) as db:
            return {name for (name,) in db.execute("SELECT name FROM sqlite_master")}

    run = simulate(SCENARIOS["graph"])
    assert "CUPTI_ACTIVITY_KIND_GRAPH_TRACE" not in tables(run, NsightStyle())
    assert "CUPTI_ACTIVITY_KIND_GRAPH_TRACE" in tables(run, NsightStyle(has_graph_nodes=False))
    assert len(write_nsight_per_rank(run, tmp_path / "ranks")) == 2


@pytest.mark.parametrize("kind", ["lost", "zero", "backwards", "endless"])
def test_damage_reaches_both_kinds_of_file(kind: str, tmp_path: Path) -> None:
    run = simulate(Scenario("hurt", num_steps=2, damages=(Damage(kind, 0, 1, first=3),)))
    [path] = write_kineto(run, tmp_path, KinetoStyle(), [0])
    rows = [e for e in load(path)["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy")]
    total = len(run.ranks[0].rows)
    seen = nsight_rows(write_nsight(run, tmp_path / "one.sqlite", None, [0]), 700)
    assert len(rows) == len(seen) == total - (kind == "lost")
    assert sum(e["ts"] == 0 for e in rows) == sum(s == 0 for s, _ in seen) == (kind == "zero")
    backwards = [e for e in rows if e["dur"] < 0]
    assert len(backwards) == sum(e < s for s, e in seen) == (kind == "backwards")
    endless = [e for e in rows if e["dur"] > 10**6]
    assert len(endless) == sum(e - s > 10**9 for s, e in seen) == (kind == "endless")
