"""A step while it is put together, and what it becomes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tpinfer.scheduling.block_store import Moves
from tpinfer.scheduling.budget import StepBudget
from tpinfer.scheduling.request import Sequence
from tpinfer.steps.plan import SequenceRecord, StepPlan


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One step to run: first send the records, then the plan."""

    records: tuple[SequenceRecord, ...]
    plan: StepPlan
    sequences: tuple[Sequence, ...]
    """In the order of `plan.rows`."""
    admitted: tuple[Sequence, ...]
    """In the order of `records`."""
    num_decodes: int = 0
    """Leading sequences with one query token and one sample."""
    ended: set[int] = field(default_factory=set)
    """Ids of sequences that have ended since."""
    stale: set[int] = field(default_factory=set)
    """Ids of sequences that were preempted since: the keys and values that the step gave them are
    not in their blocks any more. What it drew for them counts."""


@dataclass(slots=True)
class Draft:
    """What the next step has so far."""

    budget: StepBudget
    decodes: list[Sequence] = field(default_factory=list)
    """Those that needed no block, in order."""
    late_decodes: list[Sequence] = field(default_factory=list)
    """Others with one query token."""
    prompts: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Query tokens of each of `prompts`."""
    samples: list[int] = field(default_factory=list)
    """Tokens that each of `prompts` draws."""
    new_blocks: list[tuple[int, ...]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    records: list[SequenceRecord] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing would run."""
        return not (self.decodes or self.late_decodes or self.prompts)

    def run(self, sequence: Sequence, count: int, new_blocks: list[int]) -> None:
        """Let a sequence compute `count` tokens more, for which it has the blocks."""
        left = sequence.num_left
        if left == 1:
            self.decode(sequence, new_blocks)
            return
        self.prompts.append(sequence)
        self.counts.append(count)
        self.samples.append(int(count == left))
        self.budget.take(sequence, sequence.num_planned, count)
        sequence.num_planned += count
        sequence.num_left = max(1, left - count)  # where it draws, the drawn token is left
        if new_blocks:
            self.new_blocks.append((sequence.row, *new_blocks))

    def decode(self, sequence: Sequence, new_blocks: list[int]) -> None:
        """The same for one that has one token left."""
        self.late_decodes.append(sequence)
        self.budget.num_tokens -= 1
        sequence.num_planned += 1
        if new_blocks:
            self.new_blocks.append((sequence.row, *new_blocks))

    def admit(self, sequence: Sequence) -> None:
        """A sequence got its row and its first blocks."""
        self.admitted.append(sequence)
        self.records.append(sequence.record())

    def withdraw(self, sequence: Sequence) -> None:
        """Leave out a sequence that is preempted: if it is in, it is the last of `decodes`."""
        if self.decodes and self.decodes[-1] is sequence:
            self.decodes.pop()
            self.budget.num_tokens += 1
            sequence.num_planned -= 1

    def scheduled(
        self, step_id: int, released: Iterable[int], dropped: Mapping[int, int], moves: Moves
    ) -> Scheduled:
        """The finished step."""
        decodes = self.decodes + self.late_decodes
        sequences = decodes + self.prompts
        ones = (1,) * len(decodes)
        plan = StepPlan(
            step_id,
            tuple([sequence.row for sequence in sequences]),
            (*ones, *self.counts),
            (*ones, *self.samples),
            tuple(self.new_blocks),
            tuple(dropped.items()),
            tuple(released),
            tuple(moves.copies),
            tuple(moves.to_host),
            tuple(moves.from_host),
        )
        return Scheduled(
            tuple(self.records), plan, tuple(sequences), tuple(self.admitted), len(decodes)
        )
