"""classify_trace on this project's own recordings, and on graph replays of other engines."""

from dataclasses import replace

import pytest
from tpprof.classify.classify import classify_trace
from tpprof.classify.prices import CostSource
from tpprof.classify.work import WorkKind

from tests.pure.models import tiny
from tests.pure.test_tpprof_roles import KERNELS, LAYERS
from tests.pure.tpprof_rows import Row, Rows
from tests.pure.tpprof_works import (
    BF16,
    CEILINGS,
    GEMM,
    REDUCE,
    SUMS,
    annotation,
    at,
    check_costs,
    check_whole,
    key,
    leaf,
    mm,
    ours,
)
from tpinfer.config.dtypes import DType
from tpinfer.costs.ledger import CostLedger
from tpinfer.sharding.partition import partition_model


def test_a_cpu_rank_of_ours() -> None:
    ledger, manifest = ours()
    rows, ranges, start = Rows(), {}, 1000
    rows.range("tpinfer.host prepare", 500, 990)
    for op in ledger.op_ids():
        ranges[op] = rows.range(f"tpinfer.op {op}", start, start + 900)
        rows.op("aten::mm", start + 10, start + 800, mm(2, 3, 4)[1])
        start += 1000
    rows.range(annotation(12), 400, start)
    trace = rows.trace(world_size=2)
    work = classify_trace(trace, None, CostSource(manifest))
    check_whole(trace, work)
    assert work.is_cpu and len(work) == len(ranges) and set(work.step.tolist()) == {12}
    entries = {op: [at(trace, work, row)] for op, row in ranges.items()}
    check_costs(work, ledger, entries)
    [reduce], [gather] = entries["layers.1.attn.reduce"], entries["head.gather"]
    message = 3 * 64 * 2
    assert (work.comm_bytes[reduce], work.comm_size[reduce]) == (message, 2)
    assert work.comm_bytes[gather] == 2 * 3 * 8  # all rows' pairs of both ranks come out
    assert work.keys[work.comm_op[reduce]] == "allreduce"
    assert work.keys[work.comm_op[gather]] == "allgather"
    assert work.floor_ns[reduce] == round(5000 + message / 100)
    assert work.layer[reduce] == 1 and work.layer[gather] == -1
    assert {leaf(work, i) for i in range(len(work)) if work.kind[i] == 0} == {"latency"}


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_messages_of_our_collectives(size: int) -> None:
    """As NCCL counts them, for any number of ranks."""
    _, manifest = ours(size)
    rows = Rows()
    reduce = rows.range("tpinfer.op layers.0.mlp.reduce", 1000, 9000)
    gather = rows.range("tpinfer.op head.gather", 10_000, 19_000)
    sums = replace(SUMS, candidates=9)
    rows.range(annotation(0, sums), 500, 20_000)
    trace = rows.trace()
    work = classify_trace(trace, None, CostSource(manifest))
    assert work.comm_bytes[at(trace, work, reduce)] == 3 * 64 * 2
    assert work.comm_bytes[at(trace, work, gather)] == size * (3 + 9) * 8


def test_a_gpu_rank_of_ours_launches_inside_its_ops() -> None:
    """An op of several kernels shares its cost; its collective alone sends."""
    ledger, manifest = ours()
    rows, start = Rows(), 900
    kernels: dict[str, list[Row]] = {}
    for op, names in {
        "layers.0.attn.qkv": [GEMM, KERNELS["split"]],
        "layers.0.attn.reduce": [KERNELS["add"], REDUCE],
        "layers.1.attn.reduce": ["kernel_without_a_telling_name"],
        "layers.1.mlp.down": [GEMM],
    }.items():
        begun = rows.now_ns - 5
        kernels[op] = [rows.launched(name, 3000) for name in names]
        rows.range(f"tpinfer.op {op}", begun, rows.now_ns - 5)
    loose = rows.launched("outside_of_any_op", 1000)
    rows.range(annotation(3), start, rows.now_ns + 50)
    trace = rows.trace()
    work = classify_trace(trace, None, CostSource(manifest))
    check_whole(trace, work)
    check_costs(work, ledger, {op: [at(trace, work, row) for row in found]
                               for op, found in kernels.items()})  # fmt: skip
    add, reduce = (at(trace, work, row) for row in kernels["layers.0.attn.reduce"])
    assert (work.kind[add], work.kind[reduce]) == (WorkKind.COMPUTE, WorkKind.COMM)
    assert work.comm_bytes[reduce] == 3 * 64 * 2 and work.comm_bytes[add] == -1
    unnamed = at(trace, work, kernels["layers.1.attn.reduce"][0])
    assert (work.kind[unnamed], work.comm_bytes[unnamed]) == (WorkKind.COMM, 3 * 64 * 2)
    assert key(work, at(trace, work, loose)) == "" and work.step[at(trace, work, loose)] == 3


