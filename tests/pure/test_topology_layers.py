"""Three layers of a topology, which paths GPUs may use, and where every value comes from."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.test_measured import example
from tests.pure.test_topology import GPUS, HOST, ceilings, shipped
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import TopologyError
from tpinfer.config.measured import CollectiveFit
from tpinfer.config.measured_yaml import write_measured
from tpinfer.config.origin import Origin
from tpinfer.config.topology import Topology
from tpinfer.config.topology_reader import load_topology, parse_topology

EXAMPLES = Path(__file__).parent / "topologies"
PAIR = ("box", "0"), ("box", "1")


def pcie(*settings: str, measured: bool = False, text: str = "") -> Topology:
    found = example() if measured else None
    return parse_topology(text or shipped("pcie-2numa"), "pcie-2numa.yaml", found, settings)


def test_a_dgx_in_few_lines():
    found = load_topology(EXAMPLES / "dgx-h100.yaml")
    assert [len(host.devices) for host in found.hosts] == [8] * 4
    assert len(found.groups()) == 4 and found.usd_per_gpu_hour == 3.99
    assert {nic.rail for nic in found.hosts[3].nics} == set("01234567")
    assert found.path(("h0", "0"), ("h3", "7")).kind == "NET"


def test_a_pcie_server_in_few_lines():
    found = load_topology(EXAMPLES / "pcie-2numa.yaml")
    near, far, across = (found.path(("box", "0"), ("box", d)) for d in ("1", "2", "4"))
    assert (near.kind, far.kind, across.kind) == ("PXB", "SHM", "SHM")
    assert (far.instead_of, across.instead_of) == ("PHB", "SYS")
    assert (far.bytes_per_s, across.bytes_per_s) == (32e9, 16e9)
    assert far.latency_s + 7 * far.per_peer_s > near.latency_s + 7 * near.per_peer_s


def test_mig_slices_in_few_lines():
    found = load_topology(EXAMPLES / "mig.yaml")
    assert [device.id for device in found.hosts[0].devices] == ["MIG-aaa", "MIG-bbb"]
    assert found.path(("n0", "MIG-aaa"), ("n0", "MIG-bbb")).kind == "SHM"


def test_a_laptop_in_few_lines():
    found = load_topology(EXAMPLES / "laptop.yaml")
    assert ceilings(found, num_ranks=2).collective_latency_s == pytest.approx(40e-6 + 150e-6)
    assert found.hosts[0].memory_bytes == 32_000_000_000


@pytest.mark.parametrize(
    ("p2p", "vendor", "num_gpus", "kinds"),
    [
        ("auto", "intel", 2, "NVL PIX PXB"),
        ("auto", "amd", 2, "NVL PIX PXB PHB SYS"),
        ("auto", "amd", 3, "NVL PIX PXB"),
        ("true", "intel", 8, "NVL PIX PXB PHB SYS"),
        ("false", "amd", 2, ""),
        ("PHB", "intel", 8, "NVL PIX PXB PHB"),
        ("NVL", "amd", 2, "NVL"),
    ],
)
def test_nccls_rule_for_copies_between_peers(p2p: str, vendor: str, num_gpus: int, kinds: str):
    used = []
    for kind in ("NVL", "PIX", "PXB", "PHB", "SYS"):
        text = HOST + (
            f"    cpu: {{vendor: {vendor}}}\n    p2p: {p2p}\n"
            "    gpus: {sku: h100-sxm-80g, ids: 0..7}\n"
            f"    links: [{{kind: {kind}, ids: 0..7, bw: 60GB/s}}]\n"
        )
        found = parse_topology(text, "x.yaml").path(("me", "0"), ("me", "1"), num_gpus)
        used += [kind] if found.kind == kind else []
        assert found.kind in (kind, "SHM")
        assert found.bytes_per_s <= (60e9 if found.kind == kind else 64e9)
    assert " ".join(used) == kinds


def test_a_pair_on_amd_is_faster_than_a_group_of_four():
    """NCCL counts the group's GPUs, so the cliff lies between two ranks and more."""
    text = shipped("pcie-2numa").replace("{kind: PXB", "{kind: PHB")
    two, four = (ceilings(pcie(text=text), num_ranks=n) for n in (2, 4))
    assert two.collective_latency_s < 0.6 * four.collective_latency_s


