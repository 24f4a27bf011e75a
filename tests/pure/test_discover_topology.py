"""Discovery with a made-up driver and /sys: what is found reads back as a topology."""

import json
import queue
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pure import fake_nvml
from tests.pure.fake_nvml import FakeDriver, Fields
from tests.pure.golden import check_golden
from tpinfer.config.errors import TopologyError
from tpinfer.config.origin import Origin
from tpinfer.config.topology import Topology
from tpinfer.config.topology_reader import parse_topology
from tpinfer.machine.discover import Machine
from tpinfer.machine.discover_topology import (
    discover_host,
    discover_together,
    discovered_text,
)
from tpinfer.machine.gpu_survey import survey_gpus
from tpinfer.machine.hostfile import read_hostfile
from tpinfer.machine.nics import Port, pci_path, shares_bridge, survey_nics
from tpinfer.machine.nvml_driver import NvmlDriver
from tpinfer.machine.peers import answer_pings, broadcast, gather, measure_offset
from tpinfer.machine.topology_text import HostFacts, gather_facts

NODES = (tuple(range(8)), tuple(range(8, 16)))
MACHINE = Machine(
    cpu_model="INTEL(R) XEON(R) PLATINUM 8480+",
    cpu_vendor="intel",
    cpu_flags=frozenset(),
    cores=tuple(range(16)),
    num_cores=16,
    caches=(),
    numa_nodes=NODES,
    memory_bytes=1 << 40,
    available_bytes=1 << 39,
    shared_memory_bytes=1 << 36,
    shared_memory_free_bytes=1 << 35,
    gpus=(),
    no_gpu_reason="made up",
)


def facts(fields: Fields, tmp_path: Path, name: str = "node1") -> HostFacts:
    survey = survey_gpus(FakeDriver(fields), tmp_path)
    return gather_facts(name, MACHINE, survey, tmp_path, "x86_64")


def undated(text: str) -> str:
    """Without the time of discovery."""
    return "\n".join("discovered: {}" if "discovered:" in s else s for s in text.split("\n"))


def read(text: str) -> Topology:
    return parse_topology(text, "x.yaml")


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("machine", ["nvswitch", "two_sockets", "bridged", "mig"])
def test_what_is_found_is_the_golden(machine: str, tmp_path: Path):
    fields: Fields = getattr(fake_nvml, machine)()
    text = undated(discovered_text(facts(fields, tmp_path)))
    check_golden(f"discovered_{machine}.yaml", text, tmp_path)


def test_nvswitch(tmp_path: Path):
    found = read(discovered_text(facts(fake_nvml.nvswitch(), tmp_path)))
    (host,) = found.hosts
    assert [device.id for device in host.devices][:1] == ["GPU-00000000-0000"]
    assert {device.sku for device in host.devices} == {"h100-sxm-80g"}
    assert [device.numa for device in host.devices] == [0] * 4 + [1] * 4
    places = [(host.name, device.id) for device in host.devices]
    path = found.path(places[0], places[7])
    assert (path.kind, path.via, path.bytes_per_s) == ("NVL", "nvswitch", 450e9)
    assert path.origins["bw"] == Origin.NVML
    ceilings = found.ceilings_of(*places[0])
    assert ceilings is not None and ceilings.origins["memory.HBM.rate"] == Origin.NVML
    assert ceilings.memory[-1].bytes_per_s == pytest.approx(0.83 * 3.352e12, rel=1e-3)
    assert ceilings.memory[-1].capacity_bytes == 81559 << 20


def test_pcie_only_on_two_sockets(tmp_path: Path):
    found = read(discovered_text(facts(fake_nvml.two_sockets(), tmp_path)))
    (host,) = found.hosts
    places = [(host.name, device.id) for device in host.devices]
    kinds = [found.path(places[0], other) for other in (places[1], places[2], places[4])]
    assert [(k.kind, k.instead_of) for k in kinds] == [
        ("PXB", None),
        ("SHM", "PHB"),
        ("SHM", "SYS"),
    ]
    assert kinds[0].bytes_per_s == 32e9


def test_mig_slices_and_a_whole_card(tmp_path: Path):
    found = read(discovered_text(facts(fake_nvml.mig(), tmp_path)))
    devices = found.hosts[0].devices
    assert [(d.mig, d.parent) for d in devices[:2]] == [("3g.71gb", "GPU-00000000-0000")] * 2
    assert devices[2].mig is None
    for other in devices[1:]:
        assert found.path(("node1", devices[0].id), ("node1", other.id)).kind == "SHM"


def test_bridged_pairs(tmp_path: Path):
    found = read(discovered_text(facts(fake_nvml.bridged(), tmp_path)))
    ids = [("node1", device.id) for device in found.hosts[0].devices]
    assert found.path(ids[2], ids[3]).bytes_per_s == 300e9
    assert found.path(ids[0], ids[2]).instead_of == "PHB"


