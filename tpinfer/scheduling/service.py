"""How running sequences get their share of a step: decodes first by count, everybody in order by
blocks. Where blocks run out, the last in order gives way: its tokens are computed again later, or
its blocks move to host memory, whichever is priced lower.
"""

from tpinfer.scheduling.draft import Draft
from tpinfer.scheduling.request import NEVER, Sequence
from tpinfer.scheduling.state import SchedulerState


class Service:
    """For sequences that have a row."""

    def __init__(self, state: SchedulerState) -> None:
        self._limits = state.limits
        self._costs = state.costs
        self._stats = state.stats
        self._waiting = state.waiting
        self._rows = state.rows
        self._blocks = state.blocks
        self._in_flight = state.in_flight
        self._step_id = 0  # NEVER with no step in flight: then nobody is held back

    def serve(self, draft: Draft, step_id: int) -> None:
        """Put into step `step_id` those who run, as far as tokens, time and blocks last."""
        self._step_id = step_id if self._in_flight else NEVER
        running, budget = self._rows.running, draft.budget
        budget.reserve_decodes(running)
        if len(running) > budget.num_tokens:
            self._serve_rest(draft, list(running))
            return
        decodes, rest = draft.decodes, []
        for sequence in running:  # most need nothing but their turn
            planned = sequence.num_planned
            if planned < sequence.free_until:
                sequence.num_planned = planned + 1
                decodes.append(sequence)
            else:
                rest.append(sequence)
        budget.num_tokens -= len(decodes)
        if rest:
            self._serve_rest(draft, rest)

    def _serve_rest(self, draft: Draft, rest: list[Sequence]) -> None:
        """Sequences that need blocks or compute a prompt, first served first."""
        budget = draft.budget
        num_decodes = sum([sequence.num_left == 1 for sequence in rest])
        for sequence in rest:
            left = sequence.num_left
            num_decodes -= left == 1
            if (
                sequence.row < 0  # preempted for the one before
                or sequence.num_planned >= sequence.max_context
                or sequence.next_eligible_step > self._step_id
                or budget.num_tokens <= 0
            ):
                continue
            count = 1
            if left == 1:
                new_blocks = self._blocks.extend(sequence)
                if new_blocks is not None:
                    draft.decode(sequence, new_blocks)
                    continue
            else:
                kept = min(num_decodes, budget.num_tokens - 1)  # for those behind it
                budget.num_tokens -= kept
                count = budget.chunk(sequence, sequence.num_planned, left)
                budget.num_tokens += kept
            if count:
                self._serve(draft, sequence, count)

    def _serve(self, draft: Draft, sequence: Sequence, count: int) -> None:
        """Let a running sequence compute up to `count` tokens, as far as there are blocks."""
        blocks, running = self._blocks, self._rows.running
        self._rows.drop(sequence, blocks.slide(sequence))
        there = blocks.most(sequence, count)
        while not there and running[-1] is not sequence:
            self._preempt(draft, running[-1])
            there = blocks.most(sequence, count)
        if there:
            draft.run(sequence, there, blocks.grow(sequence, sequence.num_planned + there))
            blocks.mark_borders(sequence)
        else:
            self._stats.num_stalls += 1

    def _preempt(self, draft: Draft, victim: Sequence) -> None:
        """Take row and blocks from the last of those that run. What steps in flight draw for it
        still counts, so it does not come back before they are committed."""
        draft.withdraw(victim)
        for scheduled in self._in_flight:
            if victim in scheduled.sequences:
                scheduled.stale.add(victim.id)
        self._waiting.gave_up(victim)
        self._rows.leave(victim)
        if self._is_cheaper_to_move(victim) and self._blocks.move_out(victim):
            self._stats.num_moved_out += 1
            victim.num_computed = victim.num_planned
        else:
            self._blocks.release(victim)
            self._stats.num_recomputed += 1
            victim.num_left += victim.num_planned
            victim.num_computed = victim.num_planned = 0
        victim.num_preemptions += 1
        self._waiting.push(victim)

    def _is_cheaper_to_move(self, sequence: Sequence) -> bool:
        costs = self._costs
        if costs is None or not self._limits.num_host_blocks or sequence.wants_whole_prompt:
            return False
        return costs.swap_ns(len(sequence.blocks)) < costs.recompute_ns(sequence.num_planned)
