"""What requests live through: the runtime's own scheduler on a modelled clock.

One engine serves one stream of equal requests. Each step takes what the step model says of its
sums; the scheduler decides, as in a run, who is in it. A step is planned when the one before it is
over (`steps_in_flight=1`). Nothing is measured here, and nothing is drawn but the arrivals.
"""

import random
from collections import deque
from dataclasses import dataclass, field, replace

from tpinfer.costs.ops import StepAggregates
from tpinfer.costs.step_time import StepSums
from tpinfer.planner.split import Split
from tpinfer.planner.steady_state import StepPrices
from tpinfer.planner.workload import Workload
from tpinfer.scheduling.draft import Scheduled
from tpinfer.scheduling.limits import SchedulerLimits
from tpinfer.scheduling.request import Sequence
from tpinfer.scheduling.scheduler import Scheduler

ROUNDS = 4
"""Times that the requests in flight are replaced, where nobody asks for more."""
_FEWEST, _POISSON_REQUESTS = 8, 400
_TOKEN = 1
_SEEDS_APART = 7919
"""Between the arrivals of two batches: a prime, so that --seed 1 is not the second of --seed 0."""


@dataclass(slots=True)
class RequestTimes:
    """One request's life, in seconds on the modelled clock."""

    arrived_s: float
    started_s: float = -1.0
    """When its first step began."""
    first_step: int = -1
    first_token_step: int = -1
    first_token_s: float = -1.0
    last_step: int = -1
    ended_s: float = -1.0
    num_preemptions: int = 0


@dataclass(slots=True)
class Run:
    """What a simulation found."""

    workload: Workload
    requests: list[RequestTimes]
    """In the order of arrival."""
    ends_s: list[float] = field(default_factory=list)
    """When each step ended."""
    splits: list[Split] = field(default_factory=list)
    """Of each step."""
    tokens: list[int] = field(default_factory=list)
    """Drawn by each step."""
    num_running: list[int] = field(default_factory=list)
    """Requests with a row, in each step."""
    short_of_kv: list[bool] = field(default_factory=list)
    """Whether requests waited for blocks in each step."""
    short_of_rows: list[bool] = field(default_factory=list)
    """Whether they waited because all rows were taken."""


def simulate(
    prices: StepPrices,
    limits: SchedulerLimits,
    workload: Workload,
    num_requests: int | None = None,
    window: int | None = None,
    scale: float = 1.0,
) -> Run:
    """Serve `num_requests` (None: enough to settle) requests to the end.

    `window` is the sliding window of the layers that slide; `scale` stretches every step. Raises
    ConfigError for a request that could never run.
    """
    return simulate_stages(prices, limits, workload, 1, num_requests, window, scale)[0]


def simulate_stages(
    prices: StepPrices,
    limits: SchedulerLimits,
    workload: Workload,
    num_stages: int,
    num_requests: int | None = None,
    window: int | None = None,
    scale: float = 1.0,
) -> tuple[Run, ...]:
    """The same of a pipeline: as many batches as stages follow each other through it, each with a
    scheduler, `limits`, a `workload` and `num_requests` of its own.

    A step spends an equal part of its time in each stage, and waits for a stage until the batch
    before it has left it: a long step holds up all behind it.
    """
    count, pipe = num_requests or settled_requests(workload), [0.0] * num_stages
    lanes = []
    for place in range(num_stages):
        own = replace(workload, seed=workload.seed + _SEEDS_APART * place)
        engine = _Engine(prices, Scheduler(limits), Run(own, []), window, scale, pipe)
        lanes.append(_Lane(engine, own, count))
    at_work = list(lanes)
    while at_work:
        first = min(at_work, key=_lane_clock) if num_stages > 1 else at_work[0]
        if not first.advance():
            at_work.remove(first)
    for lane in lanes:
        lane.engine.scheduler.check_idle()
    return tuple(lane.engine.run for lane in lanes)


def settled_requests(workload: Workload) -> int:
    """Requests after which a mean stands still."""
    if workload.concurrency is None:
        return _POISSON_REQUESTS
    return max(_FEWEST, ROUNDS * workload.concurrency)


def _arrivals(workload: Workload, count: int) -> list[float]:
    """When requests come; in a closed loop, those of the beginning."""
    if workload.concurrency is not None:
        return [0.0] * min(workload.concurrency, count)
    assert workload.rate is not None, "a workload is one or the other"
    draws, now, found = random.Random(workload.seed), 0.0, []
    for _ in range(count):
        now += draws.expovariate(workload.rate)
        found.append(now)
    return found


