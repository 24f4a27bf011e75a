"""What the parts of the scheduler work on together."""

from collections import deque
from dataclasses import dataclass, field

from tpinfer.scheduling.block_store import BlockStore
from tpinfer.scheduling.budget import StepCosts
from tpinfer.scheduling.draft import Scheduled
from tpinfer.scheduling.limits import SchedulerLimits, SchedulerStats
from tpinfer.scheduling.prefixes import Prefixes
from tpinfer.scheduling.request import Sequence
from tpinfer.scheduling.rows import RunningRows
from tpinfer.scheduling.sequence_blocks import SequenceBlocks
from tpinfer.scheduling.waiting import WaitingQueue


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """One scheduler's sequences, rows and blocks."""

    limits: SchedulerLimits
    costs: StepCosts | None
    stats: SchedulerStats
    rows: RunningRows
    store: BlockStore
    blocks: SequenceBlocks
    prefixes: Prefixes
    waiting: WaitingQueue = field(default_factory=WaitingQueue)
    unfinished: dict[int, Sequence] = field(default_factory=dict)
    """By id."""
    in_flight: deque[Scheduled] = field(default_factory=deque)
    """Steps that were planned and not committed, the oldest first."""


def made_state(limits: SchedulerLimits, costs: StepCosts | None) -> SchedulerState:
    """That of a scheduler without requests."""
    stats = SchedulerStats()
    store = BlockStore(limits, stats)
    blocks = SequenceBlocks(limits, store, stats)
    prefixes = Prefixes(limits, store, blocks, stats)
    return SchedulerState(
        limits, costs, stats, RunningRows(limits.max_num_seqs), store, blocks, prefixes
    )
