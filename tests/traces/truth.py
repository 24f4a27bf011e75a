"""What is true of a simulated run: every ns of a window by leaf, every collective's wait and
transfer.

Written from the specification, with no thought for speed: each piece between two boundaries is
judged by looking at everything that happened. All times are in the clock of the rank they belong
to, since that is what its recorder writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from tests.traces.simulate import DeviceRow, Meeting, RankRun, Run

MODELLED = ("compute", "memory", "latency")


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a reader of the recording can know, and the numbers the specification leaves open."""

    has_shapes: bool = True
    """Whether operators carry shapes; without them no kernel has a cost model."""
    has_calls: bool = True
    """Whether launches were recorded; without them nobody knows why a device was idle."""
    present: tuple[int, ...] | None = None
    """Ranks whose files are there; None for all. Collectives of the others cannot be split."""
    launch_floor_ns: int = 5000
    """How long behind a launch call a device may idle before something must explain it."""
    graph_floor_ns: int = 10_000
    """The same behind the launch of a graph."""

    def floor_ns(self, row: DeviceRow) -> int:
        """Of the call that launched a row."""
        return self.graph_floor_ns if row.node >= 0 else self.launch_floor_ns


@dataclass(frozen=True, slots=True)
class SplitTruth:
    """A stretch of one rank's time."""

    wall_ns: int
    leaves: dict[str, int]
    comm_hidden_ns: int
    host_parts: dict[str, int]
    """Of the leaf `host`; `python` where no range of the host tells more."""


@dataclass(frozen=True, slots=True)
class CollectiveTruth:
    """One collective. Lists have one entry for each of `ranks`."""

    number: int
    ranks: list[int]
    op: str
    num_bytes: int
    step: int
    wait_ns: list[int]
    transfer_ns: list[int]
    last_rank: int
    margin_ns: int
    """How long before the last rank the last but one came."""


@dataclass
class _Span:
    """A device row as its recorder saw it."""

    row: DeviceRow
    start: int
    end: int
    arrival: int
    """Of the last rank; of interest for collectives only."""
    call_start: int
    call_end: int


@dataclass
class _Sums:
    leaves: dict[str, int] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    hidden: int = 0

    def add(self, leaf: str, ns: int) -> None:
        self.leaves[leaf] = self.leaves.get(leaf, 0) + ns


