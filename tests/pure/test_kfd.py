"""AMD GPUs from a made-up tree of their kernel driver's files."""

from pathlib import Path

import pytest

from tpinfer.config.topology_reader import parse_topology
from tpinfer.machine.discover import discover_machine
from tpinfer.machine.discover_topology import discovered_text
from tpinfer.machine.kfd import read_kfd, survey_kfd
from tpinfer.machine.topology_text import gather_facts

GIB = 1 << 30
XGMI, PCIE = 11, 2


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def facts(**values: int) -> str:
    return "".join(f"{name} {value}\n" for name, value in values.items())


def node(root: Path, number: int, links: dict[int, int], **changes: int) -> None:
    """A MI300X behind two processors (nodes 0 and 1), whose links lead to `links` by their type."""
    folder = root / f"sys/class/kfd/kfd/topology/nodes/{number}"
    known = {
        "cpu_cores_count": 0, "simd_count": 1216, "simd_per_cu": 4, "gfx_target_version": 90402,
        "vendor_id": 0x1002, "device_id": 0x74A1, "location_id": number << 8, "domain": 0,
        "unique_id": 0xABC0 + number,
    }  # fmt: skip
    put(folder / "properties", facts(**{**known, **changes}))
    put(folder / "mem_banks/0/properties", facts(heap_type=1, size_in_bytes=192 * GIB, width=8192))
    put(folder / "mem_banks/1/properties", facts(heap_type=4, size_in_bytes=65536))
    for place, (target, kind) in enumerate(links.items()):
        rate, weight = (64_000, 15) if kind == XGMI else (0, 20)
        put(
            folder / f"io_links/{place}/properties",
            facts(type=kind, node_from=number, node_to=target, weight=weight, max_bandwidth=rate),
        )
    device = root / f"sys/bus/pci/devices/0000:{number:02x}:00.0"
    put(device / "max_link_speed", "32.0 GT/s PCIe\n")
    put(device / "max_link_width", "16\n")
    put(device / "numa_node", f"{number // 6}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight cards, all joined with all, four to a processor."""
    for number in (0, 1):
        folder = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{number}"
        put(folder / "properties", facts(cpu_cores_count=96, simd_count=0, vendor_id=0))
    for number in range(2, 10):
        others = {other: XGMI for other in range(2, 10) if other != number}
        node(tmp_path, number, {number // 6: PCIE, **others})
    put(tmp_path / "sys/module/amdgpu/version", "6.8.5\n")
    put(tmp_path / "proc/cpuinfo", "vendor_id : AuthenticAMD\nmodel name : Big\n")
    put(tmp_path / "proc/meminfo", f"MemTotal: {64 * GIB >> 10} kB\n")
    return tmp_path


def test_nodes_banks_and_links_are_read(root: Path) -> None:
    found = read_kfd(root)
    assert [one.number for one in found] == list(range(2, 10))
    one = found[0]
    assert (one.gfx, one.num_compute_units, one.memory_bytes) == ("gfx942", 304, 192 * GIB)
    assert (one.bus, one.uuid) == ("0000:02:00.0", "GPU-000000000000abc2")
    weights = {(link.target, link.type, link.weight, link.bytes_per_s) for link in one.links}
    assert (0, PCIE, 20, None) in weights and (9, XGMI, 15, 64e9) in weights


def test_a_survey_joins_all_with_all(root: Path) -> None:
    found = survey_kfd(root)
    assert found.driver_version == "6.8.5" and len(found.cards) == 8
    (group,) = found.nvlinks
    assert group.members == tuple(range(8)) and group.bytes_per_s == 7 * 64e9
    assert found.paths[0, 1] == ("PHB", True) and found.paths[0, 7] == ("SYS", True)
    assert all(found.peers.values()) and len(found.peers) == 28
    card = found.cards[5]
    assert (card.pcie_generation, card.pcie_width, card.numa) == (5, 16, 1)


def test_a_ring_is_pairs(tmp_path: Path) -> None:
    for number in range(2, 6):
        around = {2 + (number - 1) % 4: XGMI, 2 + (number - 3) % 4: XGMI}
        node(tmp_path, number, around)
    pairs = [group.members for group in survey_kfd(tmp_path).nvlinks]
    assert pairs == [(0, 1), (0, 3), (1, 2), (2, 3)]


def test_the_topology_file_names_the_card_and_is_read_back(root: Path) -> None:
    host = gather_facts("amd1", discover_machine(root), survey_kfd(root), root, "x86_64")
    text = discovered_text(host)
    assert "sku: mi300x" in text and "448GB/s" in text
    topology = parse_topology(text, "amd1.yaml")
    ceilings = topology.ceilings_of_rank(7, 8)
    assert ceilings is not None and ceilings.memory[-1].bytes_per_s > 3e12
    assert (
        topology.path((host.name, host.gpus.cards[0].id), (host.name, host.gpus.cards[7].id)).kind
        == "NVL"
    )


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"device_id": 0x740F, "gfx_target_version": 90010}, "AMD Instinct MI210"),
        ({"device_id": 1, "gfx_target_version": 90010}, "AMD gfx90a of 304 compute units"),
        ({"device_id": 1, "gfx_target_version": 110000}, "AMD gfx1100 of 304 compute units"),
    ],
)
def test_cards_that_no_list_knows_are_told_by_what_they_are(
    tmp_path: Path, changes: dict[str, int], name: str
) -> None:
    node(tmp_path, 2, {}, **changes)
    assert survey_kfd(tmp_path).cards[0].name == name


def test_what_cannot_be_read_is_left_out(root: Path) -> None:
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    put(nodes / "4/properties", "nonsense\nsimd_count many\n")
    put(nodes / "5/io_links/0/properties", "")
    (nodes / "6/mem_banks/0/properties").unlink()
    found = survey_kfd(root)
    assert len(found.cards) == 7
    assert found.cards[3].memory_bytes is None
    assert survey_kfd(root / "absent").cards == ()
