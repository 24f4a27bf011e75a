"""Executes the programs of all ranks together and says when everything happened, in true time.

Streams run in order; a row starts when its launch has reached the device, its predecessor is done
and the events its stream waits for have come. A collective is a barrier: all ranks leave it one
transfer after the last one came. Nothing here is preempted, so every time follows from times that
are known before it, in whatever order ranks are looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from tests.traces.kernels import DeviceWork
from tests.traces.program import (
    Action,
    Await,
    Busy,
    Launch,
    Mark,
    Pop,
    ProgramBuilder,
    Publish,
    Push,
    Receive,
    Record,
    Synchronize,
    SynchronizeEvent,
)
from tests.traces.scenario import Clock, Damage, Scenario

START_NS = 5_000_000
"""True time at which the ranks begin."""
EVENT_CALL_NS, WAKE_NS, MESSAGE_NS = 800, 1500, 6000


@dataclass(eq=False)
class HostCall:
    """One runtime call. `kind`: `launch`, `graph`, `copy`, `record`, `wait`, `synchronize`."""

    kind: str
    start_ns: int
    end_ns: int
    stream: int
    correlation: int
    step: int
    event: int = 0
    """Number of the event it records or waits for."""


@dataclass(eq=False)
class DeviceRow:
    """One row of a stream."""

    work: DeviceWork
    call: HostCall
    ready_ns: int
    step: int
    """Step it was launched in."""
    rank: int
    meeting: int = -1
    """Number of the collective; -1 for anything else."""
    node: int = -1
    """Place in its graph; -1 outside graphs."""
    after: "list[DeviceRow]" = field(default_factory=list)
    """Rows of other streams whose events it waits for."""
    start_ns: int = -1
    arrival_ns: int = -1
    """When it could really begin: behind its start where it was launched ahead of its inputs."""
    end_ns: int = -1
    """-1 until it is known."""
    damage: Damage | None = None

    @property
    def is_known(self) -> bool:
        """Whether its times have been found."""
        return self.end_ns >= 0


@dataclass(eq=False)
class HostRange:
    """A range on the host thread."""

    kind: str
    label: str
    start_ns: int
    step: int
    depth: int
    work: DeviceWork | None = None
    end_ns: int = -1
    call: HostCall | None = None
    """The launch inside an `operator`."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A mark on the host thread of rank 0."""

    kind: str
    index: int
    at_ns: int


@dataclass(eq=False)
class Meeting:
    """One collective as it was: the row of every rank, in rank order."""

    number: int
    """Counts the collectives of the group: `Seq`."""
    ranks: list[int]
    rows: list[DeviceRow]
    arrival_ns: int = -1
    """Of the last rank."""


@dataclass(eq=False)
class RankRun:
    """What one rank did, in true time."""

    rank: int
    clock: Clock
    rows: list[DeviceRow] = field(default_factory=list)
    """In order of launch."""
    calls: list[HostCall] = field(default_factory=list)
    ranges: list[HostRange] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)

    def steps(self) -> list[HostRange]:
        """Step ranges in order."""
        return [one for one in self.ranges if one.kind == "step"]


@dataclass(eq=False)
class Run:
    """What all ranks did."""

    scenario: Scenario
    ranks: list[RankRun]
    meetings: list[Meeting]