class Truth:
    """Answers for one run."""

    def __init__(self, run: Run, knowledge: Knowledge | None = None) -> None:
        self.run = run
        self.known = knowledge or Knowledge()
        self._arrivals = {(r, m.number): m.arrival_ns for m in run.meetings for r in m.ranks}
        self._spans = [self._seen(rank) for rank in run.ranks]

    def _seen(self, rank: RankRun) -> list[_Span]:
        """Rows that the recorder did not lose or spoil, by start."""
        local = rank.clock.local
        spans = [
            _Span(
                row,
                local(row.start_ns),
                local(row.end_ns),
                local(self._arrivals.get((row.rank, row.meeting), 0)),
                local(row.call.start_ns),
                local(row.call.end_ns),
            )
            for row in rank.rows
            if row.damage is None
        ]
        return sorted(spans, key=lambda span: span.start)

    def steps(self, rank: int) -> list[tuple[int, int]]:
        """(start, end) of each step's annotation on the rank's clock."""
        run = self.run.ranks[rank]
        return [(run.clock.local(s.start_ns), run.clock.local(s.end_ns)) for s in run.steps()]

    def whole(self, rank: int) -> tuple[int, int]:
        """First step's start to last step's end."""
        steps = self.steps(rank)
        return steps[0][0], steps[-1][1]

    def ttft(self) -> tuple[int, int, int]:
        """True times of the request: accepted, admitted, first token."""
        moments = {(m.kind, m.index): m.at_ns for m in self.run.ranks[0].moments}
        return moments["accept", 0], moments["admit", 0], moments["token", 0]

    def itl(self) -> list[tuple[int, int]]:
        """True times from token to token."""
        tokens = [m.at_ns for m in self.run.ranks[0].moments if m.kind == "token"]
        return list(pairwise(tokens))

    def on_clock(self, rank: int, *true_ns: int) -> tuple[int, ...]:
        """True times as the rank's clock shows them."""
        return tuple(self.run.ranks[rank].clock.local(at) for at in true_ns)

    def split(self, rank: int, start: int, end: int, queued_until: int | None = None) -> SplitTruth:
        """The window [start, end) of the rank's clock; the part before `queued_until` is
        `queue`."""
        spans, sums = self._spans[rank], _Sums()
        begun = start if queued_until is None else max(start, queued_until)
        if begun > start:
            sums.add("queue", begun - start)
        cuts = self._cuts(rank, begun, end)
        near = [s for s in spans if s.start < end and s.end > begun]
        for piece_start, piece_end in pairwise(cuts):
            active = [s for s in near if s.start <= piece_start < s.end]
            if active:
                self._busy(sums, active, piece_start, piece_end - piece_start)
            else:
                self._idle(sums, rank, (piece_start, piece_end), end)
        return SplitTruth(end - start, sums.leaves, sums.hidden, sums.parts)

    def _cuts(self, rank: int, start: int, end: int) -> list[int]:
        """Every moment at which something may change."""
        local = self.run.ranks[rank].clock.local
        cuts = {start, end}
        for span in self._spans[rank]:
            cuts |= {span.start, span.end, span.arrival, span.call_start, span.call_end}
            for floor in (self.known.launch_floor_ns, self.known.graph_floor_ns):
                cuts |= {span.end + floor, span.call_end + floor}
        for one in self.run.ranks[rank].ranges:
            cuts |= {local(one.start_ns), local(one.end_ns)}
        return sorted(cut for cut in cuts if start <= cut <= end)

    def _busy(self, sums: _Sums, active: Sequence[_Span], at: int, ns: int) -> None:
        """Something runs on the device."""
        owners: dict[int, _Span] = {}
        for span in active:
            owners.setdefault(span.row.work.stream, span)
        running = sorted(owners.values(), key=lambda span: span.start)
        comms = [s for s in running if s.row.work.collective]
        kernels = [s for s in running if not s.row.work.collective and not s.row.work.is_copy]
        if kernels:
            leaf = kernels[0].row.work.leaf
            if leaf in MODELLED and not self.known.has_shapes:
                leaf = "unmodelled"
            sums.add(leaf, ns)
            sums.hidden += ns if comms else 0
        elif comms:
            sums.add(self._comm_leaf(comms[0], at), ns)
        else:
            sums.add("copy", ns)

    def _comm_leaf(self, span: _Span, at: int) -> str:
        present, group = self.known.present, self.run.scenario.group(span.row.rank)
        missing = present is not None and not set(group) <= set(present)
        if missing or span.row.work.collective == "broadcast":
            return "comm_unsplit"
        return "comm_wait" if at < span.arrival else span.row.work.leaf

    def _idle(self, sums: _Sums, rank: int, piece: tuple[int, int], window_end: int) -> None:
        """Nothing runs on the device: the next row says why."""
        at, ns = piece[0], piece[1] - piece[0]
        if self._is_damaged(rank, at):
            sums.add("unrecorded", ns)
            return
        spans = self._spans[rank]
        coming = next((s for s in spans if s.start > at), None)
        if coming is None or coming.start >= window_end:
            sums.add("host_tail", ns)
            return
        past = [s for s in spans if s.start <= at]
        if not self.known.has_calls:
            sums.add("idle_unexplained", ns)
            return
        if any(s.row.call is coming.row.call for s in past):
            sums.add("graph_gap", ns)
            return
        if at < coming.call_start:
            sums.add("host", ns)
            part = self._part(rank, at)
            sums.parts[part] = sums.parts.get(part, 0) + ns
            return
        idle_since = max((s.end for s in past), default=coming.call_end)
        launched = max(coming.call_end, idle_since)
        if at < launched + self.known.floor_ns(coming.row):
            sums.add("launch_latency", ns)
        else:
            sums.add("dependency_wait" if coming.row.after else "idle_unexplained", ns)

    def _is_damaged(self, rank: int, at: int) -> bool:
        """Whether the recorder lost or spoilt rows of the step at that moment."""
        hit = {damage.step for damage in self.run.scenario.damages if damage.rank == rank}
        return any(s <= at < e for i, (s, e) in enumerate(self.steps(rank)) if i in hit)

    def _part(self, rank: int, at: int) -> str:
        run = self.run.ranks[rank]
        around = [
            one
            for one in run.ranges
            if run.clock.local(one.start_ns) <= at < run.clock.local(one.end_ns)
        ]
        parts = [one.label for one in around if one.kind == "host"]
        return parts[-1] if parts else "python"

    def collectives(self) -> list[CollectiveTruth]:
        """Those in which all wait for all, by group and number. Waits and transfers are in each
        rank's own ns."""
        barriers = [m for m in self.run.meetings if m.rows[0].work.collective != "broadcast"]
        return [self._collective(meeting) for meeting in barriers]

    def _collective(self, meeting: Meeting) -> CollectiveTruth:
        waits, transfers = [], []
        for row in meeting.rows:
            came, last, left = self.on_clock(
                row.rank, row.arrival_ns, meeting.arrival_ns, row.end_ns
            )
            waits.append(last - came)
            transfers.append(left - last)
        arrivals = [row.arrival_ns for row in meeting.rows]
        ordered = sorted(arrivals)
        work = meeting.rows[0].work
        return CollectiveTruth(
            meeting.number,
            meeting.ranks,
            work.collective,
            work.num_bytes,
            meeting.rows[0].step,
            waits,
            transfers,
            meeting.ranks[arrivals.index(ordered[-1])],
            ordered[-1] - ordered[-2],
        )


def truth_of(run: Run, **known: object) -> Truth:
    """The truth, for a reader who knows what `Knowledge` says."""
    return Truth(run, replace(Knowledge(), **known))  # type: ignore[arg-type]
