"""Which rank holds a KV block, and under which number of its own: the one rule that allocator,
attention and ledger share.

Blocks are numbered once for all ranks. Where g ranks share a KV head without copies, block b lies
on the rank at place b mod g among them only, as its local block b // g; g = 1 is every rank holding
its heads of every block. The allocator gives logical block j of a sequence a block of class j mod
g, so that a rank knows from its place alone which positions of a sequence it holds, and so that
blocks g apart adjoin in its memory.
"""

from dataclasses import dataclass


def owner(block: int, group_size: int) -> int:
    """Place, among the `group_size` ranks that share a KV head, of the one that holds `block`."""
    return block % group_size


def block_class(logical_block: int, group_size: int) -> int:
    """What `owner` must say of the block that a sequence's `logical_block` is kept in."""
    return logical_block % group_size


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One rank's view of the numbered blocks. Host blocks follow the same rule."""

    block_size: int
    """Tokens a block."""
    num_blocks: int
    """Blocks of all ranks that share a KV head together."""
    group_size: int = 1
    """Ranks that share a KV head without copies."""
    place: int = 0
    """This rank's index among them."""
    has_spare: bool = False
    """Whether there is a spare slot also where this rank holds all blocks: padded rows of recorded
    steps write there."""

    @property
    def num_local_blocks(self) -> int:
        """Blocks that the fullest of those ranks holds: every rank has room for as many."""
        return -(-self.num_blocks // self.group_size)

    @property
    def num_slots(self) -> int:
        """Slots of a rank: those of its blocks, and a spare one where it is needed."""
        needs_spare = self.has_spare or self.group_size > 1
        return self.num_local_blocks * self.block_size + needs_spare

    @property
    def spare_slot(self) -> int:
        """Where a rank writes what another one keeps; nobody reads it."""
        return self.num_local_blocks * self.block_size

    def holds(self, block: int) -> bool:
        """Whether this rank stores `block`."""
        return owner(block, self.group_size) == self.place

    def local_block(self, block: int) -> int:
        """Number, on the rank that holds it, of `block`."""
        return block // self.group_size

    def holds_logical(self, logical_block: int) -> bool:
        """Whether this rank stores the `logical_block`th block of every sequence."""
        return block_class(logical_block, self.group_size) == self.place
