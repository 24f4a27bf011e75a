"""Op ids for kernels of this project's graph replays, from what was written down when the graphs
were recorded: the kernels of one launch, in the order of their starts, are a recording's nodes.

A launch is read where its kernels are as many as a recording's and every name holds what the
recording expects. Recordings for other numbers of rows may be alike; their ops are then too, or
nothing is claimed.
"""

from dataclasses import dataclass

import numpy as np

from tpinfer.costs.graph_nodes import GraphNodes
from tpprof.classify.entries import Entries, Texts, split_rows
from tpprof.classify.names import Names, copies
from tpprof.events import NONE, Trace

_FIRST_UNIT = 1 << 60
"""Units of launches begin here, above those of `by_roles`."""
_MOST_OPS = 1 << 20


@dataclass(frozen=True)
class NodesRead:
    """What was found."""

    is_read: np.ndarray
    """bool [n]: of a launch that was read, also where no op is its."""
    num_launches: int
    num_unknown: int
    """Launches that are no recording's."""

    def warnings(self) -> list[str]:
        """For people."""
        if not self.num_unknown:
            return []
        return [
            f"{self.num_unknown} of {self.num_launches} graph launches were not read by the nodes "
            "that were recorded: their kernels are others, or some are missing"
        ]


def place_by_nodes(trace: Trace, entries: Entries, names: Names, nodes: GraphNodes) -> NodesRead:
    """Fill op ids and units of the kernels of graph replays."""
    is_read = np.zeros(len(entries), bool)
    rows = np.flatnonzero(entries.in_graph & (entries.op_id < 0))
    rows = rows[~copies(trace, entries)[rows]]
    launches = split_rows(rows, entries.launch[rows])
    texts = Texts(entries.op_ids)
    reader = _Reader(trace, nodes, texts)
    num_unknown = 0
    for mine in launches:
        op = reader.ops_of(names.index[mine])
        if op is None:
            num_unknown += 1
            continue
        is_read[mine] = True
        fits = op >= 0
        entries.op_id[mine[fits]] = op[fits]
        launch = int(entries.launch[mine[0]])
        entries.unit[mine[fits]] = _FIRST_UNIT + launch * _MOST_OPS + op[fits].astype(np.int64)
    entries.op_ids = texts.texts
    return NodesRead(is_read, len(launches), num_unknown)


class _Reader:
    """Finds the recording that a launch replayed, and remembers those it has found."""

    def __init__(self, trace: Trace, nodes: GraphNodes, texts: Texts) -> None:
        self._trace = trace
        self._nodes = nodes
        self._op = np.append(texts.numbers(nodes.ops), np.int32(NONE))
        self._known: dict[bytes, np.ndarray | None] = {}
        self._holds: dict[tuple[int, int], bool] = {}

    def ops_of(self, index: np.ndarray) -> np.ndarray | None:
        """int32 [kernels]: number of each one's op, -1 for none; None where no recording, or
        several that differ, are like these names (string indices)."""
        key = index.tobytes()
        if key not in self._known:
            self._known[key] = self._find(index.tolist())
        return self._known[key]

    def _find(self, index: list[int]) -> np.ndarray | None:
        found: list[int] | None = None
        for graph in self._nodes.graphs:
            if len(graph.names) != len(index) or found == graph.ops:
                continue
            if all(map(self._fits, graph.names, index)):
                if found is not None:
                    return None
                found = graph.ops
        return None if found is None else self._op[np.array(found, np.int64)]

    def _fits(self, pattern: int, name: int) -> bool:
        key = pattern, name
        if key not in self._holds:
            self._holds[key] = self._nodes.names[pattern] in self._trace.strings[name]
        return self._holds[key]
