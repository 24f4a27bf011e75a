"""The measured layer: what is written reads back, mistakes name a line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.golden import GOLDENS, check_golden
from tpinfer.config.dtypes import DType
from tpinfer.config.errors import TopologyError
from tpinfer.config.measured import (
    COLLECTIVES,
    OP_KINDS,
    Clocks,
    CollectiveFit,
    Copy,
    DeviceMeasurement,
    GemmRate,
    GroupMeasurement,
    HostTime,
    Measurement,
    MemoryRead,
    OpTime,
)
from tpinfer.config.measured_yaml import (
    format_measured,
    measured_path,
    parse_measured,
    read_measured,
    write_measured,
)
from tpinfer.config.strict_yaml import parse_yaml
from tpinfer.costs.ops import OpKind

GOLDEN = "pcie-2numa.measured.yaml"


def example() -> Measurement:
    """Two cards of the shipped PCIe machine."""
    reduce = CollectiveFit(
        "all_reduce", "nccl", False, 4.1e-6, 3.4e-6, 9e9, 31e-6, 0.0, 13.25e9, 1024, 64 << 20,
        0.081, {1024: 7.5e-6, 1 << 20: 75e-6, 64 << 20: 3.359e-3},
    )  # fmt: skip
    graph = CollectiveFit(
        "all_reduce", "nccl", True, 3e-6, 3e-6, 9e9, 28e-6, 0.0, 13.25e9, 1024, 64 << 20, 0.06
    )
    return Measurement(
        topology="pcie-2numa",
        date="2026-11-25T19:00:00Z",
        driver="570.86.15",
        versions={"tpinfer": "0.1.0", "torch": "2.11.0+cu128", "nccl": "2.27.5"},
        devices=(
            DeviceMeasurement(
                "box",
                ("0", "1"),
                1,
                (
                    MemoryRead("L2", 8_000_000, 3.9e12),
                    MemoryRead("L2", 48_000_000, 2.8e12),
                    MemoryRead("HBM", 1_000_000_000, 712e9, 46_000_000_000),
                ),
                (
                    GemmRate(DType.BFLOAT16, 1, 4096, 4096, 0.7e12),
                    GemmRate(DType.BFLOAT16, 16, 4096, 4096, 11.2e12),
                    GemmRate(DType.BFLOAT16, 4096, 4096, 4096, 214e12),
                ),
                4.2e-6,
                1.6e-6,
                (Copy("host_to_device", 25.1e9, 8e-6), Copy("device_to_host", 24.3e9)),
                Clocks(2370, 9001, ("sw_power_cap",), 2520, 9001),
                (
                    OpTime(
                        "linear", DType.BFLOAT16, 3.4e-6, rates={1: 0.7e12, 64: 43e12}, error=0.03
                    ),
                    OpTime("attention", DType.BFLOAT16, 6e-6, 0.2e-6, 510e9, 81e12, error=0.12),
                    OpTime("norm", DType.BFLOAT16, 2.5e-6, bytes_per_s=480e9),
                ),
                HostTime(240e-6, 9e-6),
            ),
        ),
        groups=(
            GroupMeasurement(
                (("box", "0"), ("box", "1")),
                (reduce, graph),
                (OpTime("reduce", DType.BFLOAT16, 9e-6, bytes_per_s=11e9, error=0.1),),
            ),
        ),
    )


def test_the_format_is_the_golden(tmp_path: Path):
    write_measured(example(), tmp_path / "written.yaml")
    check_golden(GOLDEN, (tmp_path / "written.yaml").read_text(), tmp_path)
    assert read_measured(GOLDENS / GOLDEN) == example()


texts = st.text(min_size=1, max_size=12) | st.sampled_from(["no", "1..2", "a: b", "{}", "#", "'"])
names = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_-]{0,8}", fullmatch=True)
rates = st.floats(1e-3, 1e18)
times = st.one_of(st.just(0.0), st.floats(1e-12, 1e4))
sizes = st.integers(1, 1 << 45)
counts = st.integers(1, 1 << 20)
floors = st.none() | st.floats(1e-12, 1e4)
memory = st.builds(
    MemoryRead, st.sampled_from(["L1", "L2", "L3", "DRAM", "HBM"]), sizes, rates, st.none() | sizes
)
gemms = st.builds(GemmRate, st.sampled_from(DType), counts, counts, counts, rates)
paths = ["host_to_device", "device_to_host", "device_to_device", "host_to_host"]
copies = st.lists(st.sampled_from(paths), unique=True).flatmap(
    lambda chosen: st.tuples(*(st.builds(Copy, st.just(p), rates, floors) for p in chosen))
)
mhz = st.none() | st.integers(0, 10_000)
clocks = st.builds(Clocks, mhz, mhz, st.lists(texts, max_size=3).map(tuple), mhz, mhz)
ops = st.builds(
    OpTime, st.sampled_from(OP_KINDS), st.sampled_from(DType), times, times, st.none() | rates,
    st.none() | rates, st.dictionaries(counts, rates, max_size=3), st.floats(0, 10),
)  # fmt: skip
ids = st.lists(names, min_size=1, max_size=4, unique=True).map(tuple)
devices = st.builds(
    DeviceMeasurement, names, ids, counts, st.lists(memory, max_size=3).map(tuple),
    st.lists(gemms, max_size=3).map(tuple), floors, floors, copies, st.none() | clocks,
    st.lists(ops, max_size=3).map(tuple),
)  # fmt: skip
fits = st.builds(
    CollectiveFit, st.sampled_from(COLLECTIVES), texts, st.booleans(), times, times, rates, times,
    times, rates, sizes, sizes, st.floats(0, 10), st.dictionaries(sizes, times.filter(bool)),
)  # fmt: skip
places = st.lists(st.tuples(names, names), min_size=1, max_size=4, unique=True).map(tuple)
groups = st.builds(
    GroupMeasurement, places, st.lists(fits, max_size=3).map(tuple),
    st.lists(ops, max_size=3).map(tuple),
)  # fmt: skip
measurements = st.builds(
    Measurement, texts, texts, st.none() | texts, st.dictionaries(texts, texts, max_size=3),
    st.lists(devices, max_size=3).map(tuple), st.lists(groups, max_size=3).map(tuple),
)  # fmt: skip


@given(measurements)
def test_what_is_written_reads_back(measurement: Measurement):
    text = format_measured(measurement)
    assert parse_measured(parse_yaml(text, "x.yaml")) == measurement


def test_it_lies_beside_its_topology():
    assert measured_path(Path("a/box.yaml")) == Path("a/box.measured.yaml")


def test_the_lesser_of_two_lines():
    fit = example().groups[0].collectives[0]
    assert fit.seconds(0, 2) == fit.latency_s(2) == pytest.approx(7.5e-6)
    assert fit.seconds(1e9, 2) == pytest.approx(31e-6 + 1e9 / 13.25e9)
    assert fit.bytes_per_s == 13.25e9


def test_the_fastest_collective_of_a_group_in_any_order():
    places = (("box", "1"), ("box", "0"))
    assert (found := example().collective(places)) is not None and found.graph
    assert (found := example().collective(places, graph=False)) is not None and not found.graph
    assert example().collective(places, op="all_gather") is None
    assert example().collective(places[:1]) is None


def test_as_ceilings_of_other_numbers_of_ranks():
    device = example().device("box", "1")
    assert device is not None and example().device("box", "2") is None
    alone, shared = device.overrides(1), device.overrides(2)
    assert alone.memory == {"L2": (48_000_000, 2.8e12), "HBM": (46_000_000_000, 712e9)}
    assert shared.memory["HBM"] == (23_000_000_000, 356e9)
    assert alone.flops_per_s == {DType.BFLOAT16: 214e12}
    assert alone.kernel_floor_s == 4.2e-6


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("ids: [0, 1]", "id: 0", "id is not a known key; known here are host, ids"),
        ("level: L2", "level: L9", "level is 'L9'; use one of L1, L2, L3, DRAM, HBM"),
        ("rate: 3.9TB/s", "rate: 3900", "'3900' has no unit"),
        ("dtype: bfloat16", "dtype: bf16", "use one of float32, bfloat16"),
        ("[box/0, box/1]", "[box/0, box]", "names 'box'; write host/device"),
        ("a: 4.1us", "a: -1us", "must be 0 or more"),
        ("graph: false", "graph: 0", "use one of true, false"),
        ("error: 0.081", "error: none", "must be a number 0 or more"),
        ("kind: norm", "kind: nrom", "use one of embed, reduce, norm, linear"),
        ("{1: 700GFLOPS, ", "{0: 700GFLOPS, ", "must be a whole number of 1 or more"),
        ("row: 200ns", "row: 200", "'200' has no unit"),
        ("B1: 9GB/s, ", "", "lacks the key 'B1'; add it"),
    ],
)
def test_mistakes_name_file_and_line(before: str, after: str, words: str):
    lines = (GOLDENS / GOLDEN).read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if before in line)
    lines[number] = lines[number].replace(before, after)
    with pytest.raises(TopologyError, match=rf"x.yaml, line {number + 1}: ") as caught:
        parse_measured(parse_yaml("\n".join(lines), "x.yaml"))
    assert words in str(caught.value)


def test_its_kinds_of_op_are_those_of_the_ledger():
    assert list(OP_KINDS) == [kind.value for kind in OpKind]
