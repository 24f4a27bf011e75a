"""Which sequences run in the next step: decodes together with chunks of prompts.

Who goes first is one order for everything: rows, blocks, prompt tokens (see `waiting`). The first
unfinished sequence in that order is never preempted and is offered a place in every step, so
whatever the cache is too small for, somebody comes to an end.

Steps may be planned before earlier ones are committed. Ranks run plans in order, so blocks and
rows can be given on as soon as no *later* plan needs them, and a plan's rows are told by sequence,
not by number, when it is committed.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from tpinfer.config.errors import ConfigError
from tpinfer.scheduling.budget import StepBudget, StepCosts
from tpinfer.scheduling.draft import Draft, Scheduled
from tpinfer.scheduling.limits import SchedulerLimits, SchedulerStats
from tpinfer.scheduling.request import NEVER, Family, Sequence
from tpinfer.scheduling.sequence_blocks import NO_HIT, Hit, SequenceBlocks
from tpinfer.scheduling.waiting import WaitingQueue

NO_TOKEN = -1
"""What a rank says it drew where the logits were not numbers."""


class Scheduler:
    """Waiting and running sequences of rank 0, and the plan of the next step."""

    def __init__(self, limits: SchedulerLimits, costs: StepCosts | None = None) -> None:
        self.limits = limits
        self.running: list[Sequence] = []
        """In order: the first to be served first."""
        self._costs = costs
        self._stats = SchedulerStats()
        self.blocks = SequenceBlocks(limits, self._stats)
        self._waiting = WaitingQueue()
        self._unfinished: dict[int, Sequence] = {}
        self._free_rows = list(range(limits.max_num_seqs))[::-1]
        self._released: dict[int, None] = {}  # rows that the next plan lets go of
        self._dropped: dict[int, int] = {}  # row -> leading blocks that the next plan drops
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
            self._check(sequence)
        self.blocks.know_keys(first)
        family = Family(members, first) if siblings else None
        for sequence in members:
            sequence.id = self._next_id
            self._next_id += 1
            arrival = sequence.accepted_ns + sequence.priority * self.limits.ageing_ns
            sequence.order = (arrival, sequence.id)
            sequence.num_known = len(sequence.prompt_token_ids)
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

    # -- steps ---------------------------------------------------------------------------------

    def schedule(self, now_ns: int) -> Scheduled | None:
        """The next step. May be called again before earlier steps are committed.

        None when nothing can run before the oldest step in flight is committed; with none in
        flight that means that no work is left.
        """
        draft = Draft(StepBudget(self.limits, self._costs))
        self._serve_running(draft)
        self._admit(draft, now_ns)
        if draft.is_empty:
            return None
        scheduled = draft.scheduled(
            self._step_id, self._released, self._dropped, self.blocks.take_moves()
        )
        self._released.clear()
        self._dropped.clear()
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
        drawn = list(tokens)
        plan = scheduled.plan
        if len(drawn) != sum(plan.num_samples):
            raise ValueError(
                f"step {plan.step_id} draws {sum(plan.num_samples)} tokens, {len(drawn)} came"
            )
        self._leave_flight(scheduled)
        stale, news, at = scheduled.stale, [], 0
        for sequence, count, samples in zip(
            scheduled.sequences, plan.num_tokens, plan.num_samples, strict=True
        ):
            if sequence.row >= 0 and not (stale and sequence.id in stale):
                sequence.num_computed += count
                if sequence.num_computed >= sequence.full_at:
                    self._waiting.computed(self.blocks.register(sequence))
                family = sequence.family
                if family is not None and not family.is_ready:
                    self._look_for_siblings(sequence, family)
            if samples:
                if sequence.finish_reason is None:
                    token = drawn[at]
                    news.append((sequence, token))
                    sequence.token_ids.append(token)
                    sequence.token_times_ns.append(now_ns)
                    if (
                        token in sequence.stop_token_ids
                        or len(sequence.token_ids) >= sequence.max_tokens
                        or token < 0
                    ):
                        self._take_last(sequence, token)
                at += 1
        return news

    def fail(self, scheduled: Scheduled, reason: str = "error") -> tuple[Sequence, ...]:
        """The oldest step in flight did not come to an end, though ranks made its block copies:
        end its sequences; returns those that had not ended before."""
        self._leave_flight(scheduled)
        ended = [s for s in scheduled.sequences if s.finish_reason is None]
        for sequence in ended:
            self._end(sequence, reason)
        return tuple(ended)

    def rebuild(self) -> tuple[Sequence, ...]:
        """Ranks were started anew and hold nothing: forget blocks and steps in flight, and let
        every sequence that had begun begin again; the next steps bring their records. Returns
        those that had a row."""
        interrupted = tuple(self.running)
        for sequence in interrupted:
            self._waiting.gave_up(sequence)
            sequence.row = -1
            self._waiting.push(sequence)
        for sequence in self._unfinished.values():
            sequence.blocks, sequence.host_blocks = [], []
            sequence.num_dropped_blocks = sequence.num_planned = sequence.num_computed = 0
            sequence.num_known = sequence.num_tokens
        self.blocks = SequenceBlocks(self.limits, self._stats)
        self._free_rows = list(range(self.limits.max_num_seqs))[::-1]
        self._released.clear()
        self._dropped.clear()
        self._in_flight.clear()
        self.running = []
        return interrupted

    # -- what is known of it -------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._unfinished)

    @property
    def num_running(self) -> int:
        """Sequences that have a row."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Unfinished sequences without a row."""
        return len(self._unfinished) - len(self.running)

    @property
    def num_in_flight(self) -> int:
        """Steps that were planned and not committed."""
        return len(self._in_flight)

    def stats(self) -> SchedulerStats:
        """What has happened until now."""
        return replace(self._stats)

    def check(self) -> None:
        """Raises RuntimeError, with numbers, when blocks or rows do not add up."""
        self.blocks.pool.recount([s.blocks for s in self._unfinished.values()])
        host = self.blocks.host
        held = sum(len(s.host_blocks) for s in self._unfinished.values())
        there = host.num_free + host.num_cached + host.num_held
        if held != host.num_held or there != host.num_blocks:
            raise RuntimeError(
                f"host blocks do not add up: {host.num_free} free + {host.num_cached} cached + "
                f"{host.num_held} held, of which sequences know {held}, of {host.num_blocks}"
            )
        rows = [s.row for s in self.running]
        if sorted([*rows, *self._free_rows]) != list(range(self.limits.max_num_seqs)):
            raise RuntimeError(
                f"rows do not add up: {rows} run and {self._free_rows} are free of "
                f"{self.limits.max_num_seqs}"
            )

    def check_idle(self) -> None:
        """Raises RuntimeError, with numbers, when anything is still held though nothing is left to
        do."""
        self.check()
        pool, host = self.blocks.pool, self.blocks.host
        if self._unfinished or pool.num_referenced or host.num_held:
            raise RuntimeError(
                f"not at rest: {len(self._unfinished)} sequences unfinished, "
                f"{pool.num_referenced} blocks referenced, {host.num_held} host blocks held"
            )

    # -- sequences that run --------------------------------------------------------------------

    def _serve_running(self, draft: Draft) -> None:
        running, budget = self.running, draft.budget
        step_id = self._step_id if self._in_flight else NEVER
        budget.reserve_decodes(running)
        if len(running) <= budget.num_tokens:
            decodes, rest = draft.decodes, []
            for sequence in running:  # most need nothing but their turn
                planned = sequence.num_planned
                if (
                    planned < sequence.free_until
                    and sequence.num_known - planned == 1
                    and sequence.next_eligible_step <= step_id
                ):
                    sequence.num_planned = planned + 1
                    sequence.num_known = planned + 2
                    decodes.append(sequence)
                else:
                    rest.append(sequence)
            budget.num_tokens -= len(decodes)
        else:
            rest = list(running)
        if rest:
            self._serve_rest(draft, rest, step_id)

    def _serve_rest(self, draft: Draft, rest: list[Sequence], step_id: int) -> None:
        """Sequences that need blocks or compute a prompt, first served first."""
        budget = draft.budget
        num_decodes = sum(s.num_known - s.num_planned == 1 for s in rest)
        for sequence in rest:
            left = sequence.num_known - sequence.num_planned
            num_decodes -= left == 1
            if (
                sequence.row < 0  # preempted for the one before
                or sequence.num_planned >= sequence.max_context
                or sequence.next_eligible_step > step_id
                or budget.num_tokens <= 0
            ):
                continue
            count = 1
            if left > 1:
                held_back = min(num_decodes, budget.num_tokens - 1)
                budget.num_tokens -= held_back
                count = budget.chunk(sequence, sequence.num_planned, left)
                budget.num_tokens += held_back
            if count:
                self._serve(draft, sequence, count)

    def _serve(self, draft: Draft, sequence: Sequence, count: int) -> None:
        """Let a running sequence compute up to `count` tokens, as far as there are blocks."""
        self._drop(sequence, self.blocks.slide(sequence))
        there = self.blocks.most(sequence, count)
        while not there and self.running[-1] is not sequence:
            self._preempt(draft, self.running.pop())
            there = self.blocks.most(sequence, count)
        if there:
            new_blocks = self.blocks.grow(sequence, sequence.num_planned + there)
            draft.run(sequence, there, new_blocks)
        else:
            self._stats.num_stalls += 1

    def _preempt(self, draft: Draft, victim: Sequence) -> None:
        """Take row and blocks from the last of those that run. What steps in flight draw for it
        still counts, so it does not come back before they are committed."""
        draft.withdraw(victim)
        for scheduled in self._in_flight:
            if victim in scheduled.sequences:
                scheduled.stale.add(victim.id)
        self._leave_row(victim)
        if self._is_cheaper_to_move(victim) and self.blocks.move_out(victim):
            self._stats.num_moved_out += 1
            victim.num_computed = victim.num_planned
        else:
            self.blocks.release(victim)
            self._stats.num_recomputed += 1
            victim.num_computed = victim.num_planned = 0
        victim.num_preemptions += 1
        self._waiting.push(victim)

    def _is_cheaper_to_move(self, sequence: Sequence) -> bool:
        costs = self._costs
        if costs is None or not self.limits.num_host_blocks or _wants_whole_prompt(sequence):
            return False
        return costs.swap_ns(len(sequence.blocks)) < costs.recompute_ns(sequence.num_planned)

    def _drop(self, sequence: Sequence, count: int) -> None:
        if count:
            self._dropped[sequence.row] = self._dropped.get(sequence.row, 0) + count

    def _leave_row(self, sequence: Sequence) -> None:
        self._waiting.gave_up(sequence)
        self._dropped.pop(sequence.row, None)
        self._released[sequence.row] = None
        self._free_rows.append(sequence.row)
        sequence.row = -1

    # -- sequences that wait -------------------------------------------------------------------

    def _admit(self, draft: Draft, now_ns: int) -> None:
        """Give rows to those who are next, as long as rows, tokens and blocks last."""
        while self._free_rows and draft.budget.num_tokens > 0:
            sequence = self._waiting.first()
            if sequence is None or sequence.num_drawing:
                return
            spare = self._spare(draft)
            if self.blocks.pool.num_available <= spare:
                return
            if sequence.host_blocks:
                count = self._move_in(draft, sequence, spare)
            elif self._fork(sequence, spare):
                count = 1
            else:
                hit = NO_HIT
                if not _wants_whole_prompt(sequence):
                    hit, most = self.blocks.find(sequence), self.blocks.most_hits(sequence)
                    if self._waiting.step_aside(sequence, hit.stop, most):
                        self._waiting.pop()
                        continue
                count = self._take_over(draft, sequence, hit, spare)
            if not count:
                return
            self._waiting.pop()
            self._start(draft, sequence, count, now_ns)

    def _spare(self, draft: Draft) -> int:
        """Blocks that must remain for those who run: one each, and what their prompts still need.
        So much lasts for about as many steps as a block has tokens."""
        owed = sum(self.blocks.owed(sequence) for sequence in draft.prompts)
        return len(self.running) + owed

    def _move_in(self, draft: Draft, sequence: Sequence, spare: int) -> int:
        start = sequence.num_planned
        count = draft.budget.chunk(sequence, start, sequence.num_known - start)
        if not count or not self.blocks.move_in(sequence, spare):
            return 0
        return self.blocks.most(sequence, count)

    def _fork(self, sequence: Sequence, spare: int) -> bool:
        family = sequence.family
        if family is None or not family.is_ready or sequence.token_ids:
            return False
        for member in family.members:
            if member is not sequence and self.blocks.fork(member, sequence, spare):
                self._stats.num_forked += 1
                return True
        return False

    def _take_over(self, draft: Draft, sequence: Sequence, hit: Hit, spare: int) -> int:
        """Give a waiting sequence its hits and the blocks of its first chunk; returns the chunk's
        tokens, or 0."""
        size, start = self.limits.block_size, hit.stop * self.limits.block_size
        stop = start + draft.budget.chunk(sequence, start, sequence.num_known - start)
        if not self.running:  # a chunk as large as the cache allows, so that somebody runs
            most = self.blocks.pool.most(hit.first, -(-stop // size) - hit.first)
            stop = min(stop, (hit.first + most) * size)
        elif sequence.num_preemptions:  # not to be preempted again at once
            spare += -(-sequence.num_known // size) - -(-stop // size)
        if stop <= start or not self.blocks.take_over(sequence, hit, stop, spare):
            return 0
        self._stats.num_queried_tokens += sequence.num_tokens
        self._stats.num_hit_tokens += start
        if not sequence.admitted_ns:
            sequence.num_cached_tokens = start
        return stop - start

    def _start(self, draft: Draft, sequence: Sequence, count: int, now_ns: int) -> None:
        sequence.row = self._free_rows.pop()
        self._released.pop(sequence.row, None)  # its new record replaces the old one
        sequence.admitted_ns = sequence.admitted_ns or now_ns
        insort(self.running, sequence, key=_order)
        self._waiting.computing(sequence)
        draft.admit(sequence)
        self._drop(sequence, sequence.num_dropped_blocks)
        self.blocks.grow(sequence, sequence.num_planned + count)
        draft.run(sequence, count, sequence.blocks)

    # -- sequences that end --------------------------------------------------------------------

    def _take_last(self, sequence: Sequence, token: int) -> None:
        if token < 0:
            sequence.token_ids.pop()
            sequence.token_times_ns.pop()
            self._end(sequence, "error")
        else:
            self._end(sequence, "stop" if token in sequence.stop_token_ids else "length")

    def _end(self, sequence: Sequence, reason: str) -> None:
        del self._unfinished[sequence.id]
        sequence.finish_reason = reason
        if reason == "error":
            self.blocks.forget(sequence)
        if sequence.row >= 0:
            del self.running[bisect_left(self.running, sequence.order, key=_order)]
            self._leave_row(sequence)
        else:
            self._waiting.ended()
        self.blocks.release(sequence)
        family = sequence.family
        if family is not None and not family.is_ready and family.source is sequence:
            self._waiting.lost_source(family)

    def _look_for_siblings(self, sequence: Sequence, family: Family) -> None:
        is_done = sequence.num_computed >= len(sequence.prompt_token_ids)
        if is_done and family.source is sequence:
            self._waiting.is_ready(family)

    def _leave_flight(self, scheduled: Scheduled) -> None:
        if not self._in_flight or self._in_flight[0] is not scheduled:
            raise ValueError(
                f"step {scheduled.plan.step_id} is not the oldest in flight; steps in flight: "
                f"{[one.plan.step_id for one in self._in_flight]}"
            )
        self._in_flight.popleft()

    def _check(self, sequence: Sequence) -> None:
        limits, length = self.limits, len(sequence.prompt_token_ids)
        if not length:
            raise ConfigError("the prompt has no tokens; give at least one")
        if sequence.max_tokens < 1:
            raise ConfigError(f"max_tokens={sequence.max_tokens} must be at least 1")
        if length + sequence.max_tokens > limits.max_model_len:
            raise ConfigError(
                f"a prompt of {length} tokens and --max-tokens {sequence.max_tokens} make "
                f"{length + sequence.max_tokens}, but --max-model-len is {limits.max_model_len}; "
                "shorten one or raise the limit"
            )
        needed = -(-sequence.max_context // limits.block_size)
        room = limits.num_blocks
        if limits.window is not None:  # at any offset, and so of any class
            span = (limits.window + limits.block_size - 2) // limits.block_size + 1
            if span < needed:
                needed = span
                room = limits.num_blocks // limits.num_groups * limits.num_groups
        if needed > room:
            raise ConfigError(
                f"the request needs {needed} KV blocks of {limits.block_size} tokens, but the "
                f"cache has {room}; shorten it or raise --kv-bytes or --memory-utilization"
            )


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _wants_whole_prompt(sequence: Sequence) -> bool:
    return sequence.needs_whole_prompt and not sequence.token_ids
