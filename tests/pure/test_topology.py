"""Topology files: what ships parses, an edited number moves ceilings, mistakes name a line."""

from pathlib import Path

import pytest

from tpinfer.config.catalogue import shipped_directory
from tpinfer.config.ceilings import Ceilings
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import TopologyError
from tpinfer.config.topology import Topology
from tpinfer.config.topology_reader import load_topology, parse_topology, shipped_topologies


def shipped(name: str) -> str:
    return (shipped_directory() / f"{name}.yaml").read_text()


def ceilings(topology: Topology, *place, num_ranks: int | None = None) -> Ceilings:
    found = topology.ceilings_of(*place, num_ranks=num_ranks)
    assert found is not None
    return found


def test_what_ships():
    assert shipped_topologies() == ("cpu-laptop", "dgx-h100", "hgx-h200", "pcie-2numa")


@pytest.mark.parametrize("name", shipped_topologies())
def test_shipped_files_give_sane_ceilings(name):
    topology = load_topology(name)
    assert topology.name == name
    for rank in range(topology.tp or 1):
        found = topology.ceilings_of_rank(rank)
        assert found is not None
        rates = [level.bytes_per_s for level in found.memory]
        sizes = [level.capacity_bytes for level in found.memory]
        assert rates == sorted(rates, reverse=True) and sizes == sorted(sizes)
        assert {DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16} <= set(found.flops_per_s)
        assert 1e-7 < found.kernel_floor_s < found.collective_latency_s < 1e-3
        assert f"{name}.yaml" in found.origin


@pytest.mark.parametrize(
    ("name", "before", "after", "changed"),
    [
        ("cpu-laptop", "mem_bw: 40GB/s", "mem_bw: 80GB/s", lambda c: c.memory[-1].bytes_per_s),
        ("cpu-laptop", "mem: 16GB", "mem: 32GB", lambda c: c.memory[-1].capacity_bytes),
        ("cpu-laptop", "cores: 8", "cores: 16", lambda c: c.flops_per_s[DType.FLOAT32]),
        ("cpu-laptop", "bw: 10GB/s", "bw: 20GB/s", lambda c: c.collective_bytes_per_s),
        ("dgx-h100", "bw: 450GB/s", "bw: 900GB/s", lambda c: c.collective_bytes_per_s),
        ("pcie-2numa", "bw: 16GB/s", "bw: 8GB/s", lambda c: c.collective_bytes_per_s),
    ],
)
def test_editing_one_number_moves_the_ceilings(name, before, after, changed):
    text = shipped(name)
    assert before in text
    old = ceilings(parse_topology(text, f"{name}.yaml"))
    new = ceilings(parse_topology(text.replace(before, after), f"{name}.yaml"))
    wanted = changed(old) / 2 if name == "pcie-2numa" else 2 * changed(old)
    assert changed(new) == pytest.approx(wanted)


def test_ranks_share_a_host():
    laptop = load_topology("cpu-laptop")
    alone, four = (ceilings(laptop, num_ranks=n) for n in (1, 4))
    assert alone.memory[-1].bytes_per_s == 4 * four.memory[-1].bytes_per_s == 40e9
    assert (alone.collective_latency_s, alone.collective_bytes_per_s) == (0.0, float("inf"))
    assert laptop.ceilings_of_rank(3, num_ranks=4) == four


def test_a_group_is_as_slow_as_its_slowest_pair():
    box = load_topology("pcie-2numa")
    pair, socket, both = (ceilings(box, num_ranks=n) for n in (2, 4, 8))
    assert pair.collective_bytes_per_s == socket.collective_bytes_per_s
    # The socket's 16 GB/s carries three quarters, a card's PCIe wire of 32 GB/s two fifths.
    assert both.collective_bytes_per_s == pytest.approx(16e9 * 0.75)
    assert both.collective_bytes_per_s < pair.collective_bytes_per_s
    assert pair.collective_latency_s < socket.collective_latency_s < both.collective_latency_s


