"""Which KV blocks are free. Hands out runs of adjoining blocks where it can: a run is read
without a gather."""

from collections.abc import Iterable

from tpinfer.sharding.kv_layout import block_class, owner


class BlockPool:
    """Blocks 0..num_blocks-1, each free or held by one sequence."""

    def __init__(self, num_blocks: int, group_size: int = 1) -> None:
        """`group_size` ranks share a KV head's blocks out, so that blocks have a class."""
        self.num_blocks = num_blocks
        self._group_size = group_size
        self._free = set(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def take(self, count: int, after: int | None = None, first_logical: int = 0) -> tuple[int, ...]:
        """Take `count` blocks: those right behind `after` if free, else the first run long
        enough, else any; of the classes that logical blocks from `first_logical` on need.

        Raises ValueError when fewer are free; callers reserve before they take.
        """
        if count > len(self._free):
            raise ValueError(
                f"{count} KV blocks asked for, {len(self._free)} of {self.num_blocks} free; "
                "admit a sequence only when its blocks are free"
            )
        taken = self._run_at(after + 1, count) if after is not None else None
        if taken is None:
            taken = self._first_run(count, first_logical)
        self._free.difference_update(taken)
        return taken

    def give_back(self, blocks: Iterable[int]) -> None:
        """Free blocks that a sequence held."""
        self._free.update(blocks)

    def _run_at(self, start: int, count: int) -> tuple[int, ...] | None:
        run = range(start, start + count)
        return tuple(run) if self._free.issuperset(run) else None

    def _first_run(self, count: int, first_logical: int) -> tuple[int, ...]:
        group = self._group_size
        ordered = sorted(self._free)
        wanted = block_class(first_logical, group)
        for first in range(len(ordered) - count + 1):
            is_run = ordered[first + count - 1] - ordered[first] == count - 1
            if is_run and owner(ordered[first], group) == wanted:
                return tuple(ordered[first : first + count])
        by_class = [[b for b in ordered if owner(b, group) == place] for place in range(group)]
        logical = range(first_logical, first_logical + count)
        return tuple(by_class[block_class(j, group)].pop(0) for j in logical)