class _Lane:
    """One batch and the requests that come to it."""

    def __init__(self, engine: "_Engine", workload: Workload, count: int) -> None:
        self.engine = engine
        self._count = count
        self._is_closed = workload.concurrency is not None
        self._coming = deque(_arrivals(workload, count))
        self._later = count - len(self._coming)

    def advance(self) -> bool:
        """One step, or on to the next arrival; False once all were served."""
        engine, coming = self.engine, self._coming
        while coming and coming[0] <= engine.now_s:
            engine.add(coming.popleft())
        ended = engine.step()
        if ended is None:
            engine.now_s = coming[0]
        elif self._is_closed and ended:
            again = min(ended, self._later)
            coming.extend([engine.now_s] * again)
            self._later -= again
        return engine.num_ended < self._count


def _lane_clock(lane: _Lane) -> float:
    return lane.engine.now_s


class _Engine:
    """Scheduler and clock."""

    def __init__(
        self,
        prices: StepPrices,
        scheduler: Scheduler,
        run: Run,
        window: int | None,
        scale: float,
        pipe: list[float],
    ) -> None:
        """`pipe`: when each stage of the pipeline is free again, shared by its batches."""
        self.run = run
        self.scheduler = scheduler
        self.now_s = 0.0
        self.num_ended = 0
        self._prices = prices
        self._pipe = pipe
        self._window = window
        self._scale = scale
        self._shared = run.workload.num_cached(scheduler.limits.block_size)

    def add(self, arrived_s: float) -> None:
        """A request has come."""
        run = self.run
        index = len(run.requests)
        run.requests.append(RequestTimes(arrived_s))
        own = run.workload.input_len - self._shared
        prompt = (0,) * self._shared + (index + 1,) * own
        sequence = Sequence(
            index, prompt, run.workload.output_len, frozenset(), round(arrived_s * 1e9)
        )
        self.scheduler.add(sequence)

    def step(self) -> int | None:
        """One step; returns how many requests ended with it, None where there was none to make."""
        run, scheduler = self.run, self.scheduler
        scheduled = scheduler.schedule(round(self.now_s * 1e9) + 1)
        if scheduled is None:
            return None
        self._note_waiting(scheduled)
        number = len(run.ends_s)
        for sequence in scheduled.admitted:
            times = run.requests[sequence.index]
            if times.first_step < 0:
                times.first_step, times.started_s = number, self.now_s
        split = self._prices.step(_sums(scheduled, self._window))
        if self._scale != 1.0:
            split = split * self._scale
        took = split.total
        if len(self._pipe) > 1:
            waited = max(0.0, self._pass(took) - self.now_s - took)
            split += Split(communication=waited)
            took += waited
        self.now_s += took
        run.ends_s.append(self.now_s)
        run.splits.append(split)
        return self._commit(scheduled, number)

    def _pass(self, took: float) -> float:
        """When a step that begins now, alone, leaves the last stage."""
        pipe, now, part = self._pipe, self.now_s, took / len(self._pipe)
        for stage, free_s in enumerate(pipe):
            now = pipe[stage] = max(now, free_s) + part
        return now

    def _commit(self, scheduled: Scheduled, number: int) -> int:
        run, now = self.run, self.now_s
        first = scheduled.num_decodes
        drawn = first + sum(scheduled.plan.num_samples[first:])
        run.tokens.append(drawn)
        news = self.scheduler.commit(scheduled, [_TOKEN] * drawn, round(now * 1e9))
        # The last token of a prompt may be computed by itself, as decodes are.
        for sequence in [one for one, _ in news if len(one.token_ids) == 1]:
            times = run.requests[sequence.index]
            times.first_token_step, times.first_token_s = number, now
        ended = [sequence for sequence, _ in news if sequence.finish_reason is not None]
        for sequence in ended:
            times = run.requests[sequence.index]
            times.last_step, times.ended_s = number, now
            times.num_preemptions = sequence.num_preemptions
        self.num_ended += len(ended)
        return len(ended)

    def _note_waiting(self, scheduled: Scheduled) -> None:
        run, limits = self.run, self.scheduler.limits
        running = self.scheduler.num_running
        run.num_running.append(running)
        waits = self.scheduler.num_waiting > 0
        rows = waits and running >= limits.max_num_seqs
        room = limits.max_num_batched_tokens - sum(scheduled.plan.num_tokens)
        run.short_of_rows.append(rows)
        run.short_of_kv.append(waits and not rows and room > 0)


def _sums(scheduled: Scheduled, window: int | None) -> StepAggregates:
    """What the step's costs depend on; every token is drawn greedily."""
    sums, first = StepSums(window), scheduled.num_decodes
    sequences, plan = scheduled.sequences, scheduled.plan
    if first:
        sums.add_decodes([one.num_planned for one in sequences[:first]], 0)
    for place in range(first, len(sequences)):
        sums.add(plan.num_tokens[place], sequences[place].num_planned, plan.num_samples[place], 0)
    return StepAggregates(
        sums.tokens, sums.rows, sums.full_rows, sums.sk, sums.sqsk, sums.sqsq, sums.sk_window,
        sums.pairs_window,
    )  # fmt: skip
