"""What each piece of work should cost: FLOPs, memory traffic, bytes on the wire; -1 where nobody
knows.

Three sources, asked in this order: a tpinfer manifest (op ids and step sums), the shapes of the
operator that launched a kernel, and the ledger of a model that the user names (`by_roles`). Each
fills in what the ones before left open. Bytes on the wire belong to the collective of an op alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tpinfer.config.dtypes import DType
from tpinfer.config.model import ModelSpec
from tpinfer.costs.graph_nodes import GraphNodes
from tpprof.classify.calls import DTYPES, call_costs
from tpprof.classify.entries import Entries
from tpprof.classify.manifest import Manifest
from tpprof.classify.sharing import share_out
from tpprof.classify.work import WorkKind
from tpprof.events import NONE, Trace


@dataclass(frozen=True)
class CostSource:
    """What is known besides the trace."""

    manifest: Manifest | None = None
    spec: ModelSpec | None = None
    tp: int = 1
    nodes: GraphNodes | None = None
    """Which op each kernel of its graphs was recorded for."""


@dataclass(frozen=True)
class Costs:
    """Of whole units, one row an entry, int64 [m] each; -1 where unknown."""

    flops: np.ndarray
    num_bytes: np.ndarray
    num_sent: np.ndarray


class Prices:
    """The columns being filled."""

    def __init__(self, entries: Entries) -> None:
        count = len(entries)
        self.flops = np.full(count, NONE, np.int64)
        self.num_bytes = np.full(count, NONE, np.int64)
        self.num_sent = np.full(count, NONE, np.int64)
        self.dtype = np.full(count, DTYPES.index(DType.BFLOAT16), np.int8)
        self.warnings: list[str] = []
        self._kind = entries.kind
        self._length = entries.length_ns

    def fill(self, at: np.ndarray, costs: Costs, dtype: np.ndarray | int, unit: np.ndarray) -> None:
        """Share costs out over the entries `at` (int64 [m]) by length, and keep the parts of those
        that have none yet: a kernel that is priced already has done its part of the unit's work.

        `unit` (int64 [m]) is equal for those that a cost covers together. Copies take no part, and
        only collectives send.
        """
        kind, length = self._kind[at], self._length[at]
        takes = (costs.flops >= 0) & (kind != WorkKind.COPY)
        rows, units, length_of = at[takes], unit[takes], length[takes]
        fresh = self.flops[rows] < 0
        for column, values in ((self.flops, costs.flops), (self.num_bytes, costs.num_bytes)):
            parts = share_out(np.maximum(values[takes], 0), units, length_of)
            column[rows[fresh]] = parts[fresh]
        dtypes = dtype[takes][fresh] if isinstance(dtype, np.ndarray) else dtype
        self.dtype[rows[fresh]] = dtypes
        sends = (costs.num_sent >= 0) & ((kind == WorkKind.COMM) | (kind == WorkKind.FUSED_COMM))
        rows, parts = at[sends], share_out(costs.num_sent[sends], unit[sends], length[sends])
        fresh = self.num_sent[rows] < 0
        self.num_sent[rows[fresh]] = parts[fresh]


def price_copies(prices: Prices, entries: Entries, trace: Trace) -> None:
    """A copy within the device reads and writes; a fill, and a copy that leaves it, does one."""
    rows = np.flatnonzero(entries.kind == WorkKind.COPY)
    if not len(rows):
        return
    moved = trace.num_bytes[entries.row[rows]]
    name = trace.name[entries.row[rows]]
    used = np.unique(name)
    inside = np.zeros(len(trace.strings), bool)
    texts = [trace.strings[index].lower() for index in used.tolist()]
    inside[used] = ["dtod" in text.replace(" ", "") for text in texts]
    prices.num_bytes[rows] = np.where(moved >= 0, moved * np.where(inside[name], 2, 1), NONE)


def price_by_manifest(
    prices: Prices, entries: Entries, manifest: Manifest, sums: Sequence[Mapping[str, int]]
) -> None:
    """By op id and step."""
    place = np.array([manifest.place.get(op, NONE) for op in entries.op_ids] + [NONE], np.int64)
    op = place[entries.op_id]
    known = np.flatnonzero((op >= 0) & (entries.step >= 0))
    if not len(known) or not sums:
        return
    where = entries.step[known], op[known]
    costs = Costs(*(table[where] for table in manifest.prices(sums)))
    prices.fill(known, costs, DTYPES.index(manifest.compute_dtype), entries.unit[known])


def price_by_shapes(prices: Prices, entries: Entries, trace: Trace) -> None:
    """By the operator that each kernel was launched for, or that it is."""
    has = np.flatnonzero((entries.op >= 0) & (prices.flops < 0))
    has = has[trace.shapes[entries.op[has]] >= 0] if not entries.is_cpu else has
    if not len(has):
        return
    op = entries.op[has]
    found = call_costs(trace, op)
    flops, moved = found.flops, found.num_bytes
    if entries.is_cpu:
        # Shapes price a whole call, not what it does between the operators that it calls.
        priced = entries.length_ns[has] == trace.end_ns[op] - trace.start_ns[op]
        priced |= found.is_view
        flops, moved = np.where(priced, flops, NONE), np.where(priced, moved, NONE)
    else:
        flops = np.where(moved > 0, flops, NONE)  # a kernel ran, so this was not only a view
    unit = has if entries.is_cpu else op
    prices.fill(has, Costs(flops, moved, np.full(len(has), NONE, np.int64)), found.dtype, unit)
