"""Steps on a GPU, issued before the ones before them have run: their tokens and times are read when
they are there."""

from collections.abc import Sequence
from time import perf_counter_ns

import torch

from tpinfer.layers.step_inputs import Activations, Op, StepInputs
from tpinfer.worker.annotations import Annotate
from tpinfer.worker.graphs import RecordedStep
from tpinfer.worker.host_run import spread
from tpinfer.worker.timing import OpFailure, OpTimes, place_on_host_clock


class DeviceClock:
    """Where a step's events lie on the host's clock. Two steps that follow each other on the device
    are tied by the time between their events; a step that found the device idle, by when it was
    issued."""

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None
        self._last_ns = 0

    def start_ns(self, first: torch.cuda.Event, issued_ns: int) -> int:
        """When a step began whose first event is `first`. Steps are asked about in order."""
        if self._last is None:
            return issued_ns
        return max(issued_ns, self._last_ns + int(self._last.elapsed_time(first) * 1e6))

    def ended(self, last: torch.cuda.Event, end_ns: int) -> None:
        """The step whose last event is `last` ended then."""
        self._last, self._last_ns = last, end_ns


class DeviceRun:
    """One step: issue it, read its tokens, then resolve its times. Used again for later steps."""

    def __init__(self, num_ops: int, max_num_rows: int, clock: DeviceClock) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(num_ops + 1)]
        self._copied = torch.cuda.Event()
        self._tokens = torch.empty(max_num_rows, dtype=torch.int64, pin_memory=True)
        self._clock = clock
        self._waits: torch.Tensor | None = None
        self._issued_ns: list[int] = []
        self._start_ns = 0
        self.end_ns = 0
        """When its last op ended; known behind `resolve`."""
        self._recorded: RecordedStep | None = None

    def issue(
        self, program: Sequence[Op], acts: Activations, step: StepInputs, annotate: Annotate | None
    ) -> None:
        """Launch every op with an event behind it. A recorder's names are in the program already:
        here ops are only issued."""
        self._begin(None)
        self._issue(program, 0, acts, step)

    def replay(self, recorded: RecordedStep) -> None:
        """Launch a recorded step whole, tokens and all."""
        self._begin(recorded)
        recorded.model()
        self._events[recorded.num_model_ops].record()
        recorded.greedy()
        self._events[-1].record()

    def replay_model(
        self, recorded: RecordedStep, program: Sequence[Op], acts: Activations, step: StepInputs
    ) -> None:
        """Launch the recorded model, and the ops behind it one by one."""
        self._begin(recorded)
        recorded.model()
        self._events[recorded.num_model_ops].record()
        self._issue(program, recorded.num_model_ops, acts, step)

    def _begin(self, recorded: RecordedStep | None) -> None:
        self._recorded = recorded
        self._issued_ns.clear()
        self._start_ns = perf_counter_ns()
        self._events[0].record()

    def _issue(
        self, program: Sequence[Op], first: int, acts: Activations, step: StepInputs
    ) -> None:
        try:
            for op, event in zip(program[first:], self._events[first + 1 :], strict=True):
                self._issued_ns.append(perf_counter_ns())
                op.call(acts, step)
                event.record()
        except Exception as error:
            raise OpFailure(first + len(self._issued_ns) - 1) from error

    def forget_recorded(self) -> None:
        """Let go of the recording that was replayed last."""
        self._recorded = None

    def fetch(self, tokens: torch.Tensor, waits: torch.Tensor | None = None) -> None:
        """Send int64 [rows] tokens to the host, behind the step, and with them the waits of its
        collectives (int64 ns), before a later step overwrites them."""
        self._tokens[: tokens.shape[0]].copy_(tokens, non_blocking=True)
        if waits is not None:
            if self._waits is None:
                self._waits = torch.empty(waits.shape[0], dtype=torch.int64, pin_memory=True)
            self._waits.copy_(waits, non_blocking=True)
        self._copied.record()

    def tokens(self, count: int) -> list[int]:
        """The first `count` of what was fetched; waits for them."""
        self._copied.synchronize()
        return self._tokens[:count].tolist()

    def waits(self) -> list[int]:
        """What was fetched of them, once the tokens were read."""
        return [] if self._waits is None else self._waits.tolist()

    def resolve(self) -> OpTimes:
        """Op times once the tokens were read, which is when all events have passed."""
        first, last = self._events[0], self._events[-1]
        start_ns = self._clock.start_ns(first, self._start_ns)
        recorded = self._recorded
        if recorded is None:
            ends = [_between_ns(first, event) for event in self._events[1:]]
            times = place_on_host_clock(start_ns, self._issued_ns, ends)
        else:
            split = recorded.num_model_ops
            middle_ns = start_ns + _between_ns(first, self._events[split])
            ends = spread(start_ns, middle_ns, recorded.model_shares)
            if self._issued_ns:
                behind = self._events[split]
                rest = [_between_ns(behind, event) for event in self._events[split + 1 :]]
                ends += place_on_host_clock(middle_ns, self._issued_ns, rest).ends_ns
            else:
                end_ns = start_ns + _between_ns(first, last)
                ends += spread(middle_ns, end_ns, recorded.greedy_shares)
            times = OpTimes(start_ns, ends, None)
        self.end_ns = times.ends_ns[-1]
        self._clock.ended(last, self.end_ns)
        return times


def _between_ns(before: torch.cuda.Event, after: torch.cuda.Event) -> int:
    return int(before.elapsed_time(after) * 1e6)