def test_without_peer_copies_nvlink_gives_way_to_pcie():
    text = GPUS + "    p2p: false\n"
    path = parse_topology(text, "x.yaml").path(("me", "0"), ("me", "1"))
    assert (path.kind, path.instead_of, path.bytes_per_s) == ("SHM", "NVL", 64e9)


def test_cards_without_peer_copies_use_host_memory():
    text = GPUS.replace("h100-sxm-80g", "rtx-4090").replace("NVL", "PIX").replace("450", "32")
    assert parse_topology(text, "x.yaml").path(("me", "0"), ("me", "1")).instead_of == "PIX"
    forced = parse_topology(text + "    p2p: true\n", "x.yaml")
    assert forced.path(("me", "0"), ("me", "1")).kind == "PIX"


def test_measured_goes_before_the_file(tmp_path: Path):
    (tmp_path / "pcie-2numa.yaml").write_text(shipped("pcie-2numa"))
    before = ceilings(load_topology(tmp_path / "pcie-2numa.yaml"), num_ranks=2)
    write_measured(example(), tmp_path / "pcie-2numa.measured.yaml")
    after = ceilings(load_topology(tmp_path / "pcie-2numa.yaml"), num_ranks=2)
    assert before.collective_latency_s != after.collective_latency_s == pytest.approx(6e-6)
    assert (after.collective_bytes_per_s, after.kernel_floor_s) == (13.25e9, 4.2e-6)
    assert (after.memory[-1].capacity_bytes, after.memory[-1].bytes_per_s) == (46 * 10**9, 712e9)
    assert after.flops_per_s[DType.BFLOAT16] == 214e12
    assert after.flops_per_s[DType.INT8] == before.flops_per_s[DType.INT8]
    assert "measured 2026-11-25" in after.origin
    assert after.origins["flops.bfloat16"] == after.origins["all_reduce.rate"] == Origin.MEASURED
    assert after.origins["flops.int8"] == Origin.SPEC
    assert after.origins["memory.L2.rate"] == Origin.MEASURED
    assert before.origins["memory.L2.rate"] == Origin.ASSUMED


def test_the_command_line_goes_before_what_was_measured():
    block = "    ceilings: {kernel_floor: 9us, memory: {HBM: {rate: 1GB/s}}}\nplacement:"
    text = shipped("pcie-2numa").replace("placement:", block)
    assert ceilings(pcie(text=text, measured=True), num_ranks=2).kernel_floor_s == 4.2e-6
    found = ceilings(
        pcie("hosts.box.ceilings.kernel_floor=3us", text=text, measured=True), num_ranks=2
    )
    assert (found.kernel_floor_s, found.origins["kernel_floor"]) == (3e-6, Origin.ASSUMED)
    assert found.memory[-1].bytes_per_s == 712e9


def test_setting_a_link_scales_measured_collectives():
    whole, half = (pcie(f"hosts.box.links.0.bw={bw}GB/s", measured=True) for bw in (32, 16))
    fast, slow = (ceilings(found, num_ranks=2) for found in (whole, half))
    assert fast.collective_bytes_per_s == 2 * slow.collective_bytes_per_s
    assert slow.origins["all_reduce.rate"] == Origin.ASSUMED
    assert whole.collective_fit(PAIR) == replace(measured_fit(), points={})
    fit, known = slow_fit(half), measured_fit()
    assert (fit.b1_bytes_per_s, fit.b2_bytes_per_s) == (
        known.b1_bytes_per_s / 2,
        known.b2_bytes_per_s / 2,
    )
    assert (fit.a_s, fit.c_s) == (known.a_s, known.c_s)


def measured_fit() -> CollectiveFit:
    return slow_fit(pcie(measured=True))


def slow_fit(topology: Topology) -> CollectiveFit:
    found = topology.collective_fit(PAIR)
    assert found is not None
    return found


def test_a_link_of_another_kind_sets_measured_collectives_aside():
    other = "hosts.box.links.0={kind: PIX, ids: 0..1, bw: 32GB/s}"
    assert pcie(other, measured=True).collective_fit(PAIR) is None
    later = slow_fit(pcie("hosts.box.links.0.latency=8us", measured=True))
    assert later.a_s == pytest.approx(2 * measured_fit().a_s)
    assert later.b2_bytes_per_s == measured_fit().b2_bytes_per_s


