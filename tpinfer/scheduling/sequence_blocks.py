"""The blocks of sequences: growing, sharing, sliding, moving to host memory and back.

Everything that a plan must tell the ranks about blocks is collected here until the plan is issued.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from tpinfer.scheduling.block_pool import BlockPool
from tpinfer.scheduling.host_tier import HostTier
from tpinfer.scheduling.limits import SchedulerLimits, SchedulerStats
from tpinfer.scheduling.prefix_cache import PrefixIndex, block_key, chain_keys, root_key
from tpinfer.scheduling.request import NEVER, Sequence


@dataclass(slots=True)
class Moves:
    """Copies of whole blocks that the next plan makes, in the order a rank makes them."""

    to_host: list[tuple[int, int]] = field(default_factory=list)
    from_host: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Hit:
    """A prefix that can be taken over: blocks [first, stop) of a sequence, None where the content
    is in host memory; what lies before `first` is behind every window."""

    first: int
    stop: int
    blocks: tuple[int | None, ...]


NO_HIT = Hit(0, 0, ())


class SequenceBlocks:
    """Tables, references and content of all blocks."""

    def __init__(self, limits: SchedulerLimits, stats: SchedulerStats) -> None:
        self._limits = limits
        self._size = limits.block_size
        self._window = limits.window
        self._caching = limits.prefix_caching
        self._stats = stats
        self.reset()

    def reset(self) -> None:
        """Nobody holds a block and no block holds anything."""
        limits = self._limits
        self.pool = BlockPool(limits.num_blocks, limits.num_groups, self._evicted)
        self.index = PrefixIndex(limits.num_blocks)
        self.host = HostTier(limits.num_host_blocks, limits.num_groups)
        self._moves = Moves()

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
        return min(count, (place + self.pool.most(place, wanted)) * size - start)

    def most_hits(self, sequence: Sequence) -> int:
        """Blocks of a waiting sequence that it could take over: all full ones short of its last
        token, as far as their keys are known."""
        return min((sequence.num_tokens - 1) // self._size, len(sequence.keys))

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
            if not self.pool.extend(held[-1]):
                room = -(-sequence.max_context // size) - len(held)
                found = self.pool.take_one(len(held), room)
                if found is None:
                    return None
                block = found
            held.append(block)
            taken.append(block)
        sequence.free_until = min(len(held) * size, sequence.max_context)
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
        taken = self.pool.take(count, first, held[-1] if held else None, max(room, count))
        held += taken
        return taken

    def slide(self, sequence: Sequence) -> int:
        """Let go of blocks that the next query no longer sees; returns how many."""
        first = self.first_needed(sequence.num_planned)
        count = first - sequence.num_dropped_blocks
        if count <= 0:
            return 0
        self._release(sequence.blocks[:count])
        del sequence.blocks[:count]
        sequence.num_dropped_blocks = first
        return count

    def release(self, sequence: Sequence) -> None:
        """Let go of everything a sequence holds, in device and host memory."""
        self._release(reversed(sequence.blocks))  # the end of a prefix is the first to go
        sequence.blocks = []
        if sequence.host_blocks:
            self.host.release(sequence.host_blocks)
            sequence.host_blocks = []
        sequence.num_dropped_blocks = 0

    def forget(self, sequence: Sequence) -> None:
        """Let nobody find the content of a sequence's blocks: it may not be numbers."""
        for block in sequence.blocks:
            self.index.remove(block)
        for place, key in enumerate(sequence.keys):
            self.host.forget(key, place)

    # -- content -------------------------------------------------------------------------------

    def know_keys(self, sequence: Sequence) -> None:
        """Compute the keys of all full blocks of tokens whose values are on the host."""
        keys, size = sequence.keys, self._size
        count = sequence.num_tokens // size
        if not self._caching or count <= len(keys):
            return
        parent = keys[-1] if keys else root_key(sequence.cache_salt, sequence.adapter)
        start = len(keys) * size - len(sequence.prompt_token_ids)
        if start >= 0 and count == len(keys) + 1:  # the short way, for a decode
            keys.append(block_key(parent, sequence.token_ids[start : start + size]))
        else:
            keys += chain_keys(parent, sequence.tokens(len(keys) * size, count * size), size)

    def register(self, sequence: Sequence) -> list[bytes]:
        """Put blocks that are full of committed tokens into the prefix cache; returns the keys."""
        first, stop = sequence.num_registered, sequence.num_computed // self._size
        keys, dropped = sequence.keys, sequence.num_dropped_blocks
        if stop > len(keys):
            self.know_keys(sequence)
        held = max(first, dropped)
        if held == stop - 1:  # the short way, for a decode
            self.index.insert_one(keys[held], sequence.blocks[held - dropped])
        elif held < stop:
            self.index.insert(keys[held:stop], sequence.blocks[held - dropped : stop - dropped])
        sequence.num_registered = stop
        return keys[first:stop]

    def find(self, sequence: Sequence) -> Hit:
        """The longest prefix of a waiting sequence that can be taken over, short of its last
        token."""
        if not self._caching:
            return NO_HIT
        self.know_keys(sequence)
        keys, most = sequence.keys, self.most_hits(sequence)
        if self._window is None:
            stop = 0
            while stop < most and self._has(keys[stop], stop):
                stop += 1
            first = 0
        else:
            first, stop = self._find_behind_window(keys, most)
        return Hit(first, stop, tuple(self.index.find(key) for key in keys[first:stop]))

    def take_over(self, sequence: Sequence, hit: Hit, stop: int, spare: int) -> bool:
        """Give a waiting sequence the blocks of `hit` and those that tokens up to `stop` need.

        Returns False, having changed nothing, when they are not there with `spare` others to
        remain.
        """
        pool, size = self.pool, self._size
        found = [block for block in hit.blocks if block is not None]
        for block in found:
            pool.share(block)
        last = -(-stop // size)
        absent = [place for place, b in enumerate(hit.blocks, hit.first) if b is None]
        if not pool.fits([*absent, *range(hit.stop, last)], spare):
            self._release(reversed(found))
            return False
        sequence.num_dropped_blocks = hit.first
        # All are named before any block is taken: what is evicted for them takes none of theirs.
        saved = [self.host.fetch(sequence.keys[place], place) for place in absent]
        held = sequence.blocks = []
        for place, block in enumerate(hit.blocks, hit.first):
            if block is None:
                (block,) = pool.take(1, place, held[-1] if held else None)
                self.index.insert_one(sequence.keys[place], block)
            held.append(block)
        self._moves.from_host += zip(saved, (held[p - hit.first] for p in absent), strict=True)
        self._stats.num_blocks_fetched += len(saved)
        sequence.num_registered = hit.stop
        sequence.num_computed = sequence.num_planned = hit.stop * size
        sequence.num_left -= hit.stop * size
        self.grow(sequence, stop)
        return True

    def fork(self, source: Sequence, sibling: Sequence, spare: int) -> bool:
        """Give a waiting sibling the prompt's blocks of `source`: full ones by reference, and a
        copy of the one in which it goes on at the prompt's last token.

        Returns False, having changed nothing, when `source` no longer holds them or a block for
        the copy and `spare` others are not there.
        """
        position, size = len(sibling.prompt_token_ids) - 1, self._size
        first, stop = self.first_needed(position), position // size
        dropped = source.num_dropped_blocks
        if source.row < 0 or source.num_computed < position or dropped > first:
            return False
        if not self.pool.fits([stop], spare):
            return False
        shared = source.blocks[first - dropped : stop - dropped]
        for block in shared:
            self.pool.share(block)
        sibling.blocks, sibling.num_dropped_blocks = shared, first
        sibling.num_computed = sibling.num_planned = position
        sibling.num_left = 1
        sibling.num_registered = stop
        self.grow(sibling, position + 1)
        if position % size:
            self._moves.copies.append((source.blocks[stop - dropped], sibling.blocks[-1]))
        return True

    # -- host memory ---------------------------------------------------------------------------

    def move_out(self, sequence: Sequence) -> bool:
        """Save all blocks of a sequence in host memory and let go of them; False when there is no
        room."""
        self.slide(sequence)
        blocks, dropped = sequence.blocks, sequence.num_dropped_blocks
        chosen = self.host.hold(blocks) if blocks else None
        if chosen is None:
            return False
        self._moves.to_host += zip(blocks, chosen, strict=True)
        self._stats.num_blocks_saved += len(blocks)
        self.release(sequence)
        sequence.host_blocks, sequence.num_dropped_blocks = chosen, dropped
        return True

    def move_in(self, sequence: Sequence, spare: int) -> bool:
        """Bring them back, with a block for one more token; False when the blocks are not there."""
        saved, first = sequence.host_blocks, sequence.num_dropped_blocks
        stop = -(-(sequence.num_planned + 1) // self._size)
        settled = self.host.is_settled(saved)
        if not settled or not self.pool.fits(range(first, max(stop, first + len(saved))), spare):
            return False
        room = -(-sequence.max_context // self._size) - first
        sequence.blocks = self.pool.take(len(saved), first, None, room)
        self._moves.from_host += zip(saved, sequence.blocks, strict=True)
        self._stats.num_blocks_fetched += len(saved)
        self.host.bring_back(saved)
        sequence.host_blocks = []
        sequence.num_registered = 0  # put in again when the step is committed
        return True

    def take_moves(self) -> Moves:
        """The copies of the plan that is issued now."""
        taken, self._moves = self._moves, Moves()
        self.host.settle()
        return taken

    def mark_borders(self, sequence: Sequence) -> None:
        """Note up to where a sequence that has a place in a step needs nothing from here."""
        until = 0
        if sequence.num_left == 1:
            dropped, size = sequence.num_dropped_blocks, self._size
            until = min((dropped + len(sequence.blocks)) * size, sequence.max_context)
            if self._window is not None:
                until = min(until, (dropped + 1) * size + self._window - 1)
        sequence.free_until = until

    def mark_full(self, sequence: Sequence) -> None:
        """Note when there will be something to do about what a sequence has computed."""
        full_at = (sequence.num_registered + 1) * self._size if self._caching else NEVER
        sequence.full_at = full_at
        sequence.border = min(full_at, sequence.max_context)
        if not sequence.token_ids:
            sequence.border = min(sequence.border, len(sequence.prompt_token_ids))

    def _find_behind_window(self, keys: list[bytes], most: int) -> tuple[int, int]:
        """The longest prefix of which what a window still sees is there, as [first, stop)."""
        stop = 0
        for place in range(most - 1, -1, -1):
            if not self._has(keys[place], place):
                stop = 0
                continue
            stop = stop or place + 1
            first = self.first_needed(stop * self._size)
            if place <= first:
                return first, stop
        return 0, 0

    def _has(self, key: bytes, place: int) -> bool:
        return self.index.find(key) is not None or self.host.find(key, place) is not None

    def _release(self, blocks: Iterable[int]) -> None:
        self.pool.release(blocks, self.index.key_of)

    def _evicted(self, block: int) -> None:
        key = self.index.remove(block)
        self._stats.num_evictions += 1
        if key is not None and self.host.num_blocks:
            chosen = self.host.keep(key, block)
            if chosen is not None:
                self._moves.to_host.append((block, chosen))
                self._stats.num_blocks_saved += 1