UNNAMED = {
    "sample.local", "sample.mass", "mass.gather", "sample.search", "sample.draw", "draw.gather",
    "prompt_logprobs",
}  # fmt: skip
"""Ops of ours that other engines do not have, or whose kernels a replay does not tell from others.
"""


def decoder(layer: str, num_layers: int = 2, behind: str = "norm gemm gather sample") -> list[str]:
    names = ["embed", "reduce", *layer.split() * num_layers, *behind.split()]
    return [KERNELS[name] for name in names]


def test_our_graph_replays_are_read_by_node_order() -> None:
    ledger, manifest = ours()
    rows = Rows()
    begin = rows.now_ns - 100
    kernels = rows.replay(decoder(LAYERS["reduces"][0]))
    rows.range(annotation(5), begin, rows.now_ns)
    begin = rows.now_ns
    again = rows.replay(decoder(LAYERS["reduces"][0]))
    rows.range(annotation(6), begin, rows.now_ns)
    trace = rows.trace()
    work = classify_trace(trace, None, CostSource(manifest))
    check_whole(trace, work)
    for some in (kernels, again):
        by_op: dict[str, list[int]] = {}
        for entry in (at(trace, work, row) for row in some):
            by_op.setdefault(key(work, entry), []).append(entry)
        assert set(by_op) == set(ledger.op_ids()) - UNNAMED
        check_costs(work, ledger, by_op)
        [reduce] = by_op["layers.1.mlp.reduce"]
        assert work.comm_bytes[reduce] == 3 * 64 * 2 and work.layer[reduce] == 1
        assert work.comm_bytes[by_op["head.gather"][0]] == 2 * 3 * 8
    assert not work.warnings


OWN = {
    "norm": "norm_rows", "rope": "rotate_and_write", "attn": "paged_attention",
    "act": "gate_rows", "sample": "best_of_chunks", "reduce": REDUCE, "gather": KERNELS["gather"],
    "feed": "void at::native::(anonymous namespace)::indexSelectSmallIndex<long, long>()",
    "embed": KERNELS["embed"], "keep": "void at::native::index_copy_kernel_impl<long>()",
}  # fmt: skip
"""Kernels of a decode step as they are recorded here."""


@pytest.mark.parametrize("product", ["one_row", "few_rows", KERNELS["gemm"]])
def test_our_own_kernels_are_read_in_replays_of_two_parts(product: str) -> None:
    """The model and the draw are graphs of their own in one step."""
    ledger, manifest = ours()
    rows = Rows()
    begin = rows.now_ns - 100
    names = OWN | {"gemm": product}
    layer = "norm gemm rope attn gemm reduce norm gemm act gemm reduce"
    model = f"feed feed feed embed reduce {layer} {layer} norm gemm"
    kernels = rows.replay([names[one] for one in model.split()])
    kernels += rows.replay([names[one] for one in ["sample", "gather", "keep"]])
    rows.range(annotation(5), begin, rows.now_ns)
    trace = rows.trace()
    work = classify_trace(trace, None, CostSource(manifest))
    found = {key(work, at(trace, work, row)) for row in kernels} - {""}
    assert found == set(ledger.op_ids()) - UNNAMED
    assert key(work, at(trace, work, kernels[-1])) == "sample", "the token is kept"
    assert not work.warnings