def test_a_measurement_over_links_that_stayed_is_still_one():
    same = pcie("hosts.box.links.0.bw=32GB/s", measured=True)
    moved = pcie("hosts.box.links.0.bw=16GB/s", measured=True)
    assert not same.is_rescaled(PAIR, "nccl") and moved.is_rescaled(PAIR, "nccl")
    assert ceilings(same, num_ranks=2).origins["all_reduce.rate"] == Origin.MEASURED
    assert same.collective_fit(PAIR) == pcie(measured=True).collective_fit(PAIR)


def test_where_set_forbids_copies_what_was_measured_of_them_is_set_aside():
    assert pcie(measured=True).collective_fit(PAIR) is not None
    assert pcie("hosts.box.p2p=false", measured=True).collective_fit(PAIR) is None


def test_setting_cards_sets_their_measurement_aside():
    found = pcie("hosts.box.gpus.sku=l4", measured=True)
    assert ceilings(found, num_ranks=2).memory[-1].capacity_bytes == 24 * 10**9


def test_a_group_just_like_the_measured_one_counts():
    found = pcie(measured=True)
    assert found.collective_fit((("box", "2"), ("box", "3"))) == found.collective_fit(PAIR)
    assert found.collective_fit((("box", "1"), ("box", "2"))) is None
    assert found.collective_fit((("box", "0"), ("box", "1"), ("box", "2"))) is None


def test_a_measurement_of_another_machine_is_refused():
    for other in (
        replace(example(), topology="else"),
        replace(example(), devices=(replace(example().devices[0], host="else"),)),
        replace(example(), groups=(replace(example().groups[0], places=(("box", "9"),)),)),
    ):
        with pytest.raises(TopologyError, match="measure again"):
            parse_topology(shipped("pcie-2numa"), "pcie-2numa.yaml", other)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("placement.tp=16", "--set placement.tp=16|asks for 16 ranks"),
        ("placement", "write PATH=VALUE"),
        ("hosts.box.links.9.bw=1GB/s", "nothing is called '9'"),
        ("hosts.nox.links.0.bw=1GB/s", "nothing is called 'nox.links.0.bw'; known there are box"),
        ("hosts.box.links.0.bw=1", "--set: hosts.box.links[0].bw is '1' has no unit"),
        ("hosts.box.links.0.bw=[", "is not YAML"),
        ("hosts.box.colour=red", "--set: hosts.box.colour is not a known key"),
        ("name.x=1", "nothing is called 'x'; it is a single value"),
        ("=1", "write PATH=VALUE"),
    ],
)
def test_mistakes_in_settings_are_said(setting: str, words: str):
    with pytest.raises(TopologyError) as caught:
        pcie(setting)
    assert any(part in str(caught.value) for part in words.split("|"))


def test_settings_can_add_and_replace():
    found = pcie("placement={tp: 2, dp: 2}", "cost={per_device_hour: 1USD}", "hosts.box.shm=64MB")
    assert found.placement is not None and found.placement.dp == 2
    assert found.usd_per_gpu_hour == 1 and found.hosts[0].shared_memory_bytes == 64_000_000
    ranges = parse_topology(
        (EXAMPLES / "dgx-h100.yaml").read_text(), "x", None, ["hosts.h0..h3.links.0.bw=100GB/s"]
    )
    assert ranges.path(("h2", "0"), ("h2", "1")).bytes_per_s == 100e9