def test_cards_that_may_not_copy(tmp_path: Path):
    fields = fake_nvml.two_sockets() | fake_nvml.pairs(8, lambda i, j: 20, False)
    assert read(discovered_text(facts(fields, tmp_path))).hosts[0].p2p == "false"


def test_without_a_card_the_cores_are_described(tmp_path: Path):
    (host,) = read(discovered_text(facts({}, tmp_path))).hosts
    assert host.computes_on_cpu and len(host.devices) == 2
    assert (host.numa_cores, host.shared_memory_bytes) == (NODES, 1 << 36)
    assert host.devices[0].rates is not None


def test_a_card_nobody_knows(tmp_path: Path):
    fields = fake_nvml.cards("Brand New 9000", 1, 1000, 1000, 256, 5)
    text = discovered_text(facts(fields, tmp_path))
    found = read(text)
    assert found.ceilings_of() is None
    with_rates = parse_topology(
        text, "x.yaml", None, ["hosts.node1.ceilings={flops: {bfloat16: 5TFLOPS}}"]
    )
    assert (ceilings := with_rates.ceilings_of()) is not None
    assert ceilings.memory[-1].bytes_per_s == pytest.approx(0.8 * 64e9)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_field_may_be_missing_or_absurd(draw: st.DataObject):
    name = draw.draw(st.sampled_from(["nvswitch", "two_sockets", "bridged", "mig"]))
    fields: Fields = getattr(fake_nvml, name)()
    groups = sorted({str(key[0]) for key in fields} - {"count"})
    broken = draw.draw(st.sets(st.sampled_from(groups)))
    values = st.sampled_from([None, 0, -1, 7, "", "?: {", 1 << 40])
    for key in list(fields):
        if key[0] in broken and draw.draw(st.booleans()):
            value = draw.draw(values)
            if value is None:
                del fields[key]
            else:
                fields[key] = value
    survey = survey_gpus(FakeDriver(fields), Path("/nowhere"))
    assert read(discovered_text(HostFacts("node1", MACHINE, survey, arch="x86_64"))).hosts


def test_numa_comes_from_the_kernel_first(tmp_path: Path):
    fields = fake_nvml.cards("NVIDIA L4", 2, 23034, 6251, 192, 4)
    put(tmp_path / "sys/bus/pci/devices/0000:10:00.0/numa_node", "1\n")
    put(tmp_path / "sys/bus/pci/devices/0000:11:00.0/numa_node", "-1\n")
    survey = survey_gpus(FakeDriver(fields), tmp_path)
    assert [card.numa for card in survey.cards] == [1, 1]


def test_network_cards(tmp_path: Path):
    for name, rate, state, layer in (
        ("mlx5_10", "400 Gb/sec (4X NDR)", "4: ACTIVE", "InfiniBand"),
        ("mlx5_2", "200 Gb/sec (4X HDR)", "4: ACTIVE", "Ethernet"),
        ("mlx5_3", "400 Gb/sec (4X NDR)", "1: DOWN", "InfiniBand"),
    ):
        port = tmp_path / "sys/class/infiniband" / name / "ports/1"
        put(port / "rate", rate)
        put(port / "state", state)
        put(port / "link_layer", layer)
    assert survey_nics(tmp_path) == (Port("mlx5_2", 25e9, "roce"), Port("mlx5_10", 50e9, "ib"))


def test_plain_ethernet_counts_where_there_is_no_rdma(tmp_path: Path):
    for name, speed, state in (("eth0", "25000", "up"), ("eth1", "-1", "up"), ("eth2", "9", "no")):
        folder = tmp_path / "sys/class/net" / name
        put(folder / "speed", speed)
        put(folder / "operstate", state)
        (folder / "device").mkdir()
    (tmp_path / "sys/class/net/lo").mkdir()
    assert survey_nics(tmp_path) == (Port("eth0", 3.125e9, "tcp"),)


def test_a_network_card_is_near_the_gpu_behind_its_switch(tmp_path: Path):
    found = facts(fake_nvml.nvswitch(), tmp_path)
    paths = tuple(("pci0000:00", f"0000:0{i}:01.0", f"0000:1{i}:00.0") for i in range(8))
    ports = tuple(
        Port(f"mlx5_{i}", 50e9, "ib", ("pci0000:00", f"0000:0{i}:01.0", "x")) for i in (0, 5)
    )
    (host,) = read(discovered_text(replace(found, gpu_paths=paths, nics=ports))).hosts
    assert [nic.near for nic in host.nics] == [host.devices[i].id for i in (0, 5)]
    assert shares_bridge(paths[0], ("pci0000:00", "0000:09:01.0")) == 0
    assert pci_path(tmp_path, "0000:99:00.0") == ()


class Mailboxes:
    """Processes of a run, as threads: a queue for each direction."""

    def __init__(self, size: int) -> None:
        self.queues = {(i, j): queue.Queue() for i in range(size) for j in range(size)}

    def run(self, size: int, body) -> list:
        results = [None] * size

        def one(rank: int) -> None:
            results[rank] = body(ThreadPeers(rank, size, self.queues))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return results