def test_our_graph_replays_that_do_not_fit_are_told() -> None:
    _, manifest = ours()
    rows = Rows()
    begin = rows.now_ns - 100
    rows.replay(decoder(LAYERS["reduces"][0], 3))
    rows.range(annotation(5), begin, rows.now_ns)
    trace = rows.trace()
    work = classify_trace(trace, None, CostSource(manifest))
    assert (work.key == -1).all() and (work.flops == -1).all()
    assert any("1 of 1 steps with graph replays were not read" in one for one in work.warnings)
    assert any("0 % of the kernels in graph replays were placed" in one for one in work.warnings)


def test_a_working_set_that_fits_a_cache_is_judged_by_it() -> None:
    """The tiny model fits L2; with a context beyond it, memory is the level."""
    _, manifest = ours()
    rows = Rows()
    first = rows.range("tpinfer.op layers.0.mlp.down", 1000, 9000)
    rows.range(annotation(0), 900, 9500)
    second = rows.range("tpinfer.op layers.0.mlp.down", 11_000, 19_000)
    rows.range(annotation(1, replace(SUMS, sk=10**7)), 10_000, 19_500)
    trace = rows.trace()
    slow = replace(CEILINGS, kernel_floor_s=0.0)
    work = classify_trace(trace, slow, CostSource(manifest))
    fast, far = at(trace, work, first), at(trace, work, second)
    assert work.floor_ns[fast] == work.ceilings_ns["L2"][fast] < work.ceilings_ns["HBM"][fast]
    assert work.floor_ns[far] == work.ceilings_ns["HBM"][far]


def test_a_foreign_replay_is_priced_by_the_model_the_user_names() -> None:
    ledger, _ = ours(dtype=DType.BFLOAT16)
    rows = Rows()
    begin = rows.now_ns - 100
    kernels = rows.replay(decoder(LAYERS["reduces"][0]))
    rows.range("execute_3_context_0(sq0sk0sqsq0sqsk0)_generation_3(sq3sk60sqsq3sqsk60)",
               begin, rows.now_ns)  # fmt: skip
    trace = rows.trace(world_size=2)
    source = CostSource(spec=tiny(dtype=DType.BFLOAT16), tp=2)
    work = classify_trace(trace, CEILINGS, source)
    check_whole(trace, work)
    by_op: dict[str, list[int]] = {}
    for entry in (at(trace, work, row) for row in kernels):
        by_op.setdefault(key(work, entry), []).append(entry)
    assert set(by_op) == set(ledger.op_ids()) - UNNAMED
    check_costs(work, ledger, by_op)
    assert work.comm_bytes[by_op["layers.0.attn.reduce"][0]] == 3 * 64 * 2


def test_rows_alone_price_all_but_attention() -> None:
    """SGLang tells the batch of a decode step, not its contexts."""
    rows = Rows()
    begin = rows.now_ns - 100
    rows.replay(decoder(LAYERS["one rank"][0], behind="norm gemm sample")[:1]
                + decoder(LAYERS["one rank"][0], behind="norm gemm sample")[2:])  # fmt: skip
    rows.range("step[DECODE bs=3]", begin, rows.now_ns)
    work = classify_trace(rows.trace(), CEILINGS, CostSource(spec=tiny(dtype=DType.BFLOAT16)))
    priced = {key(work, i) for i in range(len(work)) if work.flops[i] >= 0}
    dark = {key(work, i) for i in range(len(work)) if work.flops[i] < 0}
    assert dark == {"layers.0.attn.core", "layers.1.attn.core"}
    assert {"embed", "layers.1.mlp.down", "head", "sample"} <= priced


