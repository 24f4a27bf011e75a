"""The record of which op each kernel of a graph was made for."""

from pathlib import Path

import pytest

from tpinfer.costs.graph_nodes import (
    GraphNodes,
    OpKernels,
    RecordedGraph,
    graph_nodes,
    graph_nodes_path,
    name_pattern,
    read_graph_nodes,
    write_graph_nodes,
)


def _word(name: str) -> str:
    return f"{len(name)}{name}"


_RING = "ncclDevKernel_AllReduce_Sum_f32_RING_LL"
_HIDDEN = _word("_GLOBAL__N__c7ba9d5b_21_TensorFactories_cu_38772fc2_1919")
SYMBOLS = {
    "few_rows": "few_rows",
    "nvjet_sm90_tst_64x8_64x16_1x4_v_bz_TNN": "nvjet_sm90_tst_64x8_64x16_1x4_v_bz_TNN",
    f"_Z{_word(_RING)}24ncclDevKernelArgsStorageILm4096EE": _RING,
    "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIfEEEEviT0_":
        "vectorized_elementwise_kernel",
    f"_ZN2at6native{_HIDDEN}4trilIfEEvv": "tril",
    "_ZN2at6native12_GLOBAL__N_121indexSelectSmallIndexIfEEvv": "indexSelectSmallIndex",
    "_ZNK3foo3barEv": "bar",
    "_ZSt4sort": "",
    "_Z": "",
    "": "",
}  # fmt: skip


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_what_any_recorder_shows_of_a_symbol(symbol: str) -> None:
    assert name_pattern(symbol) == SYMBOLS[symbol]


def two() -> GraphNodes:
    model = [OpKernels("", ["feed"]), OpKernels("embed", ["gather"]), OpKernels("head", ["a", "b"])]
    draw = [OpKernels("sample", ["a"]), OpKernels("", ["feed"])]
    return graph_nodes(3, [(4, "model", model), (4, "draw", draw)])


def test_columns_point_at_names_and_ops() -> None:
    nodes = two()
    assert nodes.ops == ["embed", "head", "sample"]
    assert nodes.names == ["feed", "gather", "a", "b"]
    assert nodes.graphs == [
        RecordedGraph(4, "model", [-1, 0, 1, 1], [0, 1, 2, 3]),
        RecordedGraph(4, "draw", [2, -1], [2, 0]),
    ]
    assert nodes.is_sound()


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = graph_nodes_path(tmp_path, 3)
    assert path.name == "rank3.graphs.json"
    write_graph_nodes(two(), path)
    assert read_graph_nodes(path) == two()


DAMAGED = {
    "cut": '{"rank": 0, "ops": ["a"',
    "of other columns": '{"rank": 0, "ops": [], "names": ["x"], "graphs": '
    '[{"rows": 1, "part": "model", "ops": [-1, -1], "names": [0]}]}',
    "beyond its ops": '{"rank": 0, "ops": [], "names": ["x"], "graphs": '
    '[{"rows": 1, "part": "model", "ops": [0], "names": [0]}]}',
    "beyond its names": '{"rank": 0, "ops": [], "names": ["x"], "graphs": '
    '[{"rows": 1, "part": "model", "ops": [-1], "names": [1]}]}',
    "of a later version": '{"rank": 0, "ops": [], "names": [], "graphs": [], "format_version": 2}',
    "a list": "[]",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_no_record(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rank0.graphs.json"
    path.write_text(DAMAGED[name])
    assert read_graph_nodes(path) is None
    assert read_graph_nodes(tmp_path / "none.json") is None
