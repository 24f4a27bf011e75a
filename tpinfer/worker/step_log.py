"""The steps a rank has recorded and nobody has asked for yet, kept small: a long-lived engine that
is never asked holds MAX_STEPS of them, about 1 KB each for a 28-layer model."""

from array import array
from collections.abc import Iterable
from dataclasses import replace

from tpinfer.costs.step_record import StepRecord

MAX_STEPS = 8192
_NONE: list[int] = []


class StepLog:
    """Records in order of time. Their ns columns are packed into machine words meanwhile, an eighth
    of what lists of Python's numbers take."""

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._max_steps = max_steps
        self._kept: list[tuple[StepRecord, array[int], array[int] | None, array[int] | None]] = []

    def add(self, record: StepRecord) -> int | None:
        """Keep one more. When there are too many the older half goes; returns the ns from which on
        records are kept then, else None."""
        waits = record.waits_ns
        pairs = None if waits is None else _packed([*waits, *waits.values()])
        starts = None if record.op_starts_ns is None else _packed(record.op_starts_ns)
        bare = replace(record, op_ends_ns=_NONE, op_starts_ns=None, waits_ns=None)
        self._kept.append((bare, _packed(record.op_ends_ns), starts, pairs))
        if len(self._kept) <= self._max_steps:
            return None
        del self._kept[: len(self._kept) // 2]
        return self._kept[0][0].start_ns

    def take(self) -> list[StepRecord]:
        """All that are kept, whole again; none stays."""
        kept, self._kept = self._kept, []
        return [
            replace(
                bare,
                op_ends_ns=ends.tolist(),
                op_starts_ns=None if starts is None else starts.tolist(),
                waits_ns=None if pairs is None else _unpaired(pairs.tolist()),
            )
            for bare, ends, starts, pairs in kept
        ]


def _packed(values: Iterable[int]) -> "array[int]":
    return array("q", values)


def _unpaired(pairs: list[int]) -> dict[int, int]:
    half = len(pairs) // 2
    return dict(zip(pairs[:half], pairs[half:], strict=True))
