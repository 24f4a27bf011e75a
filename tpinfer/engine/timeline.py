"""One rank's time as adjoining pieces, each with exactly one leaf, made from what the rank
recorded.

Op by op: a collective is split into waiting for its last rank and the transfer behind it, every
other op goes whole to what bounds it. Between ops the host's own spans name what it did. What no
record explains stays visible.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tpinfer.config.ceilings import Ceilings
from tpinfer.costs.bound import classify
from tpinfer.costs.leaves import LEAVES
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import OpFormula, OpKind
from tpinfer.costs.step_record import HostSpan, Measurements, StepRecord

HOST_PARTS = (
    "schedule", "plan_wait", "prepare", "sample", "detokenize", "python", "ipc", "recorder",
)  # fmt: skip
"""What `host` is made of."""
_HOST, _IDLE = LEAVES.index("host"), LEAVES.index("idle_unexplained")
_UNRECORDED = LEAVES.index("unrecorded")
_WAIT, _UNSPLIT = LEAVES.index("comm_wait"), LEAVES.index("comm_unsplit")
_PYTHON = HOST_PARTS.index("python")
_NO_PART = -1


@dataclass(frozen=True, slots=True)
class Timeline:
    """Pieces of one rank in order of time; they may leave gaps but never overlap."""

    rank: int
    starts_ns: np.ndarray
    """int64 [pieces]."""
    ends_ns: np.ndarray
    """int64 [pieces]."""
    leaves: np.ndarray
    """int8 [pieces], index into LEAVES."""
    parts: np.ndarray
    """int8 [pieces], index into HOST_PARTS, -1 where the leaf is not host."""
    recorded_from_ns: int
    """Older records were let go; gaps before this moment are `unrecorded`, not idle."""

    def split(self, start_ns: int, end_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """ns per leaf and per host part within the window, int64. Gaps are `idle_unexplained`."""
        first = int(np.searchsorted(self.ends_ns, start_ns, side="right"))
        last = int(np.searchsorted(self.starts_ns, end_ns, side="left"))
        starts = np.maximum(self.starts_ns[first:last], start_ns)
        ends = np.minimum(self.ends_ns[first:last], end_ns)
        spent = np.maximum(ends - starts, 0)
        by_leaf = np.zeros(len(LEAVES), dtype=np.int64)
        np.add.at(by_leaf, self.leaves[first:last], spent)
        by_part = np.zeros(len(HOST_PARTS) + 1, dtype=np.int64)
        np.add.at(by_part, self.parts[first:last], spent)
        gap_ns = end_ns - start_ns - int(by_leaf.sum())
        lost_until_ns = max(start_ns, min(end_ns, self.recorded_from_ns))
        known = np.maximum(np.minimum(ends, lost_until_ns) - starts, 0)
        lost_ns = lost_until_ns - start_ns - int(known.sum())
        by_leaf[_UNRECORDED] += lost_ns
        by_leaf[_IDLE] += gap_ns - lost_ns
        return by_leaf, by_part[:-1]


@dataclass(frozen=True, slots=True)
class Collectives:
    """The collectives of one step as all ranks saw them, each rank's row among those it meets."""

    arrivals_ns: np.ndarray
    """int64 [ranks, collectives]: when the last rank came that this one meets."""
    late_ranks: np.ndarray
    """int64 [ranks, collectives]: which rank that was."""
    waits_ns: np.ndarray
    """int64 [ranks, collectives]: this rank's waiting for it."""


class StepClassifier:
    """Leaf of each op of a rank's steps, remembered per shape of step."""

    def __init__(self, ledger: CostLedger, ceilings: Ceilings) -> None:
        ids = ledger.op_ids()
        self._ledger = ledger
        self._ceilings = ceilings
        self.num_met = np.array([len(ledger.ranks_met(op)) for op in ids], dtype=np.int64)
        """int64 [ops]: ranks that wait for each other in it, 0 where none does."""
        self.is_collective = self.num_met > 0
        formulas: dict[tuple[OpKind, OpFormula], int] = {}
        self._kinds = []
        which = []
        for op in ids:
            priced = ledger.kind(op), ledger.op_formula(op)
            if priced not in formulas:
                formulas[priced] = len(formulas)
                self._kinds.append(priced[0])
            which.append(formulas[priced])
        self._formulas = tuple(formula for _, formula in formulas)
        self._which = np.array(which)
        self._known: dict[object, tuple[np.ndarray, np.ndarray]] = {}

    def classify(self, record: StepRecord) -> tuple[np.ndarray, np.ndarray]:
        """(leaf index int8, floor ns int64) of each op, [ops]."""
        found = self._known.get(record.aggregates)
        if found is None:
            ledger, aggregates = self._ledger, record.aggregates
            level = self._ceilings.memory_level(ledger.step_working_set_bytes(aggregates))
            bounds = [
                classify(kind, priced.cost(aggregates), ledger.compute_dtype, level, self._ceilings)
                for kind, priced in zip(self._kinds, self._formulas, strict=True)
            ]
            leaves = np.array([LEAVES.index(bound.leaf) for bound in bounds], dtype=np.int8)
            floors = np.array([bound.floor_ns for bound in bounds], dtype=np.int64)
            found = self._known[aggregates] = leaves[self._which], floors[self._which]
        return found


