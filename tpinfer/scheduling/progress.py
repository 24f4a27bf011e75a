"""What steps bring: tokens computed and drawn, and how sequences end."""

from tpinfer.scheduling.draft import Scheduled
from tpinfer.scheduling.request import NO_TOKEN, Sequence
from tpinfer.scheduling.state import SchedulerState


class Progress:
    """From a step that has run into its sequences."""

    def __init__(self, state: SchedulerState) -> None:
        self._unfinished = state.unfinished
        self._in_flight = state.in_flight
        self._waiting = state.waiting
        self._rows = state.rows
        self._blocks = state.blocks
        self._prefixes = state.prefixes

    def take(
        self, scheduled: Scheduled, drawn: list[int], now_ns: int
    ) -> list[tuple[Sequence, int]]:
        """Take the tokens that a step has `drawn`, in plan order; returns them with their
        sequences, as far as those were unfinished."""
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
        if num_short < len(scheduled.sequences):
            self._take_rest(scheduled, num_short, drawn, now_ns, news)
        return news

    def _take_rest(
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
            self._waiting.computed(sequence, self._prefixes.register(sequence))
        self._prefixes.mark_full(sequence)
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
            self.end(sequence, "error" if token == NO_TOKEN else "stop")
        elif len(sequence.token_ids) >= sequence.max_tokens:
            self.end(sequence, "length")

    def end(self, sequence: Sequence, reason: str) -> None:
        """End an unfinished sequence: its row and blocks are free at once."""
        del self._unfinished[sequence.id]
        sequence.finish_reason = reason
        for scheduled in self._in_flight:
            scheduled.ended.add(sequence.id)
        if reason == "error":
            self._prefixes.forget(sequence)
        if sequence.row >= 0:
            self._waiting.gave_up(sequence)
            self._rows.leave(sequence)
        else:
            self._waiting.ended()
        self._blocks.release(sequence)
        family = sequence.family
        if family is not None and not family.is_ready and family.source is sequence:
            self._waiting.lost_source(family)
