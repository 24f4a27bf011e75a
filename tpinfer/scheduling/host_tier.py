"""Blocks of host memory: evicted prefixes, kept until room is needed, and the blocks of sequences
that were moved out.

Host block h belongs to class h % num_groups like the device blocks it is copied from and to. A
plan saves before it fetches and names a host block at most once, so whatever the plan in
preparation touches stays as it is until that plan is issued (`settle`).
"""

from collections import OrderedDict
from collections.abc import Iterable


class HostTier:
    """Host blocks 0..num_blocks-1."""

    def __init__(self, num_blocks: int, num_groups: int) -> None:
        self.num_blocks = num_blocks
        self._num_groups = num_groups
        self._free = [list(range(c, num_blocks, num_groups))[::-1] for c in range(num_groups)]
        self._cached: list[OrderedDict[bytes, int]] = [OrderedDict() for _ in range(num_groups)]
        self._held: set[int] = set()
        self._saved: set[int] = set()
        self._fetched: set[int] = set()
        self._leaving: list[int] = []  # free once the plan is issued

    @property
    def num_free(self) -> int:
        """Host blocks without content."""
        return sum(map(len, self._free)) + len(self._leaving)

    @property
    def num_cached(self) -> int:
        """Host blocks that keep a prefix."""
        return sum(map(len, self._cached))

    @property
    def num_held(self) -> int:
        """Host blocks of sequences that were moved out."""
        return len(self._held)

    def find(self, key: bytes, place: int) -> int | None:
        """The host block that keeps the prefix of `key`, which ends in a sequence's `place`, unless
        it is only being saved."""
        found = self._cached[place % self._num_groups].get(key)
        return None if found is None or found in self._saved else found

    def keep(self, key: bytes, block: int) -> int | None:
        """Choose a host block for the content of an evicted `block`; None when it is kept already
        or there is no room."""
        of_class = block % self._num_groups
        cached = self._cached[of_class]
        if key in cached:
            cached.move_to_end(key)
            return None
        found = self._take(of_class)
        if found is not None:
            cached[key] = found
            self._saved.add(found)
        return found

    def fetch(self, key: bytes, place: int) -> int:
        """Use the host block of a prefix that `find` has found; it is kept."""
        cached = self._cached[place % self._num_groups]
        cached.move_to_end(key)
        self._fetched.add(cached[key])
        return cached[key]

    def forget(self, key: bytes, place: int) -> None:
        """Drop a prefix, if it is kept."""
        found = self._cached[place % self._num_groups].pop(key, None)
        if found is not None:
            self._let_go(found)

    def hold(self, blocks: Iterable[int]) -> list[int] | None:
        """Host blocks for the content of each of `blocks`; None when there are not enough."""
        chosen: list[int] = []
        for block in blocks:
            found = self._take(block % self._num_groups)
            if found is None:
                for one in chosen:
                    self._let_go(one)
                return None
            chosen.append(found)
        self._held.update(chosen)
        self._saved.update(chosen)
        return chosen

    def is_settled(self, host_blocks: Iterable[int]) -> bool:
        """Whether none of them is only being saved."""
        return self._saved.isdisjoint(host_blocks)

    def bring_back(self, host_blocks: list[int]) -> None:
        """The plan in preparation fetches them; they are free behind it."""
        self._fetched.update(host_blocks)
        self.release(host_blocks)

    def release(self, host_blocks: list[int]) -> None:
        """Free the host blocks of a sequence that was moved out."""
        self._held.difference_update(host_blocks)
        for block in host_blocks:
            self._let_go(block)

    def settle(self) -> None:
        """The plan in preparation was issued."""
        self._saved.clear()
        self._fetched.clear()
        for block in self._leaving:
            self._free[block % self._num_groups].append(block)
        self._leaving.clear()

    def _let_go(self, block: int) -> None:
        if block in self._saved or block in self._fetched:
            self._leaving.append(block)
        else:
            self._free[block % self._num_groups].append(block)

    def _take(self, of_class: int) -> int | None:
        if self._free[of_class]:
            return self._free[of_class].pop()
        cached = self._cached[of_class]
        for key, block in cached.items():  # least recently used first
            if block not in self._saved and block not in self._fetched:
                del cached[key]
                return block
        return None
