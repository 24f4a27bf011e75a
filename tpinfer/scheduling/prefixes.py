"""What sequences compute, put where others find it, and take over from others: full blocks of
committed tokens by their keys, and the prompt of another continuation.
"""

from dataclasses import dataclass

from tpinfer.scheduling.block_store import BlockStore
from tpinfer.scheduling.limits import SchedulerLimits, SchedulerStats
from tpinfer.scheduling.prefix_cache import block_key, chain_keys, root_key
from tpinfer.scheduling.request import NEVER, Sequence
from tpinfer.scheduling.sequence_blocks import SequenceBlocks


@dataclass(frozen=True, slots=True)
class Hit:
    """A prefix that can be taken over: blocks [first, stop) of a sequence, None where the content
    is in host memory; what lies before `first` is behind every window."""

    first: int
    stop: int
    blocks: tuple[int | None, ...]


NO_HIT = Hit(0, 0, ())


class Prefixes:
    """What is shared among sequences."""

    def __init__(
        self,
        limits: SchedulerLimits,
        store: BlockStore,
        blocks: SequenceBlocks,
        stats: SchedulerStats,
    ) -> None:
        self._size = limits.block_size
        self._window = limits.window
        self._caching = limits.prefix_caching
        self._store = store
        self._blocks = blocks
        self._stats = stats

    def know_keys(self, sequence: Sequence) -> None:
        """Compute the keys of all full blocks of tokens whose values are on the host."""
        keys, size = sequence.keys, self._size
        count = sequence.num_tokens // size
        if self._caching and count > len(keys):
            parent = keys[-1] if keys else root_key(sequence.cache_salt, sequence.adapter)
            keys += chain_keys(parent, sequence.tokens(len(keys) * size, count * size), size)

    def register(self, sequence: Sequence) -> list[bytes]:
        """Put blocks that are full of committed tokens into the prefix cache; returns the keys."""
        size, keys, dropped = self._size, sequence.keys, sequence.num_dropped_blocks
        first, stop = sequence.num_registered, sequence.num_computed // size
        if stop > len(keys):
            start = (stop - 1) * size - len(sequence.prompt_token_ids)
            if start >= 0 and stop - 1 == len(keys) > 0:  # the short way, for a decode
                keys.append(block_key(keys[-1], sequence.token_ids[start : start + size]))
            else:
                self.know_keys(sequence)
        held = max(first, dropped)
        if held == stop - 1:  # the short way, for a decode
            self._store.index.insert_one(keys[held], sequence.blocks[held - dropped])
        elif held < stop:
            self._store.index.insert(
                keys[held:stop], sequence.blocks[held - dropped : stop - dropped]
            )
        sequence.num_registered = stop
        return keys[first:stop]

    def mark_full(self, sequence: Sequence) -> None:
        """Note when there will be something to do about what a sequence has computed."""
        full_at = (sequence.num_registered + 1) * self._size if self._caching else NEVER
        border = sequence.max_context if sequence.token_ids else len(sequence.prompt_token_ids)
        sequence.full_at = full_at
        sequence.border = full_at if full_at < border else border

    def forget(self, sequence: Sequence) -> None:
        """Let nobody find the content of a sequence's blocks: it may not be numbers."""
        for block in sequence.blocks:
            self._store.index.remove(block)
        for place, key in enumerate(sequence.keys):
            self._store.host.forget(key, place)

    # -- taking over ---------------------------------------------------------------------------

    def most_hits(self, sequence: Sequence) -> int:
        """Blocks of a waiting sequence that it could take over: all full ones short of its last
        token, as far as their keys are known."""
        return min((sequence.num_tokens - 1) // self._size, len(sequence.keys))

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
        return Hit(first, stop, tuple(self._store.index.find(key) for key in keys[first:stop]))

    def take_over(self, sequence: Sequence, hit: Hit, stop: int, spare: int) -> bool:
        """Give a waiting sequence the blocks of `hit` and those that tokens up to `stop` need.

        Returns False, having changed nothing, when they are not there with `spare` others to
        remain.
        """
        pool, size = self._store.pool, self._size
        found = [block for block in hit.blocks if block is not None]
        for block in found:
            pool.share(block)
        last = -(-stop // size)
        absent = [place for place, b in enumerate(hit.blocks, hit.first) if b is None]
        if not pool.fits([*absent, *range(hit.stop, last)], spare):
            self._store.release(reversed(found))
            return False
        sequence.num_dropped_blocks = hit.first
        # All are named before any block is taken: what is evicted for them takes none of theirs.
        saved = [self._store.host.fetch(sequence.keys[place], place) for place in absent]
        held = sequence.blocks = []
        for place, block in enumerate(hit.blocks, hit.first):
            if block is None:
                (block,) = pool.take(1, place, held[-1] if held else None)
                self._store.index.insert_one(sequence.keys[place], block)
            held.append(block)
        self._store.moves.from_host += zip(
            saved, (held[p - hit.first] for p in absent), strict=True
        )
        self._stats.num_blocks_fetched += len(saved)
        sequence.num_registered = hit.stop
        sequence.num_computed = sequence.num_planned = hit.stop * size
        sequence.num_left -= hit.stop * size
        self._blocks.grow(sequence, stop)
        return True

    def fork(self, source: Sequence, sibling: Sequence, spare: int) -> bool:
        """Give a waiting sibling the prompt's blocks of `source`: full ones by reference, and a
        copy of the one in which it goes on at the prompt's last token.

        Returns False, having changed nothing, when `source` no longer holds them or a block for
        the copy and `spare` others are not there.
        """
        position, size = len(sibling.prompt_token_ids) - 1, self._size
        first, stop = self._blocks.first_needed(position), position // size
        dropped = source.num_dropped_blocks
        if source.row < 0 or source.num_computed < position or dropped > first:
            return False
        if not self._store.pool.fits([stop], spare):
            return False
        shared = source.blocks[first - dropped : stop - dropped]
        for block in shared:
            self._store.pool.share(block)
        sibling.blocks, sibling.num_dropped_blocks = shared, first
        sibling.num_computed = sibling.num_planned = position
        sibling.num_left = 1
        sibling.num_registered = stop
        self._blocks.grow(sibling, position + 1)
        if position % size:
            self._store.moves.copies.append((source.blocks[stop - dropped], sibling.blocks[-1]))
        return True

    def _find_behind_window(self, keys: list[bytes], most: int) -> tuple[int, int]:
        """The longest prefix of which what a window still sees is there, as [first, stop)."""
        stop = 0
        for place in range(most - 1, -1, -1):
            if not self._has(keys[place], place):
                stop = 0
                continue
            stop = stop or place + 1
            first = self._blocks.first_needed(stop * self._size)
            if place <= first:
                return first, stop
        return 0, 0

    def _has(self, key: bytes, place: int) -> bool:
        return (
            self._store.index.find(key) is not None or self._store.host.find(key, place) is not None
        )
