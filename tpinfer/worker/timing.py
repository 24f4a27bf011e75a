"""When each op of a step ran, on the host's monotonic clock in ns, without a profiler.

CPU ranks read the clock after every op. GPU ranks record an event after every op (`device_run`) and
read them once the step's tokens are on the host: the step needs that wait anyway.
`time.perf_counter_ns` is CLOCK_MONOTONIC on Linux, which all ranks of a host share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter_ns

from tpinfer.collectives.group import Group
from tpinfer.layers.step_inputs import Activations, Op, OpCall, StepInputs
from tpinfer.worker.annotations import Annotate, op_name


@dataclass(frozen=True, slots=True)
class OpTimes:
    """Times of one step's ops, in program order."""

    start_ns: int
    """When the first op could start."""
    ends_ns: list[int]
    starts_ns: list[int] | None
    """None where the ops tile the time: each starts when the one before ends."""


class OpFailure(Exception):
    """An op raised; its cause says what."""

    def __init__(self, place: int) -> None:
        super().__init__(f"op {place} of the program failed")
        self.place = place
        """Its index in the program; the ops before it have run."""


def run_timed(program: Sequence[Op], acts: Activations, step: StepInputs) -> OpTimes:
    """Run the program on the CPU, reading the clock after every op (about 60 ns each)."""
    ends: list[int] = []
    mark = ends.append
    start = perf_counter_ns()
    try:
        for op in program:
            op.call(acts, step)
            mark(perf_counter_ns())
    except Exception as error:
        raise OpFailure(len(ends)) from error
    return OpTimes(start, ends, None)


def run_annotated(
    program: Sequence[Op], acts: Activations, step: StepInputs, annotate: Annotate
) -> OpTimes:
    """The same with each op named to a recorder. The clock is read inside the names, so that these
    times and the recorder's are of the same stretch: what naming costs is nobody's op."""
    starts: list[int] = []
    ends: list[int] = []
    began = perf_counter_ns()
    try:
        for op in program:
            with annotate(op_name(op.id)):
                starts.append(perf_counter_ns())
                op.call(acts, step)
                ends.append(perf_counter_ns())
    except Exception as error:
        raise OpFailure(len(ends)) from error
    return OpTimes(began, ends, starts)


class WaitStamps:
    """How long each collective of a step waited for its last peer, where the group measures that
    itself: then one rank's record tells waiting from transfer without the others'."""

    def __init__(self, program: Sequence[Op], sites: Mapping[str, Group]) -> None:
        """sites: ids of the ops that are collectives, and the group that each goes through."""
        self._stamps: list[int] = []
        self._places = [i for i, op in enumerate(program) if op.id in sites]
        self.program = [
            replace(op, call=self._stamped(op.call, sites[op.id])) if op.id in sites else op
            for op in program
        ]

    def take(self) -> dict[int, int]:
        """Op index -> ns waited, of the step that ran since the last call."""
        taken = dict(zip(self._places, self._stamps, strict=True))
        self._stamps.clear()
        return taken

    def forget(self) -> None:
        """Drop the stamps of a step that was not done."""
        self._stamps.clear()

    def _stamped(self, call: OpCall, group: Group) -> OpCall:
        stamps = self._stamps

        def run(acts: Activations, step: StepInputs) -> None:
            call(acts, step)
            stamps.append(group.last_wait_ns or 0)

        return run


class DeviceStamps:
    """The same where groups leave their waits on the device: they come with the step's tokens."""

    def __init__(self, program: Sequence[Op], sites: Mapping[str, Group], group: Group) -> None:
        """Ops that go through another group than `group` count as not measured: 0."""
        assert group.stamps is not None, "the group leaves stamps"
        self._group = group
        self._places = [i for i, op in enumerate(program) if op.id in sites]
        orders = {program[place].id: order for order, place in enumerate(self._places)}
        self.waits = group.stamps[: len(self._places)]
        """int64 on the device: one for each of the program's collectives, in its order."""
        self.program = [
            replace(op, call=self._placed(op.call, orders[op.id], sites[op.id] is group))
            if op.id in sites
            else op
            for op in program
        ]

    def named(self, waits: Sequence[int]) -> dict[int, int]:
        """Op index -> ns waited, from what the host got of `waits`."""
        return dict(zip(self._places, waits, strict=True))

    def _placed(self, call: OpCall, order: int, stamps: bool) -> OpCall:
        group, place = self._group, self._group.stamps
        assert place is not None, "the group leaves stamps"

        def run(acts: Activations, step: StepInputs) -> None:
            group.num_stamped = order
            call(acts, step)
            if not stamps or group.num_stamped == order:  # it called nobody, or another group
                place[order : order + 1].zero_()

        return run


def place_on_host_clock(
    start_ns: int, issued_ns: Sequence[int], elapsed_ns: Sequence[int]
) -> OpTimes:
    """Device end times (ns since the step's first event) and host issue times as one axis.

    An op cannot start before the host issued it nor before its predecessor ended; what lies
    between the two is time in which the device waited for the host.
    """
    starts, ends, last = [], [], start_ns
    for issued, elapsed in zip(issued_ns, elapsed_ns, strict=True):
        end = max(start_ns + elapsed, last)
        starts.append(min(max(last, issued), end))
        ends.append(end)
        last = end
    return OpTimes(start_ns, ends, starts)