def match_collectives(records: Sequence[StepRecord], num_met: np.ndarray) -> Collectives | None:
    """The same step's records of all ranks, in rank order; None when they cannot be the same
    program. num_met: int64 [ops], how many adjoining ranks meet in each op, 0 in one that is no
    collective."""
    if len({len(record.op_ends_ns) for record in records}) != 1:
        return None
    is_collective = num_met > 0
    sizes = num_met[is_collective]
    starts = np.stack([op_starts(record)[is_collective] for record in records])
    ends = np.stack([np.asarray(record.op_ends_ns)[is_collective] for record in records])
    arrivals, late = np.empty_like(starts), np.empty_like(starts)
    for size in set(sizes.tolist()):
        columns = sizes == size
        for first in range(0, len(records), size):
            part = starts[first : first + size, columns]
            arrivals[first : first + size, columns] = part.max(0)
            late[first : first + size, columns] = first + part.argmax(0)
    return Collectives(arrivals, late, np.clip(arrivals - starts, 0, ends - starts))


def op_starts(record: StepRecord) -> np.ndarray:
    """int64 [ops]: start of each op."""
    if record.op_starts_ns is not None:
        return np.asarray(record.op_starts_ns, dtype=np.int64)
    ends = np.asarray(record.op_ends_ns, dtype=np.int64)
    return np.concatenate((np.array([record.ops_start_ns]), ends[:-1]))


def build_timeline(
    measured: Measurements, classifier: StepClassifier, matched: Mapping[int, Collectives]
) -> Timeline:
    """All pieces of one rank. `matched` holds the collectives of steps, by step id, where all
    ranks are known."""
    columns = [_outside_steps(_span_pieces(measured.spans), measured.records)]
    columns += [
        _step_pieces(r, classifier, _arrivals(matched.get(r.step_id), measured.rank))
        for r in measured.records
    ]
    starts, ends, leaves, parts = (np.concatenate(column) for column in zip(*columns, strict=True))
    keep = ends > starts
    order = np.argsort(starts[keep], kind="stable")
    starts, ends = starts[keep][order], ends[keep][order]
    # Two clocks readings of one moment may cross by some ns: the earlier piece keeps the time.
    if len(starts) > 1:
        reached = np.maximum.accumulate(ends)[:-1]
        starts[1:] = np.maximum(starts[1:], reached)
        ends = np.maximum(ends, starts)
    return Timeline(
        measured.rank,
        starts,
        ends,
        leaves[keep][order],
        parts[keep][order],
        measured.recorded_from_ns,
    )


Pieces = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _span_pieces(spans: Sequence[HostSpan]) -> Pieces:
    return (
        np.array([span.start_ns for span in spans], dtype=np.int64),
        np.array([span.end_ns for span in spans], dtype=np.int64),
        np.full(len(spans), _HOST, dtype=np.int8),
        np.array([HOST_PARTS.index(span.part) for span in spans], dtype=np.int8),
    )


def _outside_steps(spans: Pieces, records: Sequence[StepRecord]) -> Pieces:
    """The parts of host spans in which no op ran: with several steps in flight the host plans while
    a step runs, and that time is the ops'."""
    if not records or not len(spans[0]):
        return spans
    starts, ends, leaves, parts = spans
    begun = np.array([record.ops_start_ns for record in records], dtype=np.int64)
    ended = np.array([record.end_ns for record in records], dtype=np.int64)
    order = np.argsort(begun)
    far = np.iinfo(np.int64).max
    gap_starts = np.concatenate((np.array([0]), np.maximum.accumulate(ended[order])))
    gap_ends = np.concatenate((begun[order], np.array([far])))
    first = np.searchsorted(gap_ends, starts, side="right")
    counts = np.maximum(np.searchsorted(gap_starts, ends, side="left") - first, 0)
    which = np.repeat(np.arange(len(starts)), counts)
    gaps = first[which] + np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return (
        np.maximum(starts[which], gap_starts[gaps]),
        np.minimum(ends[which], gap_ends[gaps]),
        leaves[which],
        parts[which],
    )


def _arrivals(collectives: Collectives | None, rank: int) -> np.ndarray | None:
    return None if collectives is None else collectives.arrivals_ns[rank]


def _step_pieces(
    record: StepRecord, classifier: StepClassifier, arrivals_ns: np.ndarray | None
) -> Pieces:
    """Per op a waiting part and the rest; host between ops that leave gaps and behind the last
    one. arrivals_ns: [collectives], when the last rank came to each; None where others are
    unknown."""
    leaves, _ = classifier.classify(record)
    starts = op_starts(record)
    ends = np.asarray(record.op_ends_ns, dtype=np.int64)
    arrived = starts.copy()
    if arrivals_ns is not None:
        mask = classifier.is_collective
        arrived[mask] = np.clip(arrivals_ns, starts[mask], ends[mask])
    elif record.waits_ns is not None:  # the rank's own stamps
        waited = np.zeros(len(starts), dtype=np.int64)
        waited[list(record.waits_ns)] = list(record.waits_ns.values())
        arrived = np.minimum(starts + waited, ends)
    else:
        leaves = np.where(classifier.is_collective, np.int8(_UNSPLIT), leaves)
    before = np.concatenate((np.array([record.ops_start_ns]), ends[:-1]))
    tail = np.array([ends[-1]]), np.array([record.end_ns])
    count = len(ends)
    host = np.full(count, _HOST, dtype=np.int8)
    return (
        np.concatenate((before, starts, arrived, tail[0])),
        np.concatenate((starts, arrived, ends, tail[1])),
        np.concatenate((host, np.full(count, _WAIT, dtype=np.int8), leaves, host[:1])),
        np.concatenate((
            np.full(count, _PYTHON, dtype=np.int8),
            np.full(2 * count, _NO_PART, dtype=np.int8),
            np.full(1, _PYTHON, dtype=np.int8),
        )),
    )  # fmt: skip
