"""How waiting sequences get a row and their first blocks: taken over from the prefix cache, shared
with another continuation, brought back from host memory, or new.

Strictly in order: nobody is let past a sequence that has to wait for blocks, because it might
then wait for ever. Those who step aside for a prefix that is just being computed are no exception:
they get it with less work than if they went first.
"""

from tpinfer.config.errors import ConfigError
from tpinfer.scheduling.draft import Draft
from tpinfer.scheduling.limits import SchedulerLimits
from tpinfer.scheduling.prefixes import NO_HIT, Hit
from tpinfer.scheduling.request import Sequence
from tpinfer.scheduling.state import SchedulerState


class Admission:
    """From the queue into rows."""

    def __init__(self, state: SchedulerState) -> None:
        self._limits = state.limits
        self._stats = state.stats
        self._waiting = state.waiting
        self._rows = state.rows
        self._blocks = state.blocks
        self._prefixes = state.prefixes
        self._store = state.store

    def admit(self, draft: Draft, now_ns: int) -> None:
        """Let in who is next, as long as rows, tokens and blocks last."""
        while self._rows.free and draft.budget.num_tokens > 0:
            sequence = self._waiting.first()
            # One that was preempted comes back when its last tokens are known.
            if sequence is None or sequence.num_drawing:
                return
            spare = self._spare(draft)
            if self._store.pool.num_available <= spare:
                return
            if sequence.host_blocks:
                count = self._move_in(draft, sequence, spare)
            elif self._fork(sequence, spare):
                count = 1
            else:
                hit = NO_HIT
                if not sequence.wants_whole_prompt:
                    hit, most = self._prefixes.find(sequence), self._prefixes.most_hits(sequence)
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
        owed = sum([self._blocks.owed(sequence) for sequence in draft.prompts])
        return len(self._rows.running) + owed

    def _move_in(self, draft: Draft, sequence: Sequence, spare: int) -> int:
        start = sequence.num_planned
        count = draft.budget.chunk(sequence, start, sequence.num_left)
        if not count or not self._blocks.move_in(sequence, spare):
            return 0
        return self._blocks.most(sequence, count)

    def _fork(self, sequence: Sequence, spare: int) -> bool:
        family = sequence.family
        if family is None or not family.is_ready or sequence.token_ids:
            return False
        for member in family.members:
            if member is not sequence and self._prefixes.fork(member, sequence, spare):
                self._stats.num_forked += 1
                return True
        return False

    def _take_over(self, draft: Draft, sequence: Sequence, hit: Hit, spare: int) -> int:
        """Give a sequence its hits and the blocks of its first chunk; returns the chunk's tokens,
        or 0."""
        size, start = self._limits.block_size, hit.stop * self._limits.block_size
        stop = start + draft.budget.chunk(sequence, start, sequence.num_tokens - start)
        if not self._rows.running:  # as much as the cache allows, so that somebody runs
            most = self._store.pool.most(hit.first, -(-stop // size) - hit.first)
            stop = min(stop, (hit.first + most) * size)
        elif sequence.num_preemptions:  # with all its blocks, not to be preempted again at once
            spare += -(-sequence.num_tokens // size) - -(-stop // size)
        if stop <= start or not self._prefixes.take_over(sequence, hit, stop, spare):
            return 0
        self._stats.num_queried_tokens += sequence.num_tokens
        self._stats.num_hit_tokens += start
        if not sequence.admitted_ns:
            sequence.num_cached_tokens = start
        return stop - start

    def _start(self, draft: Draft, sequence: Sequence, count: int, now_ns: int) -> None:
        sequence.admitted_ns = sequence.admitted_ns or now_ns
        self._rows.enter(sequence)
        self._waiting.computing(sequence)
        draft.admit(sequence)
        self._blocks.grow(sequence, sequence.num_planned + count)
        draft.run(sequence, count, sequence.blocks)
        self._blocks.mark_borders(sequence)
        self._prefixes.mark_full(sequence)


def check_request(sequence: Sequence, limits: SchedulerLimits) -> None:
    """Raises ConfigError, with both numbers, for a sequence that could never run."""
    length, size = len(sequence.prompt_token_ids), limits.block_size
    if not length:
        raise ConfigError("the prompt has no tokens; give at least one")
    if sequence.max_tokens < 1:
        raise ConfigError(f"--max-tokens {sequence.max_tokens} must be at least 1")
    if length + sequence.max_tokens > limits.max_model_len:
        raise ConfigError(
            f"a prompt of {length} tokens and --max-tokens {sequence.max_tokens} make "
            f"{length + sequence.max_tokens}, but {limits.max_model_len} is the limit "
            "(--max-model-len, at most the model's own); shorten one"
        )
    needed, room = -(-(length + sequence.max_tokens - 1) // size), limits.num_blocks
    if limits.window is not None and (limits.window + size - 2) // size + 1 < needed:
        # What a window reaches, from any place on, so that each class must have its share.
        needed = (limits.window + size - 2) // size + 1
        room -= room % limits.num_groups
    if needed > room:
        raise ConfigError(
            f"the request needs {needed} KV blocks of {size} tokens, but the cache has {room}; "
            "shorten it or raise --kv-bytes or --memory-utilization"
        )
