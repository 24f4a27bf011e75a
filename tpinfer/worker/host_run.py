"""Steps on a CPU: each op has run when its call returns."""

from collections.abc import Sequence
from time import perf_counter_ns

import torch

from tpinfer.layers.step_inputs import Activations, Op, StepInputs
from tpinfer.worker.annotations import Annotate
from tpinfer.worker.graphs import RecordedStep
from tpinfer.worker.timing import OpTimes, run_annotated, run_timed


class HostRun:
    """One step, with the calls of `device_run.DeviceRun`."""

    def __init__(self) -> None:
        self._times = OpTimes(0, [], None)
        self._tokens: list[int] = []
        self._waits: list[int] = []
        self.end_ns = 0

    def issue(
        self, program: Sequence[Op], acts: Activations, step: StepInputs, annotate: Annotate | None
    ) -> None:
        """Run every op and read the clock behind it."""
        if annotate is None:
            self._times = run_timed(program, acts, step)
        else:
            self._times = run_annotated(program, acts, step, annotate)

    def replay(self, recorded: RecordedStep) -> None:
        """Run a recorded step whole."""
        start_ns = perf_counter_ns()
        recorded.model()
        middle_ns = perf_counter_ns()
        recorded.greedy()
        ends = spread(start_ns, middle_ns, recorded.model_shares)
        ends += spread(middle_ns, perf_counter_ns(), recorded.greedy_shares)
        self._times = OpTimes(start_ns, ends, None)

    def replay_model(
        self, recorded: RecordedStep, program: Sequence[Op], acts: Activations, step: StepInputs
    ) -> None:
        """Run the recorded model, and the ops behind it one by one."""
        start_ns = perf_counter_ns()
        recorded.model()
        ends = spread(start_ns, perf_counter_ns(), recorded.model_shares)
        ends += run_timed(program[recorded.num_model_ops :], acts, step).ends_ns
        self._times = OpTimes(start_ns, ends, None)

    def forget_recorded(self) -> None:
        """A recording is not kept here."""

    def fetch(self, tokens: torch.Tensor, waits: torch.Tensor | None = None) -> None:
        """Read int64 [rows] tokens, and the waits that its collectives left where groups keep
        them in a tensor."""
        self._tokens, self.end_ns = tokens.tolist(), perf_counter_ns()
        self._waits = [] if waits is None else waits.tolist()

    def waits(self) -> list[int]:
        """What was fetched of them."""
        return self._waits

    def tokens(self, count: int) -> list[int]:
        """The first `count` of what was fetched."""
        return self._tokens[:count]

    def resolve(self) -> OpTimes:
        """When the ops ran."""
        return self._times


def spread(start_ns: int, end_ns: int, shares: Sequence[float]) -> list[int]:
    """Ends of ops that take those shares of a stretch of time."""
    return [start_ns + int(share * (end_ns - start_ns)) for share in shares]