def test_the_smallest_level_that_fits():
    found = ceilings(load_topology("cpu-laptop"))
    assert found.memory_level(1).name == "L2"
    assert found.memory_level(5_000_000).name == "L3"
    assert found.memory_level(1 << 60).name == "DRAM"


HOST = "version: 1\nname: x\nhosts:\n  me:\n"
GPUS = (
    HOST
    + "    gpus: {sku: h100-sxm-80g, ids: 0..1}\n    links: [{kind: NVL, ids: 0..1, bw: 450GB/s}]\n"
)


def test_ceilings_blocks_go_first():
    block = (
        "    ceilings: {memory: {HBM: {rate: 3TB/s}}, flops: {float8_e4m3fn: 1PFLOPS},"
        " kernel_floor: 9us, all_reduce: {latency: 7us, rate: 300GB/s}}\n"
    )
    found = ceilings(parse_topology(GPUS + block, "x.yaml"))
    assert (found.memory[-1].bytes_per_s, found.memory[-1].capacity_bytes) == (3e12, 80_000_000_000)
    assert found.flops_per_s[DType.FLOAT8_E4M3] == 1e15
    assert (found.kernel_floor_s, found.collective_latency_s) == (9e-6, 7e-6)
    assert found.collective_bytes_per_s == 300e9


def test_a_devices_block_goes_before_its_hosts():
    text = HOST + (
        "    gpus: [{sku: l40s, ids: 0, ceilings: {kernel_floor: 1us}}, {sku: l40s, ids: 1}]\n"
        "    ceilings: {kernel_floor: 2us, memory: {HBM: {rate: 700GB/s}}}\n"
    )
    topology = parse_topology(text, "x.yaml")
    floors = [ceilings(topology, 0, i, num_ranks=1).kernel_floor_s for i in (0, 1)]
    assert floors == [1e-6, 2e-6]
    assert ceilings(topology, 0, 0, num_ranks=1).memory[-1].bytes_per_s == 700e9


def test_a_file_that_says_nothing_of_rates_gives_none():
    topology = parse_topology(HOST + "    ranks: 2\nplacement: {tp: 2, shares: [2, 1]}\n", "x.yaml")
    assert topology.ceilings_of() is None
    assert (topology.tp, topology.shares) == (2, (2.0, 1.0))


def test_hosts_in_a_range_joined_by_a_fabric():
    text = GPUS.replace("  me:", "  h0..h1:") + (
        "    nics: {name: mlx5_0..1, near: 0..1, bw: 400Gb/s, rdma: true, rail: 0..1}\n"
        "fabric: [{kind: NET, type: ib, rails: 8, hosts: h0..h1,"
        " bw: 50GB/s, latency: 3us, oversub: 2}]\n"
        "placement: {tp: 4, order: [dp, pp, tp], ranks: [[h0/0..1, h1/0..1]]}\n"
        "cost: {per_gpu_hour: 3.99USD}\n"
    )
    topology = parse_topology(text, "x.yaml")
    assert [host.name for host in topology.hosts] == ["h0", "h1"]
    assert [(n.name, n.near, n.bytes_per_s) for n in topology.hosts[1].nics] == [
        ("mlx5_0", "0", 50e9),
        ("mlx5_1", "1", 50e9),
    ]
    assert topology.groups() == ((("h0", "0"), ("h0", "1"), ("h1", "0"), ("h1", "1")),)
    assert ceilings(topology, "h1", "1").collective_bytes_per_s < 25e9
    assert topology.usd_per_gpu_hour == 3.99


