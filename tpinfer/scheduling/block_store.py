"""All blocks of a cache: which are free, what they hold, the host tier behind them, and the copies
of whole blocks that the next plan makes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from tpinfer.scheduling.block_pool import BlockPool
from tpinfer.scheduling.host_tier import HostTier
from tpinfer.scheduling.limits import SchedulerLimits, SchedulerStats
from tpinfer.scheduling.prefix_cache import PrefixIndex


@dataclass(slots=True)
class Moves:
    """Copies of whole blocks that the next plan makes, in the order a rank makes them."""

    to_host: list[tuple[int, int]] = field(default_factory=list)
    from_host: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class BlockStore:
    """Blocks in device and host memory, whoever's they are."""

    def __init__(self, limits: SchedulerLimits, stats: SchedulerStats) -> None:
        self._limits = limits
        self._stats = stats
        self.reset()

    def reset(self) -> None:
        """Nobody holds a block and no block holds anything."""
        limits = self._limits
        self.pool = BlockPool(limits.num_blocks, limits.num_groups, self._evicted)
        self.index = PrefixIndex(limits.num_blocks)
        self.host = HostTier(limits.num_host_blocks, limits.num_groups)
        self.moves = Moves()

    def release(self, blocks: Iterable[int]) -> None:
        """Let go of blocks; those whose content can be found stay cached."""
        self.pool.release(blocks, self.index.key_of)

    def take_moves(self) -> Moves:
        """The copies of the plan that is issued now."""
        taken, self.moves = self.moves, Moves()
        self.host.settle()
        return taken

    def _evicted(self, block: int) -> None:
        key = self.index.remove(block)
        self._stats.num_evictions += 1
        if key is not None and self.host.num_blocks:
            chosen = self.host.keep(key, block)
            if chosen is not None:
                self.moves.to_host.append((block, chosen))
                self._stats.num_blocks_saved += 1
