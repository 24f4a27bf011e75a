"""Which KV blocks are free, which are kept for their content, and which are held and how often.

A block is in one of three states: free; cached (nobody holds it, its content can still be found,
least recently used first to go); referenced (held by one or more sequences). Block i belongs to
class i % num_groups: ranks that share KV heads keep one class each.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence

from tpinfer.scheduling.free_runs import FreeRuns

MOST_EVICTED_AHEAD = 8
"""Cached blocks given up at once when free ones run out, a 32nd of the cache at most: old
neighbours come back as one run."""


class BlockPool:
    """Blocks 0..num_blocks-1."""

    def __init__(
        self,
        num_blocks: int,
        num_groups: int = 1,
        on_evict: Callable[[int], None] = lambda block: None,
    ) -> None:
        """`on_evict` is told of each cached block that is given up, before it is taken again."""
        self.num_blocks = num_blocks
        self.num_groups = num_groups
        self.num_referenced = 0
        """Blocks that somebody holds."""
        self._runs = FreeRuns(num_blocks, num_groups)
        self._references = [0] * num_blocks
        self._evict_ahead = min(MOST_EVICTED_AHEAD, num_blocks // 32)
        self._cached: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_groups)]
        self._on_evict = on_evict

    @property
    def num_free(self) -> int:
        """Blocks nobody holds and whose content is of no use."""
        return sum(self._runs.num_free)

    @property
    def num_cached(self) -> int:
        """Blocks nobody holds whose content can still be found."""
        return sum(map(len, self._cached))

    @property
    def num_available(self) -> int:
        """Blocks that can be taken."""
        return self.num_blocks - self.num_referenced

    def references(self, block: int) -> int:
        """How many hold the block."""
        return self._references[block]

    def most(self, first: int, count: int) -> int:
        """How many of `count` blocks for a sequence's places `first`, `first + 1` ... are there."""
        groups = self.num_groups
        if groups == 1:
            return min(count, self.num_blocks - self.num_referenced)
        for number in range(groups):  # the first place of each class that goes without
            there = self._available((first + number) % groups)
            count = min(count, number + there * groups)
        return count

    def fits(self, places: Collection[int], spare: int = 0) -> bool:
        """Whether blocks for all `places` are there and `spare` others remain."""
        if self.num_groups == 1:
            return len(places) + spare <= self.num_available
        spare_by_class = -(-spare // self.num_groups)
        wanted = [0] * self.num_groups
        for place in places:
            wanted[place % self.num_groups] += 1
        return all(count + spare_by_class <= self._available(c) for c, count in enumerate(wanted))

    def take(
        self, count: int, first: int = 0, after: int | None = None, room: int = 0
    ) -> list[int]:
        """Take `count` blocks for a sequence's places `first`, `first + 1` ...

        They adjoin `after` if they can; a sequence that may grow to `room` more blocks is placed
        where it has room. Raises ValueError when fewer are there; callers ask `most` before.
        """
        there = self.most(first, count)
        if there < count:
            raise ValueError(
                f"{count} KV blocks asked for from place {first} on, {there} can be had: "
                f"{self.num_free} free and {self.num_cached} cached of {self.num_blocks} in "
                f"{self.num_groups} groups; admit a sequence only when its blocks are there"
            )
        self._evict_for(count, first)
        taken: list[int] = []
        for run in self._runs.take(count, first, after, room):
            self._references[run.start : run.stop] = [1] * len(run)
            taken += run
        self.num_referenced += count
        return taken

    def extend(self, block: int) -> bool:
        """Take the block behind a held one if it is free; False if it is not."""
        if not self._runs.take_at(block + 1):
            return False
        self._references[block + 1] = 1
        self.num_referenced += 1
        return True

    def take_one(self, place: int, room: int) -> int | None:
        """Take a block for a sequence's `place` that may grow to `room` blocks; None when there is
        none."""
        of_class = place % self.num_groups
        if not self._runs.num_free[of_class]:
            if not self._cached[of_class]:
                return None
            self._evict(of_class, 1)
        block = self._runs.take_one(place, room)
        self._references[block] = 1
        self.num_referenced += 1
        return block

    def share(self, block: int) -> None:
        """Hold a block that is cached or held already."""
        if not self._references[block]:
            del self._cached[block % self.num_groups][block]
            self.num_referenced += 1
        self._references[block] += 1

    def release(self, blocks: Iterable[int], content: Sequence[object]) -> None:
        """Let go of blocks; the last to do so frees one, or leaves it cached where `content` has
        something other than None at its place."""
        references, cached, groups = self._references, self._cached, self.num_groups
        of_one = cached[0] if groups == 1 else None
        num_left, freed = 0, []
        for block in blocks:
            references[block] = others = references[block] - 1
            if others:
                continue
            num_left += 1
            if content[block] is None:
                freed.append(block)
            elif of_one is not None:
                of_one[block] = None
            else:
                cached[block % groups][block] = None
        self.num_referenced -= num_left
        if freed:
            self._give_back(freed)

    def recount(self, held: Iterable[Sequence[int]]) -> None:
        """Raises RuntimeError unless `held`, the blocks of each holder, says what the pool says."""
        counted = [0] * self.num_blocks
        for blocks in held:
            for block in blocks:
                counted[block] += 1
        total = self.num_free + self.num_cached + self.num_referenced
        if counted != self._references or total != self.num_blocks:
            wrong = [b for b in range(self.num_blocks) if counted[b] != self._references[b]]
            raise RuntimeError(
                f"KV blocks do not add up: {self.num_free} free + {self.num_cached} cached + "
                f"{self.num_referenced} referenced of {self.num_blocks}; wrongly counted: {wrong}"
            )

    def _available(self, of_class: int) -> int:
        return self._runs.num_free[of_class] + len(self._cached[of_class])

    def _evict_for(self, count: int, first: int) -> None:
        groups = self.num_groups
        for number in range(min(count, groups)):
            of_class = (first + number) % groups
            wanted = (count - number + groups - 1) // groups
            if wanted > self._runs.num_free[of_class]:
                self._evict(of_class, wanted - self._runs.num_free[of_class])

    def _evict(self, of_class: int, count: int) -> None:
        cached = self._cached[of_class]
        evicted = []
        for _ in range(min(len(cached), max(count, self._evict_ahead))):
            block, _ = cached.popitem(last=False)
            self._on_evict(block)
            evicted.append(block)
        self._give_back(evicted)

    def _give_back(self, blocks: list[int]) -> None:
        """Free blocks, neighbours together."""
        blocks.sort()
        first = end = blocks[0]
        for block in blocks:
            if block != end:
                self._runs.give_back(first, end - first)
                first = block
            end = block + 1
        self._runs.give_back(first, end - first)
