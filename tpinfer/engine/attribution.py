"""Where a window of wall time went, on every rank, adding up exactly in integer ns.

What counts and which words are used: six roll-ups over the leaves of `timeline`. `method:
counters`: this is what ranks record of themselves, without a profiler. Ranks of one host share a
clock, so a collective's wait is the time from a rank's own arrival to the last rank's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tpinfer.config.ceilings import Ceilings
from tpinfer.costs.leaves import LEAVES, roll_up
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.step_record import Measurements, StepRecord
from tpinfer.engine.timeline import (
    HOST_PARTS,
    Collectives,
    StepClassifier,
    Timeline,
    build_timeline,
    match_collectives,
    op_starts,
)


@dataclass(frozen=True, slots=True)
class RankSplit:
    """One rank's part of a window."""

    rank: int
    wall_ns: int
    leaves: Mapping[str, int]
    """ns by leaf; they sum to wall_ns."""
    host_parts: Mapping[str, int]
    """ns by what the host did; they sum to the leaf `host`."""
    caused_wait_ns: int
    """Waiting on the other ranks for this one, in collectives it came to last."""

    @property
    def rollup(self) -> dict[str, int]:
        """ns by the six words; they sum to wall_ns."""
        return roll_up(self.leaves)

    def __add__(self, other: "RankSplit") -> "RankSplit":
        return RankSplit(
            self.rank,
            self.wall_ns + other.wall_ns,
            _added(self.leaves, other.leaves),
            _added(self.host_parts, other.host_parts),
            self.caused_wait_ns + other.caused_wait_ns,
        )


@dataclass(frozen=True, slots=True)
class Attribution:
    """One window, or several added up, on every rank."""

    ranks: tuple[RankSplit, ...]
    ceilings_origin: str
    warnings: tuple[str, ...] = ()

    @property
    def wall_ns(self) -> int:
        """Wall time on rank 0, where tokens reach the host."""
        return self.ranks[0].wall_ns

    def __add__(self, other: "Attribution") -> "Attribution":
        ranks = tuple(a + b for a, b in zip(self.ranks, other.ranks, strict=True))
        warnings = tuple(dict.fromkeys(self.warnings + other.warnings))
        return Attribution(ranks, self.ceilings_origin, warnings)

    def to_json(self) -> dict[str, object]:
        """JSON values. The top level is rank 0's split; `ranks` has all."""
        first = self.ranks[0]
        return {
            "wall_ns": first.wall_ns,
            "leaves": dict(first.leaves),
            "rollup": first.rollup,
            "ranks": [
                {
                    "rank": split.rank,
                    "wall_ns": split.wall_ns,
                    "leaves": dict(split.leaves),
                    "rollup": split.rollup,
                    "host_parts": dict(split.host_parts),
                    "caused_wait_ns": split.caused_wait_ns,
                }
                for split in self.ranks
            ],
            "method": "counters",
            "ceilings_origin": self.ceilings_origin,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, slots=True)
class FloorRow:
    """Kernel time of one kind of op against the least the ceilings allow."""

    kind: str
    time_ns: int
    floor_ns: int

    @property
    def lost_ns(self) -> int:
        """What lies between; floor + lost = time, so it is negative where caches beat the
        ceiling."""
        return self.time_ns - self.floor_ns


