"""The tables of sequences: growing, sliding, moving to host memory and back."""

from tpinfer.scheduling.block_store import BlockStore
from tpinfer.scheduling.limits import SchedulerLimits, SchedulerStats
from tpinfer.scheduling.request import Sequence


class SequenceBlocks:
    """Which blocks each sequence holds."""

    def __init__(self, limits: SchedulerLimits, store: BlockStore, stats: SchedulerStats) -> None:
        self._size = limits.block_size
        self._window = limits.window
        self._store = store
        self._stats = stats

    def first_needed(self, position: int) -> int:
        """First block that a query at `position` looks at."""
        if self._window is None:
            return 0
        return max(0, position - self._window + 1) // self._size

    def most(self, sequence: Sequence, count: int) -> int:
        """How many of the next `count` tokens of a sequence have blocks, or can be given them."""
        size, start = self._size, sequence.num_planned
        place = sequence.num_dropped_blocks + len(sequence.blocks)
        wanted = -(-(start + count) // size) - place
        if wanted <= 0:
            return count
        return min(count, (place + self._store.pool.most(place, wanted)) * size - start)

    def owed(self, sequence: Sequence) -> int:
        """Blocks that the rest of a running sequence's prompt takes."""
        held = sequence.num_dropped_blocks + len(sequence.blocks)
        return max(0, -(-sequence.num_known // self._size) - held)

    def extend(self, sequence: Sequence) -> list[int] | None:
        """The short way for a decode: take the block that the next token needs, or none if none is
        needed, and note the border. None where `slide`, `most`, `grow` and `mark_borders` must see
        to it."""
        held, size = sequence.blocks, self._size
        if self._window is not None or not held:
            return None
        taken = []
        if sequence.num_planned >= len(held) * size:
            block = held[-1] + 1
            if not self._store.pool.extend(held[-1]):
                room = -(-sequence.max_context // size) - len(held)
                found = self._store.pool.take_one(len(held), room)
                if found is None:
                    return None
                block = found
            held.append(block)
            taken.append(block)
        until = len(held) * size
        sequence.free_until = until if until < sequence.max_context else sequence.max_context
        return taken

    def grow(self, sequence: Sequence, stop: int) -> list[int]:
        """Take the blocks that tokens up to `stop` still need; returns them."""
        size, held = self._size, sequence.blocks
        first = sequence.num_dropped_blocks + len(held)
        count = -(-stop // size) - first
        if count <= 0:
            return []
        most = sequence.max_context if self._window is None else self._window + stop
        room = -(-min(most, sequence.max_context) // size) - first
        taken = self._store.pool.take(count, first, held[-1] if held else None, max(room, count))
        held += taken
        return taken

    def slide(self, sequence: Sequence) -> int:
        """Let go of blocks that the next query no longer sees; returns how many."""
        first = self.first_needed(sequence.num_planned)
        count = first - sequence.num_dropped_blocks
        if count <= 0:
            return 0
        self._store.release(sequence.blocks[:count])
        del sequence.blocks[:count]
        sequence.num_dropped_blocks = first
        return count

    def release(self, sequence: Sequence) -> None:
        """Let go of everything a sequence holds, in device and host memory."""
        self._store.release(reversed(sequence.blocks))  # the end of a prefix is the first to go
        sequence.blocks = []
        if sequence.host_blocks:
            self._store.host.release(sequence.host_blocks)
            sequence.host_blocks = []
        sequence.num_dropped_blocks = 0

    def mark_borders(self, sequence: Sequence) -> None:
        """Note up to where a sequence that has a place in a step needs nothing from here."""
        until = 0
        if sequence.num_left == 1:
            dropped, size = sequence.num_dropped_blocks, self._size
            until = min((dropped + len(sequence.blocks)) * size, sequence.max_context)
            if self._window is not None:
                until = min(until, (dropped + 1) * size + self._window - 1)
        sequence.free_until = until

    # -- host memory ---------------------------------------------------------------------------

    def move_out(self, sequence: Sequence) -> bool:
        """Save all blocks of a sequence in host memory and let go of them; False when there is no
        room."""
        self.slide(sequence)
        blocks, dropped = sequence.blocks, sequence.num_dropped_blocks
        chosen = self._store.host.hold(blocks) if blocks else None
        if chosen is None:
            return False
        self._store.moves.to_host += zip(blocks, chosen, strict=True)
        self._stats.num_blocks_saved += len(blocks)
        self.release(sequence)
        sequence.host_blocks, sequence.num_dropped_blocks = chosen, dropped
        return True

    def move_in(self, sequence: Sequence, spare: int) -> bool:
        """Bring them back, with a block for one more token; False when the blocks are not there."""
        saved, first = sequence.host_blocks, sequence.num_dropped_blocks
        stop = -(-(sequence.num_planned + 1) // self._size)
        settled = self._store.host.is_settled(saved)
        if not settled or not self._store.pool.fits(
            range(first, max(stop, first + len(saved))), spare
        ):
            return False
        room = -(-sequence.max_context // self._size) - first
        sequence.blocks = self._store.pool.take(len(saved), first, None, room)
        self._store.moves.from_host += zip(saved, sequence.blocks, strict=True)
        self._stats.num_blocks_fetched += len(saved)
        self._store.host.bring_back(saved)
        sequence.host_blocks = []
        sequence.num_registered = 0  # put in again when the step is committed
        return True