class _Rank:
    """One rank while it executes."""

    def __init__(
        self, scenario: Scenario, rank: int, correlation: int, actions: list[Action]
    ) -> None:
        self.run = RankRun(rank, scenario.clock(rank))
        self.scenario = scenario
        self.now_ns = START_NS
        self.next_action = 0
        self.actions = actions
        self.step = -1
        self.open: list[HostRange] = []
        self.streams: dict[int, list[DeviceRow]] = {}
        self.num_known: dict[int, int] = {}
        self.events: dict[str, tuple[int, DeviceRow | None]] = {}
        self.waiting: dict[int, list[DeviceRow]] = {}
        self.num_meetings = 0
        self._correlation = correlation
        self._num_events = 0

    def call(self, kind: str, duration_ns: int, stream: int, event: int = 0) -> HostCall:
        """The host makes a runtime call."""
        self._correlation += 1
        made = HostCall(
            kind,
            self.now_ns,
            self.now_ns + duration_ns,
            stream,
            self._correlation,
            self.step,
            event,
        )
        self.run.calls.append(made)
        self.now_ns = made.end_ns
        return made

    def launch(self, action: Launch) -> None:
        """Rows go to their streams."""
        first = action.work[0]
        kind = "graph" if action.is_graph else "copy" if first.is_copy else "launch"
        began_ns = self.now_ns
        made = self.call(kind, action.call_ns, first.stream)
        for one in self.open:
            if one.kind == "operator":
                one.call = made
        for index, work in enumerate(action.work):
            row = DeviceRow(
                work,
                made,
                began_ns + action.ready_ns,
                self.step,
                self.run.rank,
                node=index if action.is_graph else -1,
                after=self.waiting.pop(work.stream, []),
            )
            if work.collective:
                row.meeting = self.num_meetings
                self.num_meetings += 1
            self.streams.setdefault(work.stream, []).append(row)
            self.run.rows.append(row)

    def record(self, action: Record) -> None:
        """The event stands for the last row now on the stream."""
        self._num_events += 1
        self.call("record", EVENT_CALL_NS, action.stream, self._num_events)
        rows = self.streams.get(action.stream, [])
        self.events[action.event] = (self._num_events, rows[-1] if rows else None)

    def wait(self, action: Await) -> None:
        """The next row of the stream waits for the event."""
        number, row = self.events[action.event]
        self.call("wait", EVENT_CALL_NS, action.stream, number)
        if row is not None:
            self.waiting.setdefault(action.stream, []).append(row)

    def wake(self, row: DeviceRow) -> None:
        """The host has waited for a row."""
        until = max(self.now_ns + 900, row.end_ns + WAKE_NS)
        self.call("synchronize", until - self.now_ns, row.work.stream)

    def push(self, action: Push) -> None:
        """A range begins."""
        if action.kind == "step":
            self.step = int(action.label.split()[0])
        opened = HostRange(
            action.kind, action.label, self.now_ns, self.step, len(self.open), action.work
        )
        self.open.append(opened)
        self.run.ranges.append(opened)