def test_sliding_layers_need_to_know_what_they_see() -> None:
    """Contexts that all fit the window are known; longer ones only as a sum."""
    spec = tiny(dtype=DType.BFLOAT16, sliding_window=64, sliding_layers=(True, False))
    for context, is_known in ((60, True), (600, False)):
        rows = Rows()
        begin = rows.now_ns - 100
        rows.replay([KERNELS[name] for name in ["embed", *LAYERS["one rank"][0].split() * 2,
                                                "norm", "gemm"]])  # fmt: skip
        rows.range(f"execute_3_context_0(sq0sk0sqsq0sqsk0)_generation_3(sq3sk{context}sqsq3sqsk"
                   f"{context})", begin, rows.now_ns)  # fmt: skip
        work = classify_trace(rows.trace(), CEILINGS, CostSource(spec=spec))
        costs = {key(work, i): int(work.flops[i]) for i in range(len(work))}
        assert costs["layers.1.attn.core"] == 4 * context * 8 * 8
        assert costs["layers.0.attn.core"] == (costs["layers.1.attn.core"] if is_known else -1)


def test_replays_without_annotated_steps_have_layers_but_no_costs() -> None:
    rows = Rows()
    names = [
        KERNELS[name] for name in ["embed", *LAYERS["one rank"][0].split() * 2, "norm", "gemm"]
    ]
    rows.replay(names)
    rows.replay(names)
    work = classify_trace(rows.trace(), CEILINGS, CostSource(spec=tiny()))
    assert sorted(set(work.layer.tolist())) == [-1, 0, 1] and (work.flops == -1).all()
    assert any("no steps are annotated" in text for text in work.warnings)


@pytest.mark.parametrize(
    ("layer", "tp", "told"),
    [("reduces", 1, "pass --tp N"), ("one rank", 2, "collectives were found in 0 of 2 layers")],
)
def test_a_wrong_tp_is_told(layer: str, tp: int, told: str) -> None:
    rows = Rows()
    begin = rows.now_ns - 100
    rows.replay(decoder(LAYERS[layer][0]))
    rows.range("step[DECODE bs=3]", begin, rows.now_ns)
    work = classify_trace(rows.trace(), CEILINGS, CostSource(spec=tiny(), tp=tp))
    assert any(told in text for text in work.warnings)
    assert (work.layer == -1).all()


def test_kernels_with_shapes_keep_their_price_and_the_others_do_not_get_it_twice() -> None:
    """Eager: the model prices what the shapes leave open, by its part of the op's time."""
    spec = tiny(dtype=DType.BFLOAT16)
    rows, begin = Rows(), 900
    layer = LAYERS["one rank"][0].split()
    for name in ["embed", *layer * 2, "norm", "gemm"]:
        known = ("_C::rotary_embedding", [([3], "long int"), ([3, 64], BF16), ([3, 16], BF16)])
        rows.launched(KERNELS[name], 3000, op=known if name == "rope" else None)
    rows.range("step[DECODE bs=3]", begin, rows.now_ns)
    trace = rows.trace()
    work = classify_trace(trace, CEILINGS, CostSource(spec=spec))
    ledger = CostLedger(spec, partition_model(spec, 1), 0, spec.dtype, spec.dtype)
    cost = ledger.cost("layers.1.attn.rope", SUMS)
    mine = [i for i in range(len(work)) if key(work, i) == "layers.1.attn.rope"]
    assert [trace.text(work.row[i]) for i in mine] == [KERNELS["rope"], KERNELS["kv"]]
    assert work.num_bytes[mine].tolist() == [24 + 2 * 2 * 3 * 80, -(-cost.bytes_moved // 2)]


def test_who_replays_a_graph_is_not_what_its_kernels_were_made_for() -> None:
    rows = Rows()
    op = rows.op("aten::mm", 900, 2000, mm(2, 2, 2)[1])
    kernels = rows.replay([GEMM, GEMM])
    for kernel in kernels:
        kernel.op = op
    assert kernels[0].launch is not None
    kernels[0].launch.op = op
    trace = rows.trace()
    work = classify_trace(trace, CEILINGS)
    assert work.flops.tolist() == [-1, -1] and work.key.tolist() == [-1, -1]
