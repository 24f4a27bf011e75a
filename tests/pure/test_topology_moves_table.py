"""Editing one number of a topology file moves the ceilings, the split and the table that people
read; the measured times stay."""

import pytest

from tests.pure.made_up_reports import report
from tests.pure.recorded_runs import record
from tpinfer.cli.attribution_table import render_run
from tpinfer.config.catalogue import shipped_directory
from tpinfer.config.ceilings import Ceilings
from tpinfer.config.dtypes import DType
from tpinfer.config.huggingface import read_model_spec
from tpinfer.config.topology_reader import parse_topology
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import aggregate
from tpinfer.costs.step_record import Measurements
from tpinfer.embedded.locate import shape_directory
from tpinfer.engine.attribution import Attribution, Attributor
from tpinfer.sharding.partition import partition_model

TP, OP_NS, FILE = 2, 400_000, "cpu-laptop.yaml"
SPEC = read_model_spec(shape_directory("qwen3-0.6b-slice"))
PARTITION = partition_model(SPEC, TP)
LEDGERS = [CostLedger(SPEC, PARTITION, rank, DType.FLOAT32, DType.FLOAT32) for rank in range(TP)]
TOKENS = 30
"""Prompt tokens: about where a linear of the laptop turns from memory-bound to compute-bound."""


def ceilings(edit: tuple[str, str] = ("", "")) -> list[Ceilings]:
    """Per rank, from the shipped laptop with one number edited."""
    text = (shipped_directory() / FILE).read_text()
    assert edit[0] in text, f"{FILE} no longer says {edit[0]}"
    topology = parse_topology(text.replace(*edit, 1) if edit[0] else text, FILE)
    found = [topology.ceilings_of_rank(rank, TP) for rank in range(TP)]
    return [one for one in found if one is not None]


def attributor(edit: tuple[str, str] = ("", "")) -> Attributor:
    sums = aggregate([TOKENS], [TOKENS], num_logit_rows=1)
    step = record(0, 0, [OP_NS] * len(LEDGERS[0].op_ids()), sums)
    measured = [Measurements(rank, [step], []) for rank in range(TP)]
    return Attributor(measured, LEDGERS, ceilings(edit))


def split(whose: Attributor) -> Attribution:
    return whose.attribute(0, OP_NS * len(LEDGERS[0].op_ids()))


def table(edit: tuple[str, str] = ("", "")) -> str:
    whose, judged_by = attributor(edit), ceilings(edit)[0]
    size = whose.working_set_bytes(0)
    return render_run(report(split(whose), ceilings=judged_by, working_set_bytes=size))


COMMENTED = "    # ceilings:\n"
EDITS = [
    (("mem_bw: 40GB/s", "mem_bw: 20GB/s"), "memory", "compute"),
    ((COMMENTED, "    ceilings: {flops: {float32: 1GFLOPS}}\n"), "compute", "memory"),
    (("cores: 8,", "cores: 16,"), "memory", "compute"),
    ((COMMENTED, "    ceilings: {flops: {float32: 1TFLOPS}}\n"), "memory", "compute"),
    ((COMMENTED, "    ceilings: {kernel_floor: 3ms}\n"), "small_kernels", "memory"),
]


@pytest.mark.parametrize(("edit", "grows", "shrinks"), EDITS)
def test_one_number_moves_leaves(edit: tuple[str, str], grows: str, shrinks: str) -> None:
    for before, after in zip(split(attributor()).ranks, split(attributor(edit)).ranks, strict=True):
        assert after.rollup[grows] > before.rollup[grows]
        assert after.rollup[shrinks] < before.rollup[shrinks]
        assert after.rollup["communication"] == before.rollup["communication"]
        assert sum(after.rollup.values()) == after.wall_ns == before.wall_ns


@pytest.mark.parametrize(("edit", "grows", "shrinks"), EDITS)
def test_the_rows_of_the_table_follow(edit: tuple[str, str], grows: str, shrinks: str) -> None:
    rows = [
        [line for line in text.splitlines() if "rank " in line and "%" in line][:TP]
        for text in (table(), table(edit))
    ]
    assert all(old != new for old, new in zip(*rows, strict=True))
    walls = [[row.split()[2] for row in part] for part in rows]
    assert walls[0] == walls[1]


@pytest.mark.parametrize(
    ("edit", "before", "after"),
    [
        (("mem_bw: 40GB/s", "mem_bw: 80GB/s"), "DRAM 20 GB/s", "DRAM 40 GB/s"),
        (("cores: 8,", "cores: 16,"), "float32 269 GFLOPS", "float32 538 GFLOPS"),
        ((COMMENTED, "    ceilings: {kernel_floor: 7us}\n"), "at least 2.0 us", "at least 7.0 us"),
        (
            (COMMENTED, "    ceilings: {all_reduce: {latency: 44us}}\n"),
            "an all-reduce 8.0 us",
            "an all-reduce 44.0 us",
        ),
    ],
)
def test_the_notes_say_the_new_ceiling(edit: tuple[str, str], before: str, after: str) -> None:
    old, new = (" ".join(text.split()) for text in (table(), table(edit)))
    assert before in old and after not in old
    assert after in new and before not in new
    assert FILE in new, "the origin names the file"


def test_a_larger_cache_takes_the_judgement_over() -> None:
    grown = (COMMENTED, "    ceilings: {memory: {L3: {capacity: 2GiB}}}\n")
    assert "Judged against DRAM" in table() and "no cache holds" in table()
    assert "Judged against L3" in table(grown) and "fits its 2.15 GB" in table(grown)
    assert split(attributor(grown)) != split(attributor())


@pytest.mark.parametrize("edit", [("bw: 10GB/s", "bw: 5GB/s")])
def test_a_slower_wire_raises_the_floor_of_reduces(edit: tuple[str, str]) -> None:
    floors = [
        {row.kind: row.floor_ns for row in whose.floors(0)}
        for whose in (attributor(), attributor(edit))
    ]
    assert floors[1]["reduce"] > floors[0]["reduce"]
    assert {k: v for k, v in floors[1].items() if k not in ("reduce", "gather")} == {
        k: v for k, v in floors[0].items() if k not in ("reduce", "gather")
    }