class Simulator:
    """Runs a scenario."""

    def __init__(self, scenario: Scenario, programs: Sequence[list[Action]]) -> None:
        self.scenario = scenario
        # Equal correlation ids on all ranks: one Nsight file must not mix them up.
        self.ranks = [_Rank(scenario, rank, 1000, made) for rank, made in enumerate(programs)]
        self.published: dict[int, int] = {}
        self.meetings: dict[tuple[int, int], Meeting] = {}

    def run(self) -> Run:
        """Everything that happens. Raises RuntimeError where ranks wait for each other."""
        while any(rank.next_action < len(rank.actions) for rank in self.ranks):
            moved = [self._advance_host(r) | self._advance_streams(r) for r in self.ranks]
            if not any(moved):
                raise RuntimeError(f"{self.scenario.name}: ranks wait for each other for ever")
        while any([self._advance_streams(rank) for rank in self.ranks]):
            continue
        self._shift()
        self._damage()
        met = [self.meetings[place] for place in sorted(self.meetings)]
        return Run(self.scenario, [rank.run for rank in self.ranks], met)

    def _advance_host(self, rank: _Rank) -> bool:
        began = rank.next_action
        while rank.next_action < len(rank.actions):
            if not self._execute(rank, rank.actions[rank.next_action]):
                break
            rank.next_action += 1
        return rank.next_action > began

    def _execute(self, rank: _Rank, action: Action) -> bool:
        """False where the action has to wait for something not known yet."""
        match action:
            case Busy(ns):
                rank.now_ns += ns
            case Push():
                rank.push(action)
            case Pop():
                rank.open.pop().end_ns = rank.now_ns
            case Mark(kind, index):
                rank.run.moments.append(Moment(kind, index, rank.now_ns))
            case Launch():
                rank.launch(action)
            case Record():
                rank.record(action)
            case Await():
                rank.wait(action)
            case Publish(step):
                self.published[step] = rank.now_ns
            case Receive(step):
                if step not in self.published:
                    return False
                rank.now_ns = max(rank.now_ns + 1000, self.published[step] + MESSAGE_NS)
            case Synchronize(stream):
                last = rank.streams[stream][-1]
                if not last.is_known:
                    return False
                rank.wake(last)
            case SynchronizeEvent(event):
                row = rank.events[event][1]
                if row is None or not row.is_known:
                    return False
                rank.wake(row)
        return True

    def _advance_streams(self, rank: _Rank) -> bool:
        moved = False
        for stream, rows in rank.streams.items():
            while rank.num_known.get(stream, 0) < len(rows):
                place = rank.num_known.get(stream, 0)
                row = rows[place]
                if not row.is_known:
                    self._start(row, rows[place - 1] if place else None)
                if not row.is_known:
                    break
                rank.num_known[stream] = place + 1
                moved = True
        return moved

    def _start(self, row: DeviceRow, before: DeviceRow | None) -> None:
        """Give a row its times where everything before it is known. The row of a collective stays
        without an end until the last rank has come."""
        if row.start_ns >= 0 or not all(one.is_known for one in row.after):
            return
        work = row.work
        free_ns = before.end_ns if before else 0
        events_ns = [one.end_ns + self.scenario.event_latency_ns for one in row.after]
        starts = [row.ready_ns, free_ns + work.gap_ns - work.overlap_ns, *events_ns]
        row.start_ns = max(starts) + work.late_ns
        row.arrival_ns = max(row.start_ns, free_ns)
        if not work.collective:
            row.end_ns = row.arrival_ns + work.duration_ns
            return
        group = self.scenario.group(row.rank)
        meeting = self.meetings.setdefault((group[0], row.meeting), Meeting(row.meeting, group, []))
        meeting.rows.append(row)
        if len(meeting.rows) == len(group):
            self._leave(meeting)

    def _leave(self, meeting: Meeting) -> None:
        """All have come: put rows in rank order and let everybody go."""
        meeting.rows.sort(key=lambda row: row.rank)
        meeting.arrival_ns = max(row.arrival_ns for row in meeting.rows)
        root = meeting.rows[0].arrival_ns
        jitters = Random(f"exits {self.scenario.seed} {meeting.ranks} {meeting.number}")
        for row in meeting.rows:
            begun = meeting.arrival_ns
            if row.work.collective == "broadcast":
                begun = max(root, row.arrival_ns)
            jitter = jitters.randint(0, self.scenario.exit_jitter_ns)
            row.end_ns = begun + row.work.duration_ns + jitter

    def _shift(self) -> None:
        """From here on times are what the recorder says, right or wrong."""
        shift = self.scenario.device_shift_ns
        for row in (row for rank in self.ranks for row in rank.run.rows):
            row.start_ns += shift
            row.arrival_ns += shift
            row.end_ns += shift
        for meeting in self.meetings.values():
            meeting.arrival_ns += shift

    def _damage(self) -> None:
        for damage in self.scenario.damages:
            rows = [r for r in self.ranks[damage.rank].run.rows if r.step == damage.step]
            until = damage.first + damage.count if damage.count else len(rows)
            if not rows[damage.first : until]:
                raise ValueError(f"{self.scenario.name}: {damage} hits no row")
            for row in rows[damage.first : until]:
                row.damage = damage


def simulate(scenario: Scenario, programs: Sequence[list[Action]] | None = None) -> Run:
    """The run of a scenario: the same every time. `programs`, one a rank, replace those that
    follow from the scenario."""
    if programs is None:
        ranks = range(scenario.num_ranks)
        programs = [ProgramBuilder(scenario, rank).build() for rank in ranks]
    return Simulator(scenario, programs).run()
