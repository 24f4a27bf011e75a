"""Which sequences run in the next step: first come, first served, decodes together with chunks
of prompts.

A sequence is admitted only when a row and all the blocks it can ever need are free, so a running
one never stops for lack of memory. No prefix sharing and no preemption here yet.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from tpinfer.config.errors import ConfigError
from tpinfer.scheduling.block_pool import BlockPool
from tpinfer.scheduling.request import Sequence
from tpinfer.steps.plan import StepPlan


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a step and the cache may hold."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    """Sequences in one step."""
    max_num_batched_tokens: int
    """Query tokens in one step."""
    max_model_len: int
    """Tokens of one sequence, prompt and output."""
    window: int | None = None
    """Sliding window when *every* layer slides: blocks behind it are given back; else None."""
    kv_group_size: int = 1
    """Ranks that share a KV head's blocks out: logical block j of a sequence is kept in a block of
    class j mod this (`sharding.kv_layout`)."""


@dataclass(frozen=True, slots=True)
class _Part:
    row: int
    num_tokens: int
    new_blocks: tuple[int, ...]
    num_dropped: int
    num_samples: int


class Scheduler:
    """Waiting and running sequences of rank 0, and the plan of the next step."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks, limits.kv_group_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._reserved = 0  # blocks admitted sequences may still take
        self._free_rows = list(range(limits.max_num_seqs))[::-1]
        self._released: list[int] = []
        self._step_id = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ConfigError when it could never run."""
        limits, length = self.limits, len(sequence.prompt_token_ids)
        if not length:
            raise ConfigError("the prompt has no tokens; give at least one")
        if length + sequence.max_tokens > limits.max_model_len:
            raise ConfigError(
                f"a prompt of {length} tokens and --max-tokens {sequence.max_tokens} make "
                f"{length + sequence.max_tokens}, but --max-model-len is {limits.max_model_len}; "
                "shorten one or raise the limit"
            )
        needed = self._blocks_needed(sequence)
        if needed > limits.num_blocks:
            raise ConfigError(
                f"the request needs {needed} KV blocks of {limits.block_size} tokens, but the "
                "cache has "
                f"{limits.num_blocks}; shorten it or raise --kv-bytes or --memory-utilization"
            )
        self.waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def admit(self, now_ns: int) -> list[Sequence]:
        """Move waiting sequences into rows while rows and blocks last; returns the new ones."""
        admitted = []
        while self.waiting and self._free_rows:
            needed = self._blocks_needed(self.waiting[0])
            if needed > self.pool.num_free - self._reserved or not self._fits_classes(needed):
                break
            sequence = self.waiting.popleft()
            sequence.row = self._free_rows.pop()
            if sequence.row in self._released:  # its new record replaces the old one
                self._released.remove(sequence.row)
            sequence.admitted_ns = now_ns
            self._reserved += needed
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def plan(self) -> StepPlan | None:
        """The next step, or None when nothing runs. Decodes come first, then prompts in order of
        arrival."""
        budget = self.limits.max_num_batched_tokens
        parts: list[_Part] = []
        ordered = sorted(self.running, key=lambda s: s.num_tokens - s.num_computed > 1)
        for sequence in ordered:
            num_tokens = min(sequence.num_tokens - sequence.num_computed, budget)
            if num_tokens <= 0:
                break
            budget -= num_tokens
            parts.append(self._row_plan(sequence, num_tokens))
        if not parts:
            return None
        released, self._released = tuple(self._released), []
        plan = StepPlan(
            self._step_id,
            tuple(part.row for part in parts),
            tuple(part.num_tokens for part in parts),
            tuple(part.num_samples for part in parts),
            tuple((part.row, *part.new_blocks) for part in parts if part.new_blocks),
            tuple((part.row, part.num_dropped) for part in parts if part.num_dropped),
            released,
        )
        self._step_id += 1
        return plan

    def commit(
        self, plan: StepPlan, sampled: Iterable[int], now_ns: int
    ) -> list[tuple[Sequence, int]]:
        """Take the tokens of a step that ran; returns (sequence, token) in plan order and frees
        what ended."""
        drawn = iter(sampled)
        by_row = {sequence.row: sequence for sequence in self.running}
        news = []
        for row, num_tokens, num_samples in plan.parts():
            sequence = by_row[row]
            sequence.num_computed += num_tokens
            if num_samples:
                token = next(drawn)
                sequence.take_token(token, now_ns)
                news.append((sequence, token))
                if sequence.finish_reason:
                    self._end(sequence)
        return news

    def abort_all(self, reason: str) -> list[Sequence]:
        """End every unfinished sequence; returns them."""
        ended = [*self.running, *self.waiting]
        for sequence in list(self.running):
            self._end(sequence)
        self.waiting.clear()
        for sequence in ended:
            sequence.finish_reason = reason
        return ended

    def _fits_classes(self, needed: int) -> bool:
        """Whether every class of blocks suffices whatever the running sequences still take."""
        group = self.limits.kv_group_size
        taken = [needed, *map(self._blocks_needed, self.running)] if group > 1 else []
        return sum(-(-count // group) for count in taken) <= self.limits.num_blocks // group

    def _blocks_needed(self, sequence: Sequence) -> int:
        """Most blocks it can hold at once."""
        size = self.limits.block_size
        tokens = sequence.max_context
        if self.limits.window is not None:
            chunk = min(len(sequence.prompt_token_ids), self.limits.max_num_batched_tokens)
            tokens = min(tokens, self.limits.window + chunk + 2 * size)
        return -(-tokens // size)

    def _row_plan(self, sequence: Sequence, num_tokens: int) -> _Part:
        size, window = self.limits.block_size, self.limits.window
        stop = sequence.num_computed + num_tokens
        dropped = 0
        if window is not None:
            first_kept = max(0, sequence.num_computed - window + 1) // size
            dropped = first_kept - sequence.num_dropped_blocks
            if dropped:
                self.pool.give_back(sequence.blocks[:dropped])
                self._reserved += dropped
                del sequence.blocks[:dropped]
                sequence.num_dropped_blocks = first_kept
            wanted = -(-stop // size) - first_kept - len(sequence.blocks)
        else:  # all at once, so that they adjoin
            wanted = 0 if sequence.blocks else self._blocks_needed(sequence)
        new_blocks: tuple[int, ...] = ()
        if wanted > 0:
            last = sequence.blocks[-1] if sequence.blocks else None
            first = sequence.num_dropped_blocks + len(sequence.blocks)
            new_blocks = self.pool.take(wanted, last, first)
            self._reserved -= wanted
            sequence.blocks += new_blocks
        samples = int(stop == sequence.num_tokens)
        return _Part(sequence.row, num_tokens, new_blocks, dropped, samples)

    def _end(self, sequence: Sequence) -> None:
        self._reserved -= self._blocks_needed(sequence) - len(sequence.blocks)
        self.pool.give_back(sequence.blocks)
        sequence.blocks = []
        self.running.remove(sequence)
        self._free_rows.append(sequence.row)
        self._released.append(sequence.row)
