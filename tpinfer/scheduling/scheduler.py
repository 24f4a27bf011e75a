"""Which sequences run in the next step: decodes together with chunks of prompts.

Who goes first is one order for everything: rows, blocks, prompt tokens (see `waiting`). The first
unfinished sequence in that order is never preempted and has a place in every step, so however
small the cache is, somebody comes to an end.

Steps may be planned before earlier ones are committed. Ranks run plans in order, so blocks and
rows can be given on as soon as no *later* plan needs them, and a plan's rows are told by sequence,
not by number, when it is committed.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from tpinfer.scheduling.admission import Admission, check_request
from tpinfer.scheduling.audit import check_at_rest, check_sums
from tpinfer.scheduling.budget import StepBudget, StepCosts
from tpinfer.scheduling.draft import Draft, Scheduled
from tpinfer.scheduling.limits import SchedulerLimits, SchedulerStats
from tpinfer.scheduling.request import NO_TOKEN, Family, Sequence
from tpinfer.scheduling.rows import RunningRows
from tpinfer.scheduling.sequence_blocks import SequenceBlocks
from tpinfer.scheduling.service import Service
from tpinfer.scheduling.waiting import WaitingQueue


class Scheduler:
    """Waiting and running sequences of rank 0, and the plan of the next step."""

    def __init__(self, limits: SchedulerLimits, costs: StepCosts | None = None) -> None:
        self.limits = limits
        self._costs = costs
        self._stats = SchedulerStats()
        self._blocks = SequenceBlocks(limits, self._stats)
        self._rows = RunningRows(limits.max_num_seqs)
        self._waiting = WaitingQueue()
        self._admission = Admission(limits, self._waiting, self._rows, self._blocks, self._stats)
        self._service = Service(limits, costs, self._waiting, self._rows, self._blocks, self._stats)
        self._unfinished: dict[int, Sequence] = {}
        self._in_flight: deque[Scheduled] = deque()
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
        self._blocks.know_keys(first)
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
            self._unfinished[sequence.id] = sequence
        self._waiting.push(first)

    def abort(self, sequence: Sequence) -> bool:
        """End a sequence that nobody waits for any more; its blocks are free at once. Returns False
        when it had ended before."""
        return self.finish(sequence, "abort")

    def finish(self, sequence: Sequence, reason: str) -> bool:
        """End a sequence for a reason found elsewhere, such as a stop string."""
        if sequence.id not in self._unfinished:
            return False
        self._end(sequence, reason)
        return True

    def abort_all(self) -> tuple[Sequence, ...]:
        """End every unfinished sequence; returns them."""
        ended = tuple(self._unfinished.values())
        for sequence in ended:
            self._end(sequence, "abort")
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
        draft = Draft(StepBudget(self.limits, self._costs))
        self._service.serve(draft, self._step_id, self._in_flight)
        self._admission.admit(draft, now_ns)
        if draft.is_empty:
            return None
        rows = self._rows
        scheduled = draft.scheduled(
            self._step_id, rows.released, rows.dropped, self._blocks.take_moves()
        )
        rows.told()
        self._in_flight.append(scheduled)
        self._step_id += 1
        self._stats.num_steps += 1
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
        # With nobody preempted since, all but prompts takes the short way.
        num_short = 0 if scheduled.stale else scheduled.num_decodes
        news = list(zip(scheduled.sequences[:num_short], drawn, strict=False))
        if scheduled.ended:
            news = [pair for pair in news if pair[0].row >= 0]
        for sequence, token in news:
            sequence.num_computed = computed = sequence.num_computed + 1
            sequence.token_ids.append(token)
            sequence.token_times_ns.append(now_ns)
            if computed >= sequence.border:
                self._pass_border(sequence)
                self._look_for_end(sequence, token)
            elif token in sequence.ends:
                self._look_for_end(sequence, token)
        if num_short < len(plan.rows):
            self._commit_rest(scheduled, num_short, drawn, now_ns, news)
        return news

    def fail(self, scheduled: Scheduled, reason: str = "error") -> tuple[Sequence, ...]:
        """The oldest step in flight did not come to an end, though ranks made its block copies:
        end its sequences; returns those that had not ended before."""
        self._leave_flight(scheduled)
        ended = tuple([s for s in scheduled.sequences if s.finish_reason is None])
        for sequence in ended:
            self._end(sequence, reason)
        return ended

    def rebuild(self) -> tuple[Sequence, ...]:
        """Ranks were started anew and hold nothing: forget blocks and steps in flight, and let
        every sequence that had begun begin again; the next steps bring their records. Returns
        those that had a row."""
        interrupted = tuple(self._rows.running)
        for sequence in interrupted:
            self._waiting.gave_up(sequence)
            sequence.row = -1
            self._waiting.push(sequence)
        for sequence in self._unfinished.values():
            sequence.blocks, sequence.host_blocks = [], []
            sequence.num_dropped_blocks = sequence.num_planned = sequence.num_computed = 0
            sequence.num_left = sequence.num_tokens
        self._blocks.reset()
        self._rows.reset()
        self._in_flight.clear()
        return interrupted

    # -- what is known of it -------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._unfinished)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that have a row, the first to be served first."""
        return tuple(self._rows.running)

    @property
    def num_running(self) -> int:
        """Sequences that have a row."""
        return len(self._rows.running)

    @property
    def num_waiting(self) -> int:
        """Unfinished sequences without a row."""
        return len(self._unfinished) - len(self._rows.running)

    @property
    def num_in_flight(self) -> int:
        """Steps that were planned and not committed."""
        return len(self._in_flight)

    def stats(self) -> SchedulerStats:
        """What has happened until now."""
        return replace(self._stats)

    def check(self) -> None:
        """Raises RuntimeError, with numbers, when blocks or rows do not add up."""
        check_sums(self._blocks, self._rows, self._unfinished.values())

    def check_idle(self) -> None:
        """The same, and when anything is still held though nothing is left to do."""
        check_at_rest(self._blocks, self._rows, self._unfinished.values())

    # -- what steps bring ----------------------------------------------------------------------

    def _commit_rest(
        self,
        scheduled: Scheduled,
        first: int,
        drawn: list[int],
        now_ns: int,
        news: list[tuple[Sequence, int]],
    ) -> None:
        """Commit the sequences from the `first` on; what they drew is appended to `news`."""
        plan, stale, at = scheduled.plan, scheduled.stale, first
        for sequence, count, samples in zip(
            scheduled.sequences[first:], plan.num_tokens[first:], plan.num_samples[first:],
            strict=True,
        ):  # fmt: skip
            if sequence.row >= 0 and sequence.id not in stale:
                sequence.num_computed += count
                self._pass_border(sequence)
            if samples and sequence.finish_reason is None:
                news.append((sequence, drawn[at]))
                sequence.token_ids.append(drawn[at])
                sequence.token_times_ns.append(now_ns)
                self._look_for_end(sequence, drawn[at])
            at += samples

    def _pass_border(self, sequence: Sequence) -> None:
        """Look at what was computed: whether blocks are full, and the prompt is done."""
        if sequence.num_computed >= sequence.full_at:
            self._waiting.computed(sequence, self._blocks.register(sequence))
        self._blocks.mark_full(sequence)
        family = sequence.family
        if (
            family is not None
            and not family.is_ready
            and family.source is sequence
            and sequence.num_computed >= len(sequence.prompt_token_ids)
        ):
            self._waiting.is_ready(family)

    def _look_for_end(self, sequence: Sequence, token: int) -> None:
        """End a sequence if the token it took is its last."""
        if token in sequence.ends:
            if token == NO_TOKEN:
                sequence.token_ids.pop()
                sequence.token_times_ns.pop()
            self._end(sequence, "error" if token == NO_TOKEN else "stop")
        elif len(sequence.token_ids) >= sequence.max_tokens:
            self._end(sequence, "length")

    def _end(self, sequence: Sequence, reason: str) -> None:
        del self._unfinished[sequence.id]
        sequence.finish_reason = reason
        for scheduled in self._in_flight:
            scheduled.ended.add(sequence.id)
        if reason == "error":
            self._blocks.forget(sequence)
        if sequence.row >= 0:
            self._waiting.gave_up(sequence)
            self._rows.leave(sequence)
        else:
            self._waiting.ended()
        self._blocks.release(sequence)
        family = sequence.family
        if family is not None and not family.is_ready and family.source is sequence:
            self._waiting.lost_source(family)

    def _leave_flight(self, scheduled: Scheduled) -> None:
        if not self._in_flight or self._in_flight[0] is not scheduled:
            raise ValueError(
                f"step {scheduled.plan.step_id} is not the oldest in flight; steps in flight: "
                f"{[one.plan.step_id for one in self._in_flight]}"
            )
        self._in_flight.popleft()
