"""Kernels of graph replays get the ops that their nodes were recorded for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tpprof.classify.classify import classify_trace
from tpprof.classify.prices import CostSource
from tpprof.classify.sources import cost_source
from tpprof.classify.work import WorkKind
from tpprof.events import Kind

from tests.pure.tpprof_rows import STREAM, Row, Rows
from tests.pure.tpprof_works import annotation, at, check_costs, check_whole, key, ours
from tpinfer.costs.graph_nodes import (
    GraphNodes,
    OpKernels,
    graph_nodes,
    graph_nodes_path,
    write_graph_nodes,
)
from tpinfer.costs.manifest import cost_manifest

VOID = "void at::native::(anonymous namespace)::{}<float, 4>(int)"


def recorded(rows: int = 4) -> GraphNodes:
    """No order of names tells these ops apart: all products are one kernel."""
    ledger, _ = ours()
    model, draw = [OpKernels("", ["indexSelectSmallIndex"])], []
    for op in ledger.op_ids():
        kernels = ["odd_kernel"] if "reduce" in op else ["even_kernel", "fillFunctor"]
        (draw if op.startswith(("sample", "draw", "mass", "prompt")) else model).append(
            OpKernels(op, kernels if "norm" not in op else [])
        )
    draw.append(OpKernels("", ["copy_kernel"]))
    return graph_nodes(0, [(rows, "model", model), (rows, "draw", draw)])


def names_of(nodes: GraphNodes, part: int) -> list[str]:
    """As a recorder shows them."""
    found = [nodes.names[name] for name in nodes.graphs[part].names]
    return [VOID.format(name) if name[0] in "if" else name for name in found]


def replayed(rows: Rows, nodes: GraphNodes, step: int) -> list[tuple[str, Row]]:
    """A step of both graphs; (op id, kernel)."""
    begin = rows.now_ns - (0 if rows.rows else 100)
    found = []
    for part, graph in enumerate(nodes.graphs):
        kernels = rows.replay(names_of(nodes, part))
        ids = [nodes.ops[op] if op >= 0 else "" for op in graph.ops]
        found += zip(ids, kernels, strict=True)
    rows.range(annotation(step), begin, rows.now_ns)
    return found


def test_every_kernel_has_the_op_it_was_recorded_for() -> None:
    ledger, manifest = ours()
    nodes, rows = recorded(), Rows()
    steps = [replayed(rows, nodes, number) for number in (5, 6)]
    trace = rows.trace()
    work = classify_trace(trace, None, CostSource(manifest, nodes=nodes))
    check_whole(trace, work)
    assert not work.warnings
    for step in steps:
        by_op: dict[str, list[int]] = {}
        for op, row in step:
            entry = at(trace, work, row)
            assert key(work, entry) == op
            if op:
                by_op.setdefault(op, []).append(entry)
        check_costs(work, ledger, by_op)
        [reduce] = by_op["layers.1.mlp.reduce"]
        assert work.kind[reduce] == WorkKind.COMM and work.layer[reduce] == 1
        assert work.comm_bytes[reduce] == 3 * 64 * 2
        assert work.layer[by_op["layers.0.attn.qkv"][1]] == 0


def test_a_copy_in_between_is_no_kernel() -> None:
    _, manifest = ours()
    nodes, rows = recorded(), Rows()
    found = replayed(rows, nodes, 1)
    first, second = found[3][1], found[4][1]
    rows.add(
        Kind.COPY, "Memcpy DtoD (Device -> Device)", first.end_ns, second.start_ns, STREAM,
        launch=first.launch,
    )  # fmt: skip
    trace = rows.trace()
    work = classify_trace(trace, None, CostSource(manifest, nodes=nodes))
    assert [key(work, at(trace, work, row)) for _, row in found] == [op for op, _ in found]


@pytest.mark.parametrize("how", ["one is missing", "one is another", "one too many"])
def test_other_kernels_are_not_read(how: str) -> None:
    _, manifest = ours()
    nodes, rows = recorded(), Rows()
    replayed(rows, nodes, 1)
    begin, names = rows.now_ns, names_of(nodes, 0)
    if how == "one is missing":
        del names[4]
    elif how == "one is another":
        names[4] = "something_else"
    else:
        names.append("even_kernel")
    odd = rows.replay(names)
    rows.range(annotation(2), begin, rows.now_ns)
    trace = rows.trace()
    work = classify_trace(trace, None, CostSource(manifest, nodes=nodes))
    assert {key(work, at(trace, work, row)) for row in odd} == {""}
    assert any("1 of 3 graph launches were not read by the nodes" in one for one in work.warnings)
    assert any("steps with graph replays were not read" in one for one in work.warnings)


def test_recordings_that_are_alike_but_mean_other_ops_claim_nothing() -> None:
    _, manifest = ours()
    one = [OpKernels("embed", ["a"]), OpKernels("head", ["a"])]
    other = [OpKernels("head", ["a"]), OpKernels("embed", ["a"])]
    rows = Rows()
    begin = rows.now_ns - (0 if rows.rows else 100)
    kernels = rows.replay(["a", "a"])
    rows.range(annotation(1), begin, rows.now_ns)
    trace = rows.trace()
    for second, expected in ((one, ["embed", "head"]), (other, ["", ""])):
        nodes = graph_nodes(0, [(1, "model", one), (2, "model", second)])
        work = classify_trace(trace, None, CostSource(manifest, nodes=nodes))
        assert [key(work, at(trace, work, row)) for row in kernels] == expected


def test_the_record_beside_a_trace_is_found(tmp_path: Path) -> None:
    """Where the manifest is; what is damaged counts as none."""
    ledger, _ = ours()
    manifest = json.dumps({"manifest": cost_manifest(ledger)})
    (tmp_path / "rank0.manifest.json").write_text(manifest)
    trace = replace(Rows().trace(), source=str(tmp_path / "rank0.trace.json.gz"))
    path = graph_nodes_path(tmp_path, 0)
    write_graph_nodes(recorded(), path)
    assert cost_source(trace).nodes == recorded()
    path.write_text("{")
    assert cost_source(trace).nodes is None
