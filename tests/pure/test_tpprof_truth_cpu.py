"""tpprof on captures of CPU ranks as this runtime writes them, against their truth."""

from pathlib import Path

import pytest
from tpprof.analyze import AnalysisOptions, analyze
from tpprof.readers.read import read_traces
from tpprof.results import Report, Split

from tests.traces.agreement import differences, inexact
from tests.traces.cpu_ranks import CPU_CEILINGS, CpuRun, write_capture
from tests.traces.scenario import Delay, Scenario
from tests.traces.truth import SplitTruth

CASES = {
    one.name: one
    for one in (
        Scenario("alone", num_ranks=1),
        Scenario("two ranks", num_ranks=2, num_steps=6),
        Scenario("four ranks", num_ranks=4, num_steps=3),
        Scenario("late by 50 us", num_ranks=2, delays=(Delay(1, 50_000),)),
        Scenario("late by 250 us", num_ranks=3, delays=(Delay(0, 250_000),), seed=2),
        Scenario("two share a KV head", num_ranks=4, num_steps=3, delays=(Delay(1, 40_000),)),
        Scenario("four share a KV head", num_ranks=8, num_steps=2, delays=(Delay(4, 90_000),)),
        Scenario("late by 1 ms", num_ranks=2, delays=(Delay(1, 1_000_000, step=2),)),
    )
}
KV_HEADS = {"two share a KV head": 2, "four share a KV head": 2}


def ran(name: str) -> CpuRun:
    return CpuRun(CASES[name], KV_HEADS.get(name, 4))


def analysed(run: CpuRun, directory: Path, window: str = "all", by: str = "") -> Report:
    """With the manifests beside the traces and nothing else."""
    write_capture(run, directory)
    ranks = range(run.scenario.num_ranks)
    manifests = {rank: directory / f"rank{rank}.manifest.json" for rank in ranks}
    options = AnalysisOptions(window=window, by=by, manifests=manifests)
    return analyze(read_traces([directory]), options)


def wrong(split: Split, true: SplitTruth) -> list[str]:
    """Which of `host` and `host_tail` the end of a window is, is not this test's matter."""
    found = dict(split.leaves)
    found["host"] = found.get("host", 0) + found.pop("host_tail", 0)
    texts = [f"{leaf}: {pair}" for leaf, pair in differences(found, true.leaves).items()]
    if split.wall_ns != true.wall_ns:
        texts.append(f"wall {split.wall_ns}, true {true.wall_ns}")
    return texts + inexact(split)


@pytest.mark.parametrize("name", CASES)
def test_whole_run_and_every_step(name: str, tmp_path: Path) -> None:
    run = ran(name)
    for split in analysed(run, tmp_path).ranks:
        assert wrong(split, run.split(split.rank, *run.whole(split.rank))) == []
    windows = analysed(run, tmp_path, "steps").windows
    assert len(windows) == run.scenario.num_steps
    for index, window in enumerate(windows):
        for split in window.ranks:
            assert wrong(split, run.split(split.rank, *run.ranks[split.rank].steps[index])) == []


@pytest.mark.parametrize("name", [name for name, one in CASES.items() if one.num_ranks > 1])
def test_waits_and_who_was_late(name: str, tmp_path: Path) -> None:
    run = ran(name)
    sizes = {len(one.ranks) for one in run.collectives}
    assert len(sizes) == 1 + (name in KV_HEADS)
    report = analysed(run, tmp_path)
    # A rank goes through its collectives in one order; groups beside each other do not.
    found = sorted(report.collectives, key=lambda one: (one.ranks, one.start_ns))
    assert len(found) == len(run.collectives)
    for result, true in zip(found, sorted(run.collectives, key=lambda one: one.ranks), strict=True):
        assert result.ranks == true.ranks and result.method == "matched"
        for words in ("wait_ns", "transfer_ns"):
            pairs = zip(getattr(result, words), getattr(true, words), strict=True)
            assert all(abs(a - b) <= 10 for a, b in pairs), (true.op, words)
        if true.margin_ns > 2000:
            assert result.last_rank == true.last_rank
    assert all(one.accepted for one in report.clock_alignment.values())


def test_request_windows(tmp_path: Path) -> None:
    run = CpuRun(CASES["two ranks"])
    accepted, admitted = (run.moment(f"tpinfer.{word} request=0") for word in ("accept", "admit"))
    tokens = [run.moment(f"tpinfer.token request=0 index={step}") for step in range(6)]
    [window] = analysed(run, tmp_path, "ttft").windows
    for split in window.ranks:
        assert wrong(split, run.split(split.rank, accepted, tokens[0], admitted)) == []
    assert window.ranks[0].leaves["queue"] >= 90_000
    windows = analysed(run, tmp_path, "itl").windows
    for index, window in enumerate(windows):
        for split in window.ranks:
            assert wrong(split, run.split(split.rank, *tokens[index : index + 2])) == []


def test_what_the_host_did(tmp_path: Path) -> None:
    run = CpuRun(CASES["two ranks"])
    for split in analysed(run, tmp_path).ranks:
        true = run.split(split.rank, *run.whole(split.rank)).host_parts
        for part in ("schedule", "plan_wait", "prepare", "detokenize"):
            assert abs(split.host_parts.get(part, 0) - true.get(part, 0)) <= 1000, part


def test_every_op_and_layer_is_known(tmp_path: Path) -> None:
    run = CpuRun(CASES["two ranks"])
    report = analysed(run, tmp_path, by="op")
    mine = {row.key: row for row in report.groups if row.rank == 0}
    busy = {
        op: sum(one.end_ns - one.start_ns for one in run.ranks[0].ops if one.op == op)
        for op in run.ranks[0].ledger.op_ids()
    }
    for op in ("layers.0.mlp.gate_up", "layers.2.attn.qkv", "head"):
        leaves = mine[op].leaves
        spent = sum(leaves.get(leaf, 0) for leaf in ("compute", "memory", "latency"))
        assert abs(spent - busy[op]) <= 1000
    assert {"layers.0.mlp.down", "layers.1.attn.reduce"} <= set(mine)
    assert report.coverage.flop_model > 0.99 and report.coverage.layer > 0.8
    assert report.coverage.explained > 0.95
    assert report.ceilings["origin"] == CPU_CEILINGS.origin
