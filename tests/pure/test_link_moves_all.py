"""One topology file with two paths between its ranks: halving a link's rate, in the file or by
--set, moves the choice, the plan and the report, each as far as the link counts in it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tpprof.cli.main import main as tpprof

from tests.traces.catalogue import SCENARIOS
from tests.traces.kineto import KinetoStyle, write_kineto
from tests.traces.simulate import simulate
from tpinfer.cli.main import main as tpinfer
from tpinfer.config.measured import CollectiveFit, GroupMeasurement, Measurement
from tpinfer.config.measured_yaml import write_measured
from tpinfer.config.topology import Topology
from tpinfer.config.topology_reader import load_topology
from tpinfer.costs.collective_sizes import collective_by_size, collective_curves

TEXT = """
version: 1
name: two-paths
hosts:
  box:
    cpu: {sku: cpu-avx2, cores: 8, mem: 64GB, mem_bw: 40GB/s}
    ranks: 4
    links:
      - {kind: SHM, ids: 0..3, bw: 2GB/s, latency: 4us, per_peer: 1us, attainable: 0.5}
      - {kind: GLOO, ids: 0..3, bw: 16GB/s, latency: 800us, per_peer: 10us, attainable: 0.5}
"""
HALF = "hosts.box.links.0.bw=1GB/s"
RING = CollectiveFit(
    "all_reduce", "shared_memory", False, 5e-6, 0, 1e9, 5e-6, 0, 1e9, 512, 1 << 23, 0.05
)
GLOO = replace(RING, by="gloo", a_s=8e-4, c_s=8e-4, b1_bytes_per_s=8e9, b2_bytes_per_s=8e9)
WAYS = ("measured, by --set", "links alone, by --set", "links alone, in the file")


@pytest.fixture(params=WAYS)
def machines(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[str], list[str]]:
    """Flags that name the machine as it is, and with half the rate of shared memory."""
    whole, half = tmp_path / "two.yaml", tmp_path / "half.yaml"
    whole.write_text(TEXT)
    half.write_text(TEXT.replace("bw: 2GB/s", "bw: 1GB/s"))
    if request.param == WAYS[0]:
        groups = tuple(
            GroupMeasurement(tuple(("box", str(i)) for i in range(size)), (RING, GLOO))
            for size in (2, 4)
        )
        found = Measurement("two-paths", "2026-11-25T19:00:00Z", groups=groups)
        write_measured(found, tmp_path / "two.measured.yaml")
    before = ["--topology", str(whole)]
    if request.param == WAYS[2]:
        return before, ["--topology", str(half)]
    return before, [*before, "--set", HALF]


def loaded(flags: list[str]) -> Topology:
    return load_topology(flags[1], flags[3:])


def test_the_choice_moves(machines: tuple[list[str], list[str]]) -> None:
    starts = []
    for flags in machines:
        curves = collective_curves(loaded(flags), 2, 4096, 8 << 20)
        assert curves is not None
        found = collective_by_size(curves, curves.names())
        assert found is not None
        assert (found.small, found.large) == ("shared_memory", "gloo")
        starts.append(found.from_bytes)
    # gap = S / 1 GB/s - S / 8 GB/s, of about 0.8 ms; with half the rate S / 0.5 GB/s.
    assert starts[1] / starts[0] == pytest.approx((1 - 1 / 8) / (2 - 1 / 8), rel=0.03)


def test_the_plan_moves(
    machines: tuple[list[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    plans = []
    for flags in machines:
        call = ["plan", "--model", "qwen3-0.6b", *flags, "--tp", "2", "--precision", "fp32"]
        call += ["--input-len", "8", "--output-len", "64", "--concurrency", "16", "--json", "-"]
        assert tpinfer(call) == 0
        plans.append(json.loads(capsys.readouterr().out)["plans"][0])
    before, after = (plan["split"]["communication"] for plan in plans)
    # 16 rows of 1,024 floats are 66 us of transfer beside 5 us, 57 times a step; half the rate
    # doubles the transfer. The few steps with prompts go over gloo before and after.
    assert 1.6 < after / before < 2.0
    grown = plans[1]["tpot_s"] - plans[0]["tpot_s"]
    assert grown == pytest.approx(after - before, rel=0.02)


def test_the_report_moves(machines: tuple[list[str], list[str]], tmp_path: Path) -> None:
    write_kineto(simulate(SCENARIOS["kernel late"]), tmp_path / "traces", KinetoStyle())
    floors = []
    for flags in machines:
        out = tmp_path / "report.json"
        call = ["analyze", str(tmp_path / "traces"), *flags, "--json", str(out)]
        assert tpprof(call) == 0
        report = json.loads(out.read_text())
        ops = [op for op in report["ops"] if op["bound"] == "communication"]
        assert ops and all(op["floor_ns"] + op["lost_ns"] == op["time_ns"] for op in ops)
        floors.append(sum(op["floor_ns"] for op in ops))
    assert 1.3 < floors[1] / floors[0] < 2.01


def test_set_without_a_topology_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_kineto(simulate(SCENARIOS["kernel late"]), tmp_path / "traces", KinetoStyle())
    assert tpprof(["analyze", str(tmp_path / "traces"), "--set", HALF]) == 2
    assert f"--set {HALF} changes a topology" in capsys.readouterr().err
