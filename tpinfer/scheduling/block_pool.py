"""Which KV blocks are free. Hands out runs of adjoining blocks where it can: a run is read
without a gather."""

from collections.abc import Iterable


class BlockPool:
    """Blocks 0..num_blocks-1, each free or held by one sequence."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = set(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def take(self, count: int, after: int | None = None) -> tuple[int, ...]:
        """Take `count` blocks: those right behind `after` if free, else the first run long
        enough, else any.

        Raises ValueError when fewer are free; callers reserve before they take.
        """
        if count > len(self._free):
            raise ValueError(
                f"{count} KV blocks asked for, {len(self._free)} of {self.num_blocks} free; "
                "admit a sequence only when its blocks are free"
            )
        taken = self._run_at(after + 1, count) if after is not None else None
        if taken is None:
            taken = self._first_run(count)
        self._free.difference_update(taken)
        return taken

    def give_back(self, blocks: Iterable[int]) -> None:
        """Free blocks that a sequence held."""
        self._free.update(blocks)

    def _run_at(self, start: int, count: int) -> tuple[int, ...] | None:
        run = range(start, start + count)
        return tuple(run) if self._free.issuperset(run) else None

    def _first_run(self, count: int) -> tuple[int, ...]:
        ordered = sorted(self._free)
        for first in range(len(ordered) - count + 1):
            if ordered[first + count - 1] - ordered[first] == count - 1:
                return tuple(ordered[first : first + count])
        return tuple(ordered[:count])
