"""Which numbers a machine's collectives and kernels come from."""

from dataclasses import replace

import pytest

from tests.pure.planner_cases import machine, two_layers
from tpinfer.config.ceilings import CeilingOverrides
from tpinfer.config.dtypes import DType
from tpinfer.config.measured import (
    CollectiveFit,
    DeviceMeasurement,
    GemmRate,
    GroupMeasurement,
    HostTime,
    Measurement,
)
from tpinfer.config.topology import Placement, Topology
from tpinfer.config.topology_reader import parse_topology
from tpinfer.costs.ops import aggregate
from tpinfer.planner.collective_times import CollectiveTimes
from tpinfer.planner.group_times import group_times
from tpinfer.planner.precision import precision_named
from tpinfer.planner.step_model import step_model
from tpinfer.planner.traits import Traits

CARDS = """
version: 1
name: box
hosts:
  h0:
    gpus: {{sku: {sku}, ids: 0..7}}
    links: [{{kind: {kind}, ids: 0..7, bw: {bw}}}]
"""


def times(topology: Topology, ranks: int = 4) -> CollectiveTimes:
    """Of the first group of so many."""
    group = topology.groups(ranks)[0]
    ceilings = topology.ceilings_of(*group[0], num_ranks=ranks)
    assert ceilings is not None
    return group_times(topology, group, ceilings)


def cards(sku: str, kind: str = "NVL", bw: str = "450GB/s") -> Topology:
    """Eight on one host."""
    return parse_topology(CARDS.format(sku=sku, kind=kind, bw=bw), "box.yaml")


def probed() -> Topology:
    """The DGX after a probe of two of its cards."""
    topology = machine()
    places = topology.groups(2)[0]
    fit = CollectiveFit(
        "all_reduce", "nccl", True, 3e-6, 1e-6, 1e11, 2e-5, 0.0, 3e11, 1024, 1 << 28, 0.05
    )
    gemms = tuple(
        GemmRate(DType.BFLOAT16, rows, 4096, 4096, rate)
        for rows, rate in ((64, 1e14), (4096, 7e14))
    )
    device = DeviceMeasurement(
        places[0][0], tuple(d for _, d in places), gemms=gemms, eager_floor_s=9e-6,
        graph_floor_s=2e-6,
    )  # fmt: skip
    measured = Measurement(
        topology.name, "2026-11-25T19:00:00Z", devices=(device,),
        groups=(GroupMeasurement(places, (fit,)),),
    )  # fmt: skip
    return replace(topology, measured=measured)


def test_known_cards_have_their_fabric_and_others_nccls_model() -> None:
    assert "H100" in times(cards("h100-sxm-80g")).origin
    assert "B200" in times(cards("b200", bw="900GB/s")).origin
    assert "NCCL's own model" in times(cards("h100-pcie-80g", bw="300GB/s")).origin
    assert len(times(cards("l40s", "PXB", "32GB/s")).curves) == 1


def test_calibrated_traits_bring_their_engines_collectives() -> None:
    spec, bf16, work = two_layers("llama-3.1-8b"), precision_named("bf16"), aggregate([1], [9], 1)
    nccl, vllm = (
        step_model(spec, machine(), Placement(tp=8), bf16, Traits(collectives_of=engine)).step(work)
        for engine in ("nccl", "vllm")
    )
    assert vllm.communication < 0.5 * nccl.communication
    assert replace(vllm, communication=0.0) == replace(nccl, communication=0.0)


def test_a_rank_alone_has_none() -> None:
    assert times(cards("h100-sxm-80g"), 1).curves == ()


def test_a_measured_group_goes_by_its_fit() -> None:
    found = times(probed(), 2)
    assert found.origin == "measured 2026-11-25, nccl"
    assert found.all_reduce_s(1) == pytest.approx(4e-6, rel=1e-3)
    assert found.all_reduce_s(1 << 30) == pytest.approx(2e-5 + (1 << 30) / 3e11)


def test_numbers_in_the_file_go_first() -> None:
    topology = cards("h100-sxm-80g")
    host = topology.hosts[0]
    own = CeilingOverrides(collective_latency_s=1e-3)
    devices = tuple(replace(device, overrides=own) for device in host.devices)
    changed = replace(topology, hosts=(replace(host, devices=devices),))
    assert times(changed).all_reduce_s(1) == pytest.approx(1e-3, rel=1e-3)


def test_a_probed_machine_says_so_and_replays_graphs() -> None:
    spec, work = two_layers("llama-3.1-8b"), aggregate([1], [100], 1)
    bf16 = precision_named("bf16")
    plain, known = (
        step_model(spec, topology, Placement(tp=2), bf16) for topology in (machine(), probed())
    )
    assert plain.traits.mode == "datasheet" and known.traits.mode == "probe"
    assert "2026-11-25" in known.traits.origin
    assert known.device.kernel_floor_s == 2e-6
    assert known.device.by_thinness[-1] == (4096, 1.0) and known.device.by_thinness[0][1] < 1
    assert known.step(work).small_kernels < plain.step(work).small_kernels


def test_host_times_of_a_probe_are_hidden_behind_steps_that_run_meanwhile() -> None:
    topology, spec = probed(), two_layers("llama-3.1-8b")
    assert topology.measured is not None
    (device,) = topology.measured.devices
    known = replace(device, host_time=HostTime(3e-4, 2e-6))
    topology = replace(topology, measured=replace(topology.measured, devices=(known,)))
    few, many = aggregate([1], [100], 1), aggregate([1] * 64, [4000] * 64, 64)
    plain, ahead = (
        step_model(spec, topology, Placement(tp=2), precision_named("bf16"), None, None, is_ahead)
        for is_ahead in (False, True)
    )
    assert "assumed" not in plain.traits.origin
    assert plain.step(few).host == pytest.approx(3.02e-4)
    device_s = plain.step(few).total - plain.step(few).host
    assert ahead.step(few).host == pytest.approx(max(0.0, 3.02e-4 - device_s))
    long_s = plain.step(many).total - plain.step(many).host
    assert long_s > plain.step(many).host and ahead.step(many).host == 0
    assumed = step_model(
        spec, machine(), Placement(tp=2), precision_named("bf16"), None, None, True
    )
    assert assumed.step(few).host > 4e-4, "what is assumed is what a device waits for already"