@given(st.text(max_size=40) | st.from_regex(r"(hosts|placement|cost)(\.[a-z0-9]+){0,4}=.{0,12}"))
def test_no_setting_breaks_the_reader(setting: str):
    try:
        pcie(setting)
    except TopologyError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (HOST + "    gpus: [{sku: a100-sxm-40g, uuid: M, mig: 3g.20gb}]\n", 5, "with parent"),
        (HOST + "    gpus: [{sku: l40s, uuid: M, parent: 0}]\n", 5, "profile with mig"),
        (
            HOST + "    gpus: [{sku: h200-sxm, uuid: [A, B, C], mig: 3g.71gb, parent: 0}]\n",
            5,
            "more than its 7 compute slices",
        ),
        (
            HOST + "    gpus: [{sku: h200-sxm, ids: 0},\n"
            "      {sku: h200-sxm, uuid: A, mig: 3g.71gb, parent: 0}]\n",
            5,
            "card 0 whole and in slices",
        ),
        (HOST + "    cpu: {numa: 2}\n    gpus: {sku: l4, ids: 0, numa: 2}\n", 5, "on node 2"),
        (HOST + "    cpu: {cores: 3, numa: {0: 0..1, 1: 2..3}}\n", 5, "make them agree"),
        (HOST + "    cpu: {numa: {0: 0..1, 1: 1..2}}\n", 5, "core of another node"),
        (HOST + "    cpu: {numa: {1: 0..1}}\n", 5, "out of order"),
        (
            HOST + "    ranks: 2\n    links: [{kind: PIX, ids: 0..1, bw: 1GB/s}]\n",
            6,
            "between GPUs",
        ),
        (GPUS.replace("bw: 450GB/s", "bw: 450GB/s, attainable: 2"), 6, "at most 1"),
        (GPUS.replace("ids: 0..1, bw", "between: [0..1, 1], bw"), 6, "two sides"),
        (GPUS + "    from: hearsay\n", 7, "spec, nvml, measured, assumed"),
        (GPUS + "    p2p: maybe\n", 7, "auto, true, false, NVL"),
        (GPUS + "cost: {}\n", 7, "per_device_hour"),
        (
            GPUS.replace("  me:", "  h0..h1:") + "placement: {tp: 2, pp: 2}\n",
            7,
            "cannot run: nothing joins h0/0 and h1/0",
        ),
        (
            GPUS.replace("ids: 0..1}", "ids: 0..2}", 1) + "placement: {tp: 3}\n",
            7,
            "cannot run: nothing joins me/0 and me/2",
        ),
    ],
)
def test_what_cannot_be_names_file_and_line(text: str, line: int, words: str):
    with pytest.raises(TopologyError) as caught:
        parse_topology(text, "x.yaml")
    assert f"x.yaml, line {line}: " in str(caught.value)
    assert words in str(caught.value)


def test_numa_and_memory_of_processors():
    cpu = "{sku: epyc-genoa, sockets: 2, numa: {0: 0..3, 1: 4..7}, mem: 1TB, mem_bw: 700GB/s}"
    text = HOST + f"    cpu: {cpu}\n    ranks: 2\n    links: [{{kind: SHM, ids: 0..1}}]\n"
    (host,) = parse_topology(text, "x.yaml").hosts
    assert (host.num_cores, host.num_numa, host.num_sockets) == (8, 2, 2)
    assert host.numa_cores[1] == (4, 5, 6, 7)
    assert (host.memory_bytes, host.memory_bytes_per_s) == (10**12, 700e9)
    assert host.devices[0].rates is not None
    assert host.devices[0].rates.memory[-1].bytes_per_s == 700e9


@pytest.mark.parametrize(
    ("order", "first"),
    [
        ("[dp, pp, tp]", ("0", "1")),
        ("[dp, tp, pp]", ("0", "2")),
        ("[tp, pp, dp]", ("0", "4")),
    ],
)
def test_groups_follow_the_order_of_axes(order: str, first: tuple[str, str]):
    text = HOST + (
        "    gpus: {sku: h100-sxm-80g, ids: 0..7}\n    links: [{kind: NVL, ids: 0..7}]\n"
        f"placement: {{tp: 2, pp: 2, dp: 2, order: {order}}}\n"
    )
    groups = parse_topology(text, "x.yaml").groups()
    assert tuple(device for _, device in groups[0]) == first
    assert sorted(place for group in groups for place in group) == [
        ("me", str(i)) for i in range(8)
    ]


UNEQUAL = (
    HOST
    + "    gpus: [{sku: h100-sxm-80g, ids: 0..0}, {sku: SECOND, ids: 1..1}]\n"
    + "    links: [{kind: NVL, ids: 0..1, bw: 450GB/s}]\n"
    + "placement: {tp: 2, shares: auto}\n"
)


def unequal(second: str, *settings: str) -> Topology:
    return parse_topology(UNEQUAL.replace("SECOND", second), "two.yaml", None, settings)


def test_auto_shares_are_those_of_the_memory_rates():
    found = unequal("a100-sxm-80g")
    rates = [ceilings(found, 0, i, num_ranks=2).memory[-1].bytes_per_s for i in (0, 1)]
    assert found.shares == tuple(rates) and rates[0] > 1.3 * rates[1]
    assert unequal("h100-sxm-80g").shares is None, "equal devices are cut evenly"
    even = "placement.shares=[1, 1]"
    assert unequal("a100-sxm-80g", even).shares == (1.0, 1.0)
    with pytest.raises(TopologyError, match=r"placement\.shares is 'best'"):
        unequal("a100-sxm-80g", "placement.shares=best")
