"""`tpinfer topo`: show and check as goldens, and mistakes in the call."""

from pathlib import Path

import pytest

from tests.pure.golden import GOLDENS, check_golden
from tests.pure.test_measured import example
from tests.pure.test_topology import GPUS, shipped
from tpinfer.cli.main import main
from tpinfer.cli.topo_show import draw
from tpinfer.config.measured_yaml import write_measured
from tpinfer.config.topology_check import check_topology
from tpinfer.config.topology_reader import load_topology, parse_topology

EXAMPLES = Path(__file__).parent / "topologies"
FILES = [
    "dgx-h100",
    "cpu-laptop",
    "pcie-2numa",
    str(EXAMPLES / "mig.yaml"),
    str(EXAMPLES / "dgx-h100.yaml"),
    str(GOLDENS / "discovered_nvswitch.yaml"),
]


def name_of(file: str) -> str:
    path = Path(file)
    return path.stem if path.suffix == "" else f"{path.parent.name}_{path.stem}"


@pytest.fixture(autouse=True)
def no_cards_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("action", ["show", "check"])
def test_output_is_the_golden(
    action: str, file: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    code = main(["topo", action, file])
    shown = capsys.readouterr().out
    check_golden(f"topo_{action}_{name_of(file)}.txt", shown, tmp_path)
    assert code == (1 if "hurts  " in shown else 0)


def test_what_was_measured_is_shown(tmp_path: Path):
    file = tmp_path / "pcie-2numa.yaml"
    file.write_text(shipped("pcie-2numa"))
    write_measured(example(), tmp_path / "pcie-2numa.measured.yaml")
    shown = draw(load_topology(file, ["placement={tp: 2}"])) + "\n"
    check_golden("topo_show_measured.txt", shown, tmp_path)


def hurts(text: str, *settings: str, visible: tuple[str, ...] | None = None) -> str:
    found = check_topology(parse_topology(text, "x.yaml", None, settings), visible)
    return "\n".join(f"{f.where}: {f.what}; {f.remedy}" for f in found if f.hurts)


def test_a_sound_machine_has_nothing_to_say():
    assert hurts(GPUS) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GPUS + "    shm: 64MB\n", "/dev/shm has 64 MB"),
        (GPUS + "    p2p: false\n", "1 of 1 pairs may not copy to each other (1 over NVL)"),
        (
            GPUS.replace("gpus: {sku: h100-sxm-80g, ids: 0..1}", "gpus: [{sku: l4, ids: 0}, "
            "{sku: l40s, ids: 1}]"),
            "unequal: 1 x l4 (whole), 1 x l40s (whole)",
        ),
        (
            GPUS.replace("ids: 0..1}", "ids: 0..1, numa: {0: 0, 1: 1}}", 1).replace("NVL", "PIX")
            .replace("450", "50"),
            "2 memory nodes of me: 1 pairs cross",
        ),
    ],
)  # fmt: skip
def test_what_hurts_is_found(text: str, words: str):
    assert words in hurts(text)


def test_groups_over_hosts_and_their_fabric():
    text = GPUS.replace("  me:", "  h0..h1:") + (
        "    nics: {name: eth0, bw: 100Gb/s}\n"
        "fabric: [{kind: NET, type: tcp, hosts: h0..h1, bw: 50GB/s, oversub: 2}]\n"
        "placement: {tp: 4}\n"
    )
    found = hurts(text)
    for words in ("spans 2 hosts", "2 times short of its edge", "carry 6.25 GB/s for each"):
        assert words in found
    assert "spans" not in hurts(text, "placement={tp: 2, pp: 2}")


def test_cards_named_by_uuid():
    assert "a process can use only the first" in hurts(GPUS, visible=("MIG-a", "MIG-b"))
    notes = check_topology(parse_topology(GPUS, "x.yaml"), ("GPU-a",))
    assert any("names cards by UUID (GPU-a)" in note.what for note in notes)
    assert not any("UUID" in n.what for n in check_topology(parse_topology(GPUS, "x"), ("0", "1")))


def test_clocks_and_unknown_cards_are_noted():
    text = (
        "version: 1\nname: x\nhosts:\n"
        "  a: {gpus: {name: New, ids: 0}, clock_offset: -3ms, p2p: SYS}\n"
    )
    notes = " ".join(f.what for f in check_topology(parse_topology(text, "x.yaml")))
    for words in ("3 ms behind", "no rates are known of its unknown", "p2p: SYS goes beyond"):
        assert words in notes


def test_discover_writes_a_file_that_reads_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "TPINFER_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "here.yaml"
    assert main(["topo", "discover", "-o", str(out)]) == 0
    assert "topo check" in capsys.readouterr().out
    assert main(["topo", "show", str(out)]) == 0
    assert main(["topo", "discover"]) == 0
    assert "version: 1" in capsys.readouterr().out
    assert main(["topo", "check"]) in (0, 1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["show", "nowhere"], "neither a file nor shipped"),
        (["discover", "x.yaml"], "takes no FILE"),
        (["show", "dgx-h100", "-o", "x"], "takes neither -o nor --hostfile"),
        (["discover", "-o", "/no/such/place"], "no directory"),
        (["discover", "--hostfile", "/no/such/file"], "cannot be read"),
        (["check", "dgx-h100", "--set", "a"], "write PATH=VALUE"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main(["topo", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_every_known_card_has_a_source_and_sane_numbers():
    from tpinfer.config.catalogue import read_catalogue

    catalogue = read_catalogue()
    wanted = (
        "a100-sxm-40g a100-sxm-80g h100-sxm-80g h100-pcie-80g h100-nvl-94g h200-sxm b200 gb200 "
        "l40s l4 a10g rtx-4090 rtx-pro-6000 mi300x"
    )
    assert set(wanted.split()) <= set(catalogue.cards)
    for card in catalogue.cards.values():
        assert card.source and card.rates.flops_per_s
        cache, memory = card.rates.memory
        assert cache.bytes_per_s > memory.bytes_per_s and cache.capacity_bytes < 1e9
        assert memory.capacity_bytes >= 24e9
        ridge = max(card.rates.flops_per_s.values()) / memory.bytes_per_s
        assert 50 < ridge < 2000
        assert all(card.usd_per_hour is None or card.price_source for _ in (0,))


@pytest.mark.parametrize(
    ("name", "sku"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm-80g"),
        ("NVIDIA H100 PCIe", "h100-pcie-80g"),
        ("NVIDIA H100 NVL", "h100-nvl-94g"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("Tesla V100", None),
    ],
)
def test_names_that_drivers_give_cards(name: str, sku: str | None):
    from tpinfer.config.catalogue import read_catalogue

    assert read_catalogue().card_named(name) == sku
