"""Planning and running in turns: while a step runs, the next ones are planned, up to a depth.

Depth 1 is the plain loop: plan, run, take the tokens. At depth n up to n steps are on their way at
once; plans then stand on what is certain and leave to the ranks what only they know yet: which
tokens were drawn. Does not know what tokens mean.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter_ns

from tpinfer.config.errors import RankError
from tpinfer.engine.executor import Executor, Pending
from tpinfer.scheduling.draft import Scheduled
from tpinfer.scheduling.request import Sequence
from tpinfer.scheduling.scheduler import Scheduler
from tpinfer.steps.logprobs import TokenLogprobs
from tpinfer.worker.host_spans import HostSpans
from tpinfer.worker.worker import StepResult

MayPlan = Callable[[int, int], bool]
"""(steps handed over so far, those of them on their way) -> whether the next may be planned now."""

_REMEMBERED = 16
"""Steps whose results were taken that a rank on another host may still say it could not do."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """A step whose result is known."""

    scheduled: Scheduled
    drawn: list[tuple[Sequence, int]]
    """Each live sequence that drew a token, in step order; -1 where it ended by an error."""
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """Of drawn tokens, by sequence id, where asked for."""
    prompt_logprobs: list[tuple[Sequence, int, list[TokenLogprobs]]] = field(default_factory=list)
    """(sequence, position of the first, those of its prompt tokens from there)."""
    failure: str | None = None
    """Why the step failed, or one shortly before it."""
    failed: tuple[Sequence, ...] = ()
    """The sequences that this ended."""


class StepLoop:
    """Steps of rank 0, in order."""

    def __init__(
        self, scheduler: Scheduler, executor: Executor, spans: HostSpans, depth: int
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._spans = spans
        self._depth = depth
        self._in_flight: deque[tuple[Scheduled, Pending]] = deque()
        self._taken: deque[Scheduled] = deque(maxlen=_REMEMBERED)
        self.num_sent = 0
        """Steps handed over since the loop was made."""

    @property
    def has_work(self) -> bool:
        """Whether a sequence is unfinished or a step on its way."""
        return bool(self._in_flight) or self._scheduler.has_work

    @property
    def num_in_flight(self) -> int:
        """Steps handed over whose result was not taken yet."""
        return len(self._in_flight)

    def step(self, may_plan: MayPlan | None = None) -> StepOutcome | None:
        """Keep `depth` steps on their way, then take the oldest's result. None where nothing
        runs.

        `may_plan` is asked before each plan is made; with nothing on its way it must agree.
        """
        try:
            while len(self._in_flight) < self._depth:
                if may_plan is not None and not may_plan(self.num_sent, len(self._in_flight)):
                    break
                if not self._send_next():
                    break
            return self._take_oldest() if self._in_flight else None
        except BaseException as error:
            self._give_up(error)
            raise

    def drain(self) -> list[StepOutcome]:
        """Take the result of every step on its way."""
        outcomes = []
        try:
            while self._in_flight:
                outcomes.append(self._take_oldest())
        except BaseException as error:
            self._give_up(error)
            raise
        return outcomes

    def forget(self) -> None:
        """The program is being ended: nobody takes what is on its way."""
        self._in_flight.clear()

    def _give_up(self, error: BaseException) -> None:
        """A step broke off, and those behind it tell nothing any more. Raises a rank's error as
        that rank tells it."""
        self.forget()
        if isinstance(error, RankError):
            raise self._executor.explain(error) from error

    def _send_next(self) -> bool:
        with self._spans.part("schedule"):
            scheduled = self._scheduler.schedule(perf_counter_ns())
        if scheduled is None:
            return False
        for sequence in scheduled.admitted:
            self._spans.mark(f"tpinfer.admit request={sequence.index}")
        pending = self._executor.submit(scheduled.records, scheduled.plan)
        self._in_flight.append((scheduled, pending))
        self.num_sent += 1
        return True

    def _take_oldest(self) -> StepOutcome:
        scheduled, pending = self._in_flight.popleft()
        result = pending.result()
        now_ns = perf_counter_ns()
        failure = self._executor.failure(scheduled.plan, result)
        with self._spans.part("schedule"):
            late, failed = self._end_late(scheduled.plan.step_id)
            self._taken.append(scheduled)
            if failure is not None:
                failed += self._scheduler.fail(scheduled)
                return StepOutcome(scheduled, [], failure=failure, failed=failed)
            drawn = self._scheduler.commit(scheduled, result.tokens, now_ns)
        return StepOutcome(scheduled, drawn, *_logprobs(scheduled, result), late, failed)

    def _end_late(self, step_id: int) -> tuple[str | None, tuple[Sequence, ...]]:
        """Steps before this one that only now are known to have failed: why, and the sequences that
        are ended since what was computed for them is damaged."""
        late = self._executor.late_failures(step_id)
        if not late:
            return None, ()
        sequences = [s for one in self._taken if one.plan.step_id in late for s in one.sequences]
        ended = tuple([one for one in sequences if self._scheduler.finish(one, "error")])
        return next(iter(late.values())), ended


def _logprobs(
    scheduled: Scheduled, result: StepResult
) -> tuple[dict[int, TokenLogprobs], list[tuple[Sequence, int, list[TokenLogprobs]]]]:
    """A step's log-probabilities by whose they are."""
    if not result.logprobs and not result.prompt_logprobs:
        return {}, []
    plan = scheduled.plan
    drawing = [s for s, n in zip(scheduled.sequences, plan.num_samples, strict=True) if n]
    by_id = {s.id: one for s, one in zip(drawing, result.logprobs, strict=False) if one}
    by_row = dict(zip(plan.rows, scheduled.sequences, strict=True))
    prompts = [(by_row[row], first, list(found)) for row, first, found in result.prompt_logprobs]
    return by_id, prompts
