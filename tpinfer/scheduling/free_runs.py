"""Free KV blocks, kept as runs of adjoining ids, so that a sequence's blocks adjoin where they can:
such a run is read without a gather.

Every operation is a few dictionary look-ups, whatever the size of the cache; runs are filed under
the bit length of their size, and the longest are taken from first.
"""


class FreeRuns:
    """Free ones among the blocks 0..num_blocks-1. Block i is of class i % num_groups."""

    def __init__(self, num_blocks: int, num_groups: int) -> None:
        self._num_groups = num_groups
        self.num_free = [len(range(c, num_blocks, num_groups)) for c in range(num_groups)]
        """Free blocks by class."""
        self._is_free = bytearray(b"\1") * num_blocks
        self._end: dict[int, int] = {}  # first block of a run -> the block behind it
        self._start: dict[int, int] = {}  # block behind a run -> its first block
        self._by_size: list[dict[int, None]] = [{} for _ in range(num_blocks.bit_length() + 1)]
        self._sizes = 0  # bit k: some run's size has bit length k
        self._open(0, num_blocks)

    def give_back(self, block: int, count: int = 1) -> None:
        """Free `count` blocks from `block` on."""
        start, end, stop = self._start.get(block, block), block + count, block + count
        if start != block:
            self._close(start)
        if stop in self._end:
            stop = self._close(stop)
        self._open(start, stop)
        self._is_free[block:end] = b"\1" * count
        groups = self._num_groups
        if groups == 1:
            self.num_free[0] += count
            return
        for first in range(block, min(end, block + groups)):  # one of each class, for all of it
            self.num_free[first % groups] += len(range(first, end, groups))

    def take_at(self, block: int) -> bool:
        """Take one block if it is the first of a run, as one behind a held block is if it is free;
        False if it is not."""
        end = self._end.get(block)
        if end is None:
            return False
        size, rest = (end - block).bit_length(), block + 1
        if rest < end and (end - rest).bit_length() == size:  # the run stays where it is filed
            bucket = self._by_size[size]
            del bucket[block], self._end[block]
            bucket[rest] = None
            self._end[rest], self._start[end] = end, rest
        else:
            self._open(rest, self._close(block))
        self._is_free[block] = 0
        self.num_free[block % self._num_groups] -= 1
        return True

    def take(self, count: int, first: int, after: int | None, room: int) -> list[range]:
        """Take `count` blocks of the classes `first`, `first + 1` ... modulo the number of groups.

        They adjoin `after` if that is free; else they start where, grown to `room` blocks, they
        would end with the longest free run, so that neighbours grow towards each other last. The
        caller has seen that enough are free in each class.
        """
        taken: list[range] = []
        num_taken = 0
        while num_taken < count:
            wanted = count - num_taken
            if after is not None and after + 1 in self._end:
                start = at = after + 1
                end = self._end[start]
            else:
                start, at, end = self._place(first + num_taken, max(room - num_taken, wanted))
            # Adjoining ids step through the classes as logical blocks do.
            stop = min(at + wanted, end)
            self._carve(start, at, stop)
            taken.append(range(at, stop))
            num_taken += stop - at
            after = stop - 1
        return taken

    def take_one(self, place: int, room: int) -> int:
        """The same for one block that adjoins none."""
        start, at, _ = self._place(place, max(room, 1))
        if start != at or not self.take_at(at):
            self._carve(start, at, at + 1)
        return at

    def _place(self, first: int, room: int) -> tuple[int, int, int]:
        """(start of a run, where to begin in it, its end)."""
        groups = self._num_groups
        bucket = self._by_size[self._sizes.bit_length() - 1]
        start, _ = bucket.popitem()  # the last one, in constant time
        bucket[start] = None
        end = self._end[start]
        at = max(start, end - room)
        at -= (at - first) % groups
        if at < start:
            at += groups
        if at < end:
            return start, at, end
        # Only short runs are left, and the longest lacks the class.
        wanted = first % groups
        block = wanted + groups * self._is_free[wanted::groups].find(1)
        start = self._is_free.rfind(0, 0, block) + 1
        return start, block, self._end[start]

    def _carve(self, start: int, at: int, stop: int) -> None:
        end = self._close(start)
        self._open(start, at)
        self._open(stop, end)
        self._is_free[at:stop] = bytes(stop - at)
        groups = self._num_groups
        for block in range(at, min(stop, at + groups)):  # one of each class, for all of it
            self.num_free[block % groups] -= len(range(block, stop, groups))

    def _open(self, start: int, end: int) -> None:
        if start < end:
            self._end[start], self._start[end] = end, start
            size = (end - start).bit_length()
            self._by_size[size][start] = None
            self._sizes |= 1 << size

    def _close(self, start: int) -> int:
        end = self._end.pop(start)
        del self._start[end]
        size = (end - start).bit_length()
        bucket = self._by_size[size]
        del bucket[start]
        if not bucket:
            self._sizes &= ~(1 << size)
        return end
