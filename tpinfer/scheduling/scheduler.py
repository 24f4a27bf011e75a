"""Which sequences run in the next step: decodes together with chunks of prompts.

Who goes first is one order for everything: rows, blocks, prompt tokens (see `waiting`). The first
unfinished sequence in that order is never preempted and has a place in every step, so however
small the cache is, somebody comes to an end.

Steps may be planned before earlier ones are committed. Ranks run plans in order, so blocks and
rows can be given on as soon as no *later* plan needs them, and a plan's rows are told by sequence,
not by number, when it is committed.
"""

from collections.abc import Iterable
from dataclasses import replace

from tpinfer.scheduling.admission import Admission, check_request
from tpinfer.scheduling.audit import check_at_rest, check_sums
from tpinfer.scheduling.budget import StepBudget, StepCosts
from tpinfer.scheduling.draft import Draft, Scheduled
from tpinfer.scheduling.limits import SchedulerLimits, SchedulerStats
from tpinfer.scheduling.progress import Progress
from tpinfer.scheduling.request import NO_TOKEN, Family, Sequence
from tpinfer.scheduling.service import Service
from tpinfer.scheduling.state import made_state


class Scheduler:
    """Waiting and running sequences of rank 0, and the plan of the next step."""

    def __init__(self, limits: SchedulerLimits, costs: StepCosts | None = None) -> None:
        self.limits = limits
        self._state = made_state(limits, costs)
        self._admission = Admission(self._state)
        self._service = Service(self._state)
        self._progress = Progress(self._state)
        self._step_id = 0
        self._next_id = 0

    # -- requests come and go ------------------------------------------------------------------

    def add(self, first: Sequence, *siblings: Sequence) -> None:
        """Queue a request: its n continuations, which share one prompt.

        Raises ConfigError, having queued none, when it could never run.
        """
        members = (first, *siblings)
        for sequence in members:
            check_request(sequence, self.limits)
        self._state.prefixes.know_keys(first)
        family = Family(members, first) if siblings else None
        for sequence in members:
            sequence.id = self._next_id
            self._next_id += 1
            arrival = sequence.accepted_ns + sequence.priority * self.limits.ageing_ns
            sequence.order = (arrival, sequence.id)
            sequence.num_left = len(sequence.prompt_token_ids)
            sequence.max_context = sequence.num_left + sequence.max_tokens - 1
            sequence.ends = sequence.stop_token_ids | {NO_TOKEN}
            sequence.keys = list(first.keys)
            sequence.family = family
            self._state.unfinished[sequence.id] = sequence
        self._state.waiting.push(first)

    def abort(self, sequence: Sequence) -> bool:
        """End a sequence that nobody waits for any more; its blocks are free at once. Returns False
        when it had ended before."""
        return self.finish(sequence, "abort")

    def finish(self, sequence: Sequence, reason: str) -> bool:
        """End a sequence for a reason found elsewhere, such as a stop string."""
        if sequence.id not in self._state.unfinished:
            return False
        self._progress.end(sequence, reason)
        return True

    def abort_all(self) -> tuple[Sequence, ...]:
        """End every unfinished sequence; returns them."""
        ended = tuple(self._state.unfinished.values())
        for sequence in ended:
            self._progress.end(sequence, "abort")
        return ended

    def hold_back(self, sequence: Sequence, step_id: int) -> None:
        """Leave a sequence out of steps before `step_id` while others are in flight."""
        sequence.next_eligible_step = step_id
        sequence.free_until = 0

    # -- steps ---------------------------------------------------------------------------------

    def schedule(self, now_ns: int) -> Scheduled | None:
        """The next step. May be called again before earlier steps are committed.

        None when nothing can run before the oldest step in flight is committed; with none in
        flight that means that no work is left.
        """
        draft = Draft(StepBudget(self.limits, self._state.costs))
        self._service.serve(draft, self._step_id)
        self._admission.admit(draft, now_ns)
        if draft.is_empty:
            return None
        rows = self._state.rows
        scheduled = draft.scheduled(
            self._step_id, rows.released, rows.dropped, self._state.store.take_moves()
        )
        rows.told()
        self._state.in_flight.append(scheduled)
        self._step_id += 1
        self._state.stats.num_steps += 1
        return scheduled

    def commit(
        self, scheduled: Scheduled, tokens: Iterable[int], now_ns: int
    ) -> list[tuple[Sequence, int]]:
        """Take the tokens of the oldest step in flight, in plan order.

        Returns (sequence, token) for each that was still unfinished; `finish_reason` says whether
        it has ended with it. A token of -1 means that its logits were not numbers: that sequence
        alone ends, with the reason `error`. Raises ValueError for a step that is not the oldest in
        flight, or another number of tokens than it draws.
        """
        drawn, plan = list(tokens), scheduled.plan
        num_drawn = scheduled.num_decodes + sum(plan.num_samples[scheduled.num_decodes :])
        if len(drawn) != num_drawn:
            raise ValueError(f"step {plan.step_id} draws {num_drawn} tokens, {len(drawn)} came")
        self._leave_flight(scheduled)
        return self._progress.take(scheduled, drawn, now_ns)

    def fail(self, scheduled: Scheduled, reason: str = "error") -> tuple[Sequence, ...]:
        """The oldest step in flight did not come to an end, though ranks made its block copies:
        end its sequences; returns those that had not ended before."""
        self._leave_flight(scheduled)
        ended = tuple([s for s in scheduled.sequences if s.finish_reason is None])
        for sequence in ended:
            self._progress.end(sequence, reason)
        return ended

    def rebuild(self) -> tuple[Sequence, ...]:
        """Ranks were started anew and hold nothing: forget blocks and steps in flight, and let
        every sequence that had begun begin again; the next steps bring their records. Returns
        those that had a row."""
        interrupted = tuple(self._state.rows.running)
        for sequence in interrupted:
            self._state.waiting.gave_up(sequence)
            sequence.row = -1
            self._state.waiting.push(sequence)
        for sequence in self._state.unfinished.values():
            sequence.blocks, sequence.host_blocks = [], []
            sequence.num_dropped_blocks = sequence.num_planned = sequence.num_computed = 0
            sequence.num_left = sequence.num_tokens
        self._state.store.reset()
        self._state.rows.reset()
        self._state.in_flight.clear()
        return interrupted

    # -- what is known of it -------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._state.unfinished)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that have a row, the first to be served first."""
        return tuple(self._state.rows.running)

    @property
    def num_running(self) -> int:
        """Sequences that have a row."""
        return len(self._state.rows.running)

    @property
    def num_waiting(self) -> int:
        """Unfinished sequences without a row."""
        return len(self._state.unfinished) - len(self._state.rows.running)

    @property
    def num_in_flight(self) -> int:
        """Steps that were planned and not committed."""
        return len(self._state.in_flight)

    @property
    def oldest_step(self) -> int:
        """Number of the oldest step that was planned and not committed; -1 with none. For any
        thread."""
        return next((one.plan.step_id for one in tuple(self._state.in_flight)), -1)

    def stats(self) -> SchedulerStats:
        """What has happened until now."""
        return replace(self._state.stats)

    def check(self) -> None:
        """Raises RuntimeError, with numbers, when blocks or rows do not add up."""
        check_sums(self._state.store, self._state.rows, self._state.unfinished.values())

    def check_idle(self) -> None:
        """The same, and when anything is still held though nothing is left to do."""
        check_at_rest(self._state.store, self._state.rows, self._state.unfinished.values())

    def _leave_flight(self, scheduled: Scheduled) -> None:
        if not self._state.in_flight or self._state.in_flight[0] is not scheduled:
            raise ValueError(
                f"step {scheduled.plan.step_id} is not the oldest in flight; steps in flight: "
                f"{[one.plan.step_id for one in self._state.in_flight]}"
            )
        self._state.in_flight.popleft()