class ThreadPeers:
    """Satisfies `peers.Peers`."""

    def __init__(self, rank: int, size: int, queues: dict) -> None:
        self.rank, self.size, self._queues = rank, size, queues

    def send(self, message: bytes, to: int) -> None:
        self._queues[self.rank, to].put(message)

    def receive(self, source: int) -> bytes:
        return self._queues[source, self.rank].get(timeout=20)


def together(hosts: list[HostFacts], slots: dict[str, int] | None = None) -> list[str | None]:
    size = len(hosts)
    return Mailboxes(size).run(
        size, lambda peers: discover_together(hosts[peers.rank], peers, slots)
    )


def test_all_hosts_under_mpirun(tmp_path: Path):
    ports = tuple(Port(f"mlx5_{i}", 50e9, "ib") for i in range(8))
    first, second = (
        replace(facts(fake_nvml.nvswitch(), tmp_path, name), nics=ports)
        for name in ("node1", "node2.cluster")
    )
    text, *others = together([first, first, second])
    assert text is not None and others == [None, None]
    found = read(text)
    assert [host.name for host in found.hosts] == ["node1", "node2.cluster"]
    assert found.fabric[0].type == "ib" and found.fabric[0].rails == 8
    assert found.fabric[0].link.bytes_per_s == 50e9
    offset = found.hosts[1].clock_offset_s
    assert offset is not None and abs(offset) < 1


def test_a_hostfile_orders_and_limits_hosts(tmp_path: Path):
    hosts = [facts(fake_nvml.two_sockets(), tmp_path, name) for name in ("a", "b", "c")]
    text = together(hosts, {"c": 4, "a": 8})[0]
    assert text is not None
    assert [(h.name, len(h.devices)) for h in read(text).hosts] == [("c", 4), ("a", 8)]


def test_a_hostfile_alone_describes_hosts_like_this_one(tmp_path: Path):
    found = read(
        discovered_text(facts(fake_nvml.two_sockets(), tmp_path), {"node1": 2, "node2": 8})
    )
    assert [len(host.devices) for host in found.hosts] == [2, 8]
    assert found.hosts[1].devices[0].id == "0"
    assert [host.devices[0].origin for host in found.hosts] == [Origin.NVML, Origin.ASSUMED]
    with pytest.raises(TopologyError, match="9 slots, but this host has 8 GPUs"):
        discovered_text(facts(fake_nvml.two_sockets(), tmp_path), {"node1": 9})


def test_a_clock_that_runs_ahead_is_found_out():
    ahead = 123_456_789

    def body(peers: ThreadPeers):
        import time

        if peers.rank == 0:
            return measure_offset(peers, 1)
        answer_pings(peers, lambda: time.time_ns() + ahead)
        return None

    offset, _ = Mailboxes(2).run(2, body)
    assert abs(offset.ns - ahead) <= offset.error_ns + 1000


def test_messages_of_all_ranks_meet():
    def body(peers: ThreadPeers):
        return gather(peers, bytes([peers.rank])), broadcast(peers, bytes([peers.rank + 7]))

    found = Mailboxes(3).run(3, body)
    assert found == [([b"\0", b"\1", b"\2"], b"\7"), ([], b"\7"), ([], b"\7")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=2\na slots=2\n", "line 2: host a is named again"),
        ("# nothing\n\n", "names no host"),
        ("a slots=0\n", "line 1: 'a slots=0' is not"),
        ("a\n", "is not `name slots=N`"),
        ("a slots=99999999999999999999\n", "is not `name slots=N`"),
    ],
)
def test_mistakes_in_a_hostfile_name_the_line(text: str, words: str, tmp_path: Path):
    put(tmp_path / "hosts", text)
    with pytest.raises(TopologyError, match=words):
        read_hostfile(tmp_path / "hosts")


def test_a_hostfile(tmp_path: Path):
    put(tmp_path / "hosts", "# ours\nnode1 slots=8  # fast\n\nnode2  slots = 4\n")
    assert read_hostfile(tmp_path / "hosts") == {"node1": 8, "node2": 4}
    with pytest.raises(TopologyError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


class OldLibrary:
    """A management library that lacks most functions and refuses the rest."""

    def nvmlDeviceGetCount_v2(self, *arguments: object) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex_v2(self, *arguments: object) -> int:
        return 1


def test_a_library_without_the_functions_is_silent():
    driver = NvmlDriver(OldLibrary())
    for field in ("count", "driver_version"):
        assert driver.read(field) is None
    for field, *at in (("name", 0), ("bus", 0), ("slice_uuid", 0, 1), ("ancestor", 0, 1)):
        assert driver.read(str(field), *map(int, at)) is None
    assert driver.read("p2p_status", 0, 1, 0) is None
    assert driver.read("nvlink_active", 0, 0) is None
    assert driver.read("no such field", 0) is None


def test_this_machine_can_be_described():
    text = discovered_text(discover_host())
    assert read(text).hosts[0].devices
    assert json.dumps(text)