def test_mig_slices_have_their_share_of_the_card():
    slices = ", ".join(
        f"{{sku: h200-sxm, uuid: MIG-{c}, mig: 3g.71gb, parent: 0}}" for c in ("aaa", "bbb")
    )
    text = (
        HOST + f"    gpus: [{slices}]\n    p2p: false\n" + "    links: [{kind: SHM, ids: 0..1}]\n"
    )
    topology = parse_topology(text, "x.yaml")
    part = ceilings(topology, "me", "MIG-bbb")
    whole = ceilings(load_topology("hgx-h200"))
    assert part.flops_per_s[DType.BFLOAT16] == pytest.approx(
        whole.flops_per_s[DType.BFLOAT16] * 3 / 7
    )
    assert part.memory[-1].capacity_bytes == 71_000_000_000
    assert part.collective_bytes_per_s == 5e9


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (GPUS + "    colour: red\n", 7, "colour"),
        (GPUS + "    gpus: {sku: l40s, ids: 0}\n", 7, "twice"),
        (GPUS.replace("h100-sxm-80g", "l40s").replace(", bw: 450GB/s", ""), 6, "'bw'"),
        (GPUS.replace("450GB/s", "450"), 6, "no unit"),
        (GPUS.replace("450GB/s", "450GB"), 6, "GB/s"),
        (GPUS.replace("bw: 450GB/s", "gen: 4, width: 16, bw: 64GB/s"), 6, "bidir"),
        (GPUS.replace("NVL", "NVLINK"), 6, "NVLINK"),
        (GPUS.replace("kind: NVL, ids: 0..1", "kind: NVL, ids: 0..2"), 6, "'2'"),
        (GPUS.replace("h100-sxm-80g", "h100"), 5, "h100-sxm-80g"),
        (GPUS.replace("ids: 0..1}\n    l", "ids: 3..1}\n    l"), 5, "rising"),
        (GPUS.replace("version: 1", "version: 2"), 1, "version"),
        (GPUS + "    ranks: 2\n", 7, "gpus"),
        (GPUS + "    ceilings: {memory: {HBN: {rate: 1GB/s}}}\n", 7, "HBN"),
        (GPUS + "    ceilings: {flops: {bf16: 1TFLOPS}}\n", 7, "bf16"),
        (GPUS + "placement: {tp: 3}\n", 7, "2 devices"),
        (GPUS + "placement: {tp: 2, shares: [1, 0]}\n", 7, "above 0"),
        (GPUS + "placement: {tp: 2, shares: [1]}\n", 7, "one per rank"),
        (GPUS + "placement: {tp: 2, ranks: [[me/0, me/7]]}\n", 7, "me/7"),
        (GPUS + "placement: {tp: two}\n", 7, "whole number"),
        ("version: 1\nname: x\nhosts: [a\n", 4, "not YAML"),
        (HOST + "    ranks: !!python/object:os.system 2\n    oops: 1\n", 6, "oops"),
    ],
)
def test_mistakes_name_file_and_line(text, line, words):
    with pytest.raises(TopologyError) as caught:
        parse_topology(text, "x.yaml")
    assert f"x.yaml, line {line}" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("name: x\nhosts: {}\n", "version"),
        (
            GPUS.replace("links: [{kind: NVL, ids: 0..1, bw: 450GB/s}]", "p2p: auto")
            + "placement: {tp: 2}\n",
            "joins",
        ),
        (GPUS + "    ceilings: {memory: {L3: {rate: 1GB/s}}}\n", "capacity"),
    ],
)
def test_what_is_missing_is_said(text, words):
    with pytest.raises(TopologyError, match=words):
        parse_topology(text, "x.yaml")


def test_unknown_places_and_files_are_named(tmp_path: Path):
    dgx = load_topology("dgx-h100")
    with pytest.raises(TopologyError, match="h9"):
        dgx.ceilings_of("h9", 0)
    with pytest.raises(TopologyError, match="device 'gpu9'"):
        dgx.ceilings_of("h0", "gpu9")
    with pytest.raises(TopologyError, match="9 ranks"):
        dgx.ceilings_of(num_ranks=9)
    for name in ("nowhere", "catalogue.yaml", str(tmp_path / "dgx-h100.yaml")):
        with pytest.raises(TopologyError, match="shipped are cpu-laptop"):
            load_topology(name)
    (tmp_path / "mine.yaml").write_text(GPUS)
    assert "topology mine.yaml" in ceilings(load_topology(tmp_path / "mine.yaml")).origin
