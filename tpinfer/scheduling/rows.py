"""Rows of running sequences: who is in which, and what the next plan must tell ranks of them."""

from bisect import bisect_left, insort

from tpinfer.scheduling.request import Sequence


class RunningRows:
    """Rows 0..num_rows-1, and the sequences in them."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.reset()

    def reset(self) -> None:
        """All are free, and ranks know of none."""
        self.running: list[Sequence] = []
        """In order: the first to be served first."""
        self.free = list(range(self.num_rows))[::-1]
        self.released: dict[int, None] = {}
        """Rows that ranks must let go of."""
        self.dropped: dict[int, int] = {}
        """Row -> leading blocks that ranks must drop."""

    def enter(self, sequence: Sequence) -> None:
        """Give a sequence a row. Its record will replace what ranks have there."""
        sequence.row = self.free.pop()
        self.released.pop(sequence.row, None)
        insort(self.running, sequence, key=_order)
        self.drop(sequence, sequence.num_dropped_blocks)

    def leave(self, sequence: Sequence) -> None:
        """Take its row from a sequence."""
        if self.running[-1] is sequence:
            self.running.pop()
        else:
            del self.running[bisect_left(self.running, sequence.order, key=_order)]
        self.dropped.pop(sequence.row, None)
        self.released[sequence.row] = None
        self.free.append(sequence.row)
        sequence.row = -1

    def drop(self, sequence: Sequence, count: int) -> None:
        """A running sequence has let go of `count` leading blocks."""
        if count:
            self.dropped[sequence.row] = self.dropped.get(sequence.row, 0) + count

    def told(self) -> None:
        """A plan that says all this was issued."""
        self.released.clear()
        self.dropped.clear()


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
