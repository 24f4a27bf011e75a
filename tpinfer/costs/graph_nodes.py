"""Which op each kernel of a recorded CUDA graph was made for: the record behind
`rank<r>.graphs.json`.

A replayed graph carries neither names of ops nor shapes. Whoever records it knows which kernels
every op added, in order; a profiler that sees one launch's kernels in the order of their starts
then knows the op of each, and its cost by the manifest. `worker.graph_nodes` writes it, `tpprof`
reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

FORMAT_VERSION = 1
NO_OP = -1
"""Of kernels that belong to none, such as those that gather a step's inputs."""
_MOST_BYTES = 1 << 27
_UNNAMED = "_GLOBAL__N"


class RecordedGraph(msgspec.Struct, frozen=True):
    """One recording; columns have one entry per kernel, in the order of launches."""

    rows: int
    """Rows that it was made for."""
    part: str
    """`model`, or `draw`: the ops behind the logits."""
    ops: list[int]
    """Place in `GraphNodes.ops`; NO_OP for none."""
    names: list[int]
    """Place in `GraphNodes.names`."""


class GraphNodes(msgspec.Struct, frozen=True):
    """All recordings of one rank."""

    rank: int
    ops: list[str]
    names: list[str]
    """What a kernel's name holds, see `name_pattern`."""
    graphs: list[RecordedGraph]
    format_version: int = FORMAT_VERSION

    def is_sound(self) -> bool:
        """Whether columns are of one length and point at something."""
        return all(
            len(graph.ops) == len(graph.names)
            and all(NO_OP <= op < len(self.ops) for op in graph.ops)
            and all(0 <= name < len(self.names) for name in graph.names)
            for graph in self.graphs
        )


@dataclass(frozen=True, slots=True)
class OpKernels:
    """Kernels that one op added to a recording."""

    op_id: str
    """Empty for none of the program's."""
    patterns: Sequence[str]


def graph_nodes(
    rank: int, recordings: Sequence[tuple[int, str, Sequence[OpKernels]]]
) -> GraphNodes:
    """The record of (rows, part, kernels in order) of each recording."""
    ops: dict[str, int] = {}
    names: dict[str, int] = {}
    graphs = []
    for rows, part, kernels in recordings:
        graph = RecordedGraph(rows, part, [], [])
        for of_op in kernels:
            place = ops.setdefault(of_op.op_id, len(ops)) if of_op.op_id else NO_OP
            for pattern in of_op.patterns:
                graph.ops.append(place)
                graph.names.append(names.setdefault(pattern, len(names)))
        graphs.append(graph)
    return GraphNodes(rank, list(ops), list(names), graphs)


def name_pattern(symbol: str) -> str:
    """What the name of a kernel holds in any recorder, which may show it mangled or not: the symbol
    itself, or the function's own name out of a C++ one (Itanium C++ ABI, 5.1: `_Z`, `N` where it is
    nested, then each name behind its length). Empty, which every name holds, where there is none.
    """
    if not symbol.startswith("_Z"):
        return symbol
    is_nested = symbol.startswith("_ZN")
    found = ""
    place = 2
    while is_nested and place < len(symbol) and symbol[place] in "NKVr":
        place += 1
    while place < len(symbol) and symbol[place].isdigit():
        digits = place
        while place < len(symbol) and symbol[place].isdigit():
            place += 1
        end = place + int(symbol[digits:place])
        found = found if symbol.startswith(_UNNAMED, place) else symbol[place:end]
        place = end if is_nested else len(symbol)
    return found


def graph_nodes_path(directory: Path, rank: int) -> Path:
    """Where the record of a rank lies beside its trace."""
    return directory / f"rank{rank}.graphs.json"


def write_graph_nodes(nodes: GraphNodes, path: Path) -> None:
    """Write `nodes` so that `read_graph_nodes` gives them back."""
    path.write_bytes(msgspec.json.encode(nodes) + b"\n")


def read_graph_nodes(path: Path) -> GraphNodes | None:
    """The record in a file; None for one that is missing, damaged or of a later version."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        found = msgspec.json.decode(path.read_bytes(), type=GraphNodes)
    except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return found if found.format_version <= FORMAT_VERSION and found.is_sound() else None