class Attributor:
    """Everything the ranks of a run recorded, ready to be asked about any window."""

    def __init__(
        self,
        measured: Sequence[Measurements],
        ledgers: Sequence[CostLedger],
        ceilings: Sequence[Ceilings],
        emulation: str = "",
    ) -> None:
        """All sequences run over the ranks, 0 first. `emulation`: why nothing is claimed, told with
        every window."""
        self._records = [one.records for one in measured]
        self._origin = ceilings[0].origin
        self._classifiers = [StepClassifier(*pair) for pair in zip(ledgers, ceilings, strict=True)]
        self._ledgers = ledgers
        self._matched, self._warnings = self._match()
        if emulation:
            self._warnings = (emulation, *self._warnings)
        self._timelines: list[Timeline] = [
            build_timeline(one, classifier, self._matched)
            for one, classifier in zip(measured, self._classifiers, strict=True)
        ]

    def attribute(self, start_ns: int, end_ns: int, queued_until_ns: int = 0) -> Attribution:
        """Split [start, end) on every rank; the part before `queued_until_ns` is `queue`
        whatever else ran."""
        if end_ns < start_ns:
            raise ValueError(f"window {start_ns}..{end_ns} ends before it starts")
        begun_ns = min(max(start_ns, queued_until_ns), end_ns)
        caused = self._caused(begun_ns, end_ns)
        splits = []
        for timeline in self._timelines:
            by_leaf, by_part = timeline.split(begun_ns, end_ns)
            leaves = dict(zip(LEAVES, by_leaf.tolist(), strict=True))
            leaves["queue"] += begun_ns - start_ns
            leaves = {leaf: spent for leaf, spent in leaves.items() if spent}
            assert sum(leaves.values()) == end_ns - start_ns, (
                "the leaves of a window must sum to its wall"
            )
            parts = zip(HOST_PARTS, by_part.tolist(), strict=True)
            splits.append(
                RankSplit(
                    timeline.rank,
                    end_ns - start_ns,
                    leaves,
                    {part: spent for part, spent in parts if spent},
                    caused.get(timeline.rank, 0),
                )
            )
        return Attribution(tuple(splits), self._origin, self._warnings)

    def records(self, rank: int) -> Sequence[StepRecord]:
        """The steps of a rank."""
        return self._records[rank]

    def working_set_bytes(self, rank: int) -> int:
        """Weights and KV that the largest recorded step of a rank touches: the bytes by which its
        memory level is chosen."""
        ledger = self._ledgers[rank]
        sizes = [ledger.step_working_set_bytes(one.aggregates) for one in self._records[rank]]
        return max(sizes, default=ledger.weight_bytes_read)

    def floors(self, rank: int) -> list[FloorRow]:
        """Kernel time against its floor per kind of op over all recorded steps; largest time
        first."""
        ledger, classifier = self._ledgers[rank], self._classifiers[rank]
        kinds = [ledger.kind(op).value for op in ledger.op_ids()]
        time_ns: dict[str, int] = {}
        floor_ns: dict[str, int] = {}
        for record in self._records[rank]:
            _, floors = classifier.classify(record)
            spent = np.asarray(record.op_ends_ns) - op_starts(record)
            for kind, took, least in zip(kinds, spent.tolist(), floors.tolist(), strict=True):
                time_ns[kind] = time_ns.get(kind, 0) + took
                floor_ns[kind] = floor_ns.get(kind, 0) + least
        ordered = sorted(time_ns, key=lambda kind: -time_ns[kind])
        return [FloorRow(kind, time_ns[kind], floor_ns[kind]) for kind in ordered]

    def _match(self) -> tuple[dict[int, Collectives], tuple[str, ...]]:
        if len(self._records) == 1:
            return {}, ()
        by_step = [{record.step_id: record for record in records} for records in self._records]
        matched: dict[int, Collectives] = {}
        num_lost = 0
        for step_id in sorted(set().union(*by_step)):
            same = [steps[step_id] for steps in by_step if step_id in steps]
            found = None
            if len(same) == len(by_step):
                found = match_collectives(same, self._classifiers[0].num_met)
            if found is None:
                num_lost += 1
            else:
                matched[step_id] = found
        if not num_lost:
            return matched, ()
        are = "step is" if num_lost == 1 else "steps are"
        text = (
            f"{num_lost} {are} not on every rank's record: waiting and transfer are told apart "
            "there only where a rank stamped its own waits"
        )
        return matched, (text,)

    def _caused(self, start_ns: int, end_ns: int) -> dict[int, int]:
        """Waiting each rank caused in collectives whose last arrival lies in the window."""
        caused: dict[int, int] = {}
        for step in self._matched.values():
            arrivals = step.arrivals_ns
            if arrivals[:, -1].max() < start_ns or arrivals[:, 0].min() >= end_ns:
                continue
            inside = (arrivals >= start_ns) & (arrivals < end_ns)
            for rank in set(step.late_ranks[inside].tolist()):
                whose = inside & (step.late_ranks == rank)
                caused[rank] = caused.get(rank, 0) + int(step.waits_ns[whose].sum())
        return caused


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
