"""classify_trace on traces made by hand: kernels with shapes, collectives, and next to nothing."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpprof.classify.classify import classify_trace
from tpprof.classify.prices import CostSource
from tpprof.classify.steps import read_annotation
from tpprof.classify.verdicts import rate_of
from tpprof.classify.work import WorkKind
from tpprof.events import Kind, Lane

from tests.pure.models import tiny
from tests.pure.test_tpprof_roles import KERNELS
from tests.pure.tpprof_rows import GPU, STREAM, THREAD, WORKER, Rows
from tests.pure.tpprof_works import (
    BF16,
    CEILINGS,
    GEMM,
    annotation,
    at,
    check_whole,
    key,
    leaf,
    mm,
    ours,
)
from tpinfer.config.ceilings import Ceilings
from tpinfer.config.dtypes import DType

BOUNDS = {
    "compute": (mm(4096, 4096, 4096), 400, 2_000_000, "compute", False),
    "memory": (mm(1, 4096, 4096), 400, 50_000, "memory", False),
    "balanced": (mm(100, 8192, 8192), 400, 200_000, "memory", True),
    "too small": (mm(8, 64, 64), 400, 5_000, "latency", False),
    "small grid, far from its roof": (mm(512, 2048, 2048), 60, 500_000, "latency", False),
    "small grid, near its roof": (mm(512, 2048, 2048), 60, 60_000, "compute", False),
    "full grid, far from its roof": (mm(512, 2048, 2048), 100, 500_000, "compute", False),
    "eight bits": (mm(4096, 4096, 4096, "c10::Float8_e4m3fn"), 400, 10**6, "compute", False),
    "no model": (("_C::unheard_of", [([3], BF16)]), 400, 5_000, "unmodelled", False),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_of_a_kernel(name: str) -> None:
    op, blocks, length, expected, is_balanced = BOUNDS[name]
    rows = Rows()
    kernel = rows.launched(GEMM, length, op=op, num_blocks=blocks)
    trace = rows.trace()
    work = classify_trace(trace, CEILINGS)
    check_whole(trace, work)
    entry = at(trace, work, kernel)
    assert (leaf(work, entry), bool(work.balanced[entry])) == (expected, is_balanced)
    assert key(work, entry) == op[0]
    if expected == "unmodelled":
        assert (work.flops[entry], work.num_bytes[entry], work.floor_ns[entry]) == (-1, -1, 0)
        return
    (rows_, depth), (_, columns) = (dims for dims, _ in op[1])
    size = 1 if "Float8" in op[1][0][1] else 2
    flops = 2 * rows_ * depth * columns
    moved = size * (rows_ * depth + depth * columns + rows_ * columns)
    assert (work.flops[entry], work.num_bytes[entry]) == (flops, moved)
    by_ceiling = {"compute": flops / (2e5 if size == 1 else 1e5), "HBM": moved / 1e3}
    for ceiling, expected_ns in by_ceiling.items():
        assert work.ceilings_ns[ceiling][entry] == round(expected_ns)
    assert work.ceilings_ns["L2"][entry] == round(moved / 4e3)
    assert work.floor_ns[entry] == max(
        round(max(by_ceiling.values())), 2000 * (expected == "latency")
    )


def test_several_kernels_of_one_operator_share_its_cost() -> None:
    rows = Rows()
    op = rows.op("aten::mm", 900, 3_000_000, mm(512, 4096, 4096)[1])
    kernels = [rows.launched(GEMM, 300_000, op=op), rows.launched(KERNELS["split"], 100_000, op=op)]
    trace = rows.trace()
    work = classify_trace(trace, CEILINGS)
    flops = [int(work.flops[at(trace, work, one)]) for one in kernels]
    assert flops == [3 * 2 * 512 * 4096 * 4096 // 4, 2 * 512 * 4096 * 4096 // 4]


def test_copies_and_fills() -> None:
    rows = Rows()
    names = {"Memcpy DtoD (Device -> Device)": 2, "Memcpy HtoD (Pinned -> Device)": 1}
    copies = [rows.launched(name, 3000, kind=Kind.COPY, num_bytes=640, op=("aten::copy_", [
        ([320], BF16), ([320], BF16)])) for name in names]  # fmt: skip
    fill = rows.launched("Memset (Device)", 1000, kind=Kind.MEMSET, num_bytes=64)
    trace = rows.trace()
    work = classify_trace(trace, CEILINGS)
    check_whole(trace, work)
    entries = [at(trace, work, row) for row in (*copies, fill)]
    assert [leaf(work, i) for i in entries] == ["copy"] * 3
    assert [int(work.num_bytes[i]) for i in entries] == [1280, 640, 64]


def test_modules_and_ranges_tell_the_layer() -> None:
    rows = Rows()
    inner = rows.launched(GEMM, 1000, op=mm(2, 2, 2))
    outer = rows.launched(GEMM, 1000, op=mm(2, 2, 2))
    alone = rows.launched(GEMM, 1000, op=mm(2, 2, 2))
    rows.add(Kind.PYTHON, "nn.Module: LlamaModel_0", 0, outer.end_ns, THREAD)
    rows.add(Kind.PYTHON, "nn.Module: LlamaDecoderLayer_12", 900, outer.start_ns, THREAD)
    rows.range("model.layers.13.mlp", 950, inner.start_ns)
    rows.add(Kind.PYTHON, "nn.Module: LlamaDecoderLayer_9", 0, 10**7, WORKER)
    trace = rows.trace()
    work = classify_trace(trace, CEILINGS)
    found = [int(work.layer[at(trace, work, row)]) for row in (inner, outer, alone)]
    assert found == [13, 12, -1]


def test_dtypes_without_a_rate_of_their_own() -> None:
    rates = {DType.FLOAT32: 1.0, DType.BFLOAT16: 16.0}
    ceilings = replace(CEILINGS, flops_per_s=rates)
    assert [rate_of(dtype, ceilings) for dtype in (
        DType.BFLOAT16, DType.FLOAT16, DType.FLOAT8_E4M3, DType.INT8, DType.INT64, DType.FLOAT32,
    )] == [16, 16, 16, 16, 1, 1]  # fmt: skip
    assert rate_of(DType.INT8, replace(ceilings, flops_per_s={**rates, DType.INT8: 32.0})) == 32
    assert rate_of(DType.FLOAT16, replace(ceilings, flops_per_s={DType.FLOAT32: 3.0})) == 3


def test_what_the_recorder_tells_of_collectives() -> None:
    rows = Rows()
    told = {
        "AllReduce_Sum_bf16_RING_LL": ("allreduce", 1 << 20, 2 * 3 / 4),
        "AllGather_RING_LL": ("allgather", 1 << 20, 3 / 4),
        "ReduceScatter_Sum_bf16_RING_LL": ("reduce_scatter", 1 << 20, 3 / 4),
        "Broadcast_RING_LL": ("broadcast", 1 << 20, 1),
    }
    kernels = [
        rows.launched(f"ncclDevKernel_{name}(x)", 30_000, told=(op, size, "tp:0", 4, i))
        for i, (name, (op, size, _)) in enumerate(told.items())
    ]
    empty = rows.launched(
        "ncclDevKernel_AllGather_RING_LL(x)", 30_000, told=("allgather", 0, "tp:0", 4, len(told))
    )
    silent = rows.launched("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(x)", 30_000)
    odd = rows.launched("some_engines_own_exchange", 30_000, told=("alltoall", 64, "ep", 4, 9))
    trace = rows.trace()
    work = classify_trace(trace, CEILINGS)
    check_whole(trace, work)
    for i, (kernel, (op, size, share)) in enumerate(zip(kernels, told.values(), strict=True)):
        entry = at(trace, work, kernel)
        assert work.keys[work.comm_op[entry]] == op
        assert work.keys[work.comm_group[entry]] == "tp:0"
        numbers = work.comm_bytes[entry], work.comm_size[entry], work.comm_sequence[entry]
        assert numbers == (size, 4, i)
        assert work.floor_ns[entry] == round(5000 + size * share / 100)
        assert work.ceilings_ns["wire"][entry] == work.floor_ns[entry]
    entry = at(trace, work, empty)
    assert (work.comm_bytes[entry], work.floor_ns[entry]) == (0, 0), "it need not take place"
    entry = at(trace, work, silent)
    assert work.keys[work.comm_op[entry]] == "allreduce"
    assert (work.comm_bytes[entry], work.comm_group[entry], work.floor_ns[entry]) == (-1, -1, 0)
    assert work.kind[at(trace, work, odd)] == WorkKind.COMM


def test_names_alone_tell_kinds() -> None:
    rows = Rows()
    kernels = [rows.launched(KERNELS[name], 1000) for name in ("reduce", "fused", "gemm", "norm")]
    trace = rows.trace()
    work = classify_trace(trace, None)
    check_whole(trace, work)
    kinds = [WorkKind(work.kind[at(trace, work, kernel)]) for kernel in kernels]
    assert kinds == [WorkKind.COMM, WorkKind.FUSED_COMM, WorkKind.COMPUTE, WorkKind.COMPUTE]
    assert any("no ceilings are known" in text for text in work.warnings)
    assert any("has no model of its cost" in text for text in work.warnings)


def test_entries_are_sorted_by_start_stream_and_end() -> None:
    rows = Rows()
    side = Lane(True, -1, 20, 0)
    for lane, length in ((side, 900), (STREAM, 100), (side, 500), (STREAM, 300)):
        rows.add(Kind.KERNEL, GEMM, 1000, 1000 + length, lane)
    rows.add(Kind.KERNEL, GEMM, 1001, 2000, STREAM)
    work = classify_trace(rows.trace(), CEILINGS)
    found = list(zip(work.lane.tolist(), (work.end_ns - work.start_ns).tolist(), strict=True))
    assert found == [(0, 300), (0, 100), (1, 900), (1, 500), (0, 999)]


@pytest.mark.parametrize(
    ("text", "number", "phase", "sums"),
    [
        ("tpinfer.step id=12 phase=decode tokens=3 sk=40", 12, "decode", {"tokens": 3, "sk": 40}),
        ("tpinfer.step id=99999999999999999999 rows=² tokens=-4 sk=x", None, "", {}),
        (
            "execute_10_context_1(sq8sk8sqsq64sqsk64)_generation_2(sq2sk30sqsq2sqsk30)",
            None, "mixed", {"tokens": 10, "rows": 3, "sk": 38, "sqsq": 66, "sqsk": 94},
        ),
        ("execute_context_2(9)_generation_0(0)", None, "prefill", {"tokens": 9, "rows": 2}),
        (
            "execute_context_1(888_788544)_generation_3(3)", None, "mixed",
            {"tokens": 891, "rows": 4, "sqsq": 788547},
        ),
        ("execute_new_0_cached_4", None, "decode", {"rows": 4}),
        ("step[DECODE bs=32]", None, "decode", {"rows": 32}),
        ("step[EXTEND bs=2 toks=77]", None, "prefill", {"rows": 2, "tokens": 77}),
        ("step[DECODE bs=² toks=99999999999999999999]", None, "decode", {}),
        ("ProfilerStep#6", 6, "", {}),
    ],
)  # fmt: skip
def test_what_an_annotation_says(
    text: str, number: int | None, phase: str, sums: dict[str, int]
) -> None:
    said = read_annotation(text)
    assert said is not None
    assert (said.number, said.phase, dict(said.sums)) == (number, phase, sums)


@pytest.mark.parametrize("text", ["", "tpinfer.op head", "execute_", "step", "ProfilerStep#x"])
def test_other_texts_are_no_steps(text: str) -> None:
    assert read_annotation(text) is None


@pytest.mark.parametrize("source", ["nothing", "manifest", "model"])
@pytest.mark.parametrize("ceilings", [None, CEILINGS])
def test_traces_without_work(source: str, ceilings: Ceilings | None) -> None:
    _, manifest = ours()
    costs = {
        "nothing": CostSource(),
        "manifest": CostSource(manifest),
        "model": CostSource(spec=tiny()),
    }[source]
    hosts_only = Rows()
    hosts_only.range(annotation(0), 100, 200)
    hosts_only.add(Kind.LAUNCH, "cudaGraphLaunch", 120, 130, THREAD)
    for rows in (Rows(), hosts_only):
        trace = rows.trace()
        work = classify_trace(trace, ceilings, costs)
        check_whole(trace, work)
        assert len(work) == 0


_NAMES = st.sampled_from(
    [*KERNELS.values(), "tpinfer.op head", "tpinfer.op ", "aten::mm", "cudaGraphLaunch",
     "gloo:all_reduce", "tpinfer.step id=99999999999999999999 rows=²", "step[DECODE bs=3]",
     "execute_context_1(3)_generation_0(0)", "", "layers.99999999999.x"]
)  # fmt: skip
_ROWS = st.lists(
    st.tuples(
        st.sampled_from(list(Kind)), _NAMES, st.integers(0, 60), st.integers(0, 30),
        st.sampled_from([THREAD, WORKER, STREAM]), st.integers(0, 30), st.integers(0, 30),
    ),
    max_size=25,
)  # fmt: skip


@given(_ROWS, st.sampled_from(["nothing", "manifest", "model"]))
def test_any_rows_are_judged(some: list[tuple], source: str) -> None:
    rows = Rows()
    for kind, name, start, length, lane, _, _ in some:
        rows.add(kind, name or "-", start, start + length, lane, num_blocks=3)
    calls = [row for row in rows.rows if row.kind == Kind.LAUNCH]
    ops = [row for row in rows.rows if row.kind == Kind.OP]
    for row, (*_, call, op) in zip(rows.rows, some, strict=True):
        if row.kind.is_device and calls:
            row.launch = calls[call % len(calls)]
        if row.kind.is_device and ops:
            row.op = ops[op % len(ops)]
    _, manifest = ours()
    costs = {
        "nothing": CostSource(),
        "manifest": CostSource(manifest),
        "model": CostSource(spec=tiny()),
    }[source]
    trace = rows.trace(devices={0: GPU})
    check_whole(trace, classify_trace(trace, CEILINGS, costs))
