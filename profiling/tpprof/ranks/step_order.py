"""Makes step numbers mean one step on all ranks where the engine annotates none.

Without numbers a step is known by its place in a recording, and recordings may begin at different
steps. Places are shifted so that what steps say of themselves (phase, tokens, context) agrees in
all steps that both ranks have; where several shifts would do, the one that lies closest in time.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tpprof.classify.steps import Step
from tpprof.classify.work import Work
from tpprof.events import NONE

_MOST_SHIFT = 200


def same_numbers(
    ranks: Sequence[int], steps: Sequence[list[Step]], works: Sequence[Work]
) -> tuple[list[list[Step]], list[Work], list[Work], list[str]]:
    """(steps, works, works for matching by step, warnings), per rank in the order given.

    The first rank keeps its numbers. Of a rank whose place cannot be told, works for matching
    belong to no step.
    """
    steps, works, told = list(steps), list(works), []
    matching = list(works)
    for i, rank in enumerate(ranks[1:], 1):
        if not steps[0] or not steps[i] or steps[0][0].is_numbered or steps[i][0].is_numbered:
            continue
        shift = _shift(steps[0], steps[i])
        if shift is None:
            told.append(
                f"rank {rank} recorded other steps than rank {ranks[0]}, and nothing tells which: "
                "collectives are not matched by step"
            )
            matching[i] = replace(works[i], step=np.full(len(works[i]), NONE, np.int64))
        elif shift:
            told.append(
                f"rank {rank} began to record {abs(shift)} steps "
                f"{'later' if shift > 0 else 'earlier'} than rank {ranks[0]}"
            )
            steps[i] = [replace(step, number=step.number + shift) for step in steps[i]]
            number = works[i].step
            works[i] = replace(works[i], step=np.where(number >= 0, number + shift, NONE))
            matching[i] = works[i]
    return steps, works, matching, told


def _shift(reference: list[Step], other: list[Step]) -> int | None:
    """What to add to the places of `other`; None where that cannot be told."""
    if _agree(reference, other, 0) and len(reference) == len(other):
        return 0
    reach = min(_MOST_SHIFT, max(len(reference), len(other)))
    least = (min(len(reference), len(other)) + 1) // 2
    shifts = [s for s in range(-reach, reach + 1) if _overlap(reference, other, s) >= least]
    fitting = [s for s in shifts if _agree(reference, other, s)]
    if len(fitting) < 2:
        return fitting[0] if fitting else None
    apart = [abs(_apart_ns(reference, other, shift)) for shift in fitting]
    usual = np.median([step.end_ns - step.start_ns for step in reference])
    nearest = min(apart)
    return fitting[apart.index(nearest)] if nearest < usual / 4 else None


def _pairs(reference: list[Step], other: list[Step], shift: int) -> list[tuple[Step, Step]]:
    low, high = max(0, shift), min(len(reference), len(other) + shift)
    return [(reference[place], other[place - shift]) for place in range(low, high)]


def _overlap(reference: list[Step], other: list[Step], shift: int) -> int:
    return min(len(reference), len(other) + shift) - max(0, shift)


def _agree(reference: list[Step], other: list[Step], shift: int) -> bool:
    pairs = _pairs(reference, other, shift)
    return bool(pairs) and all(a.phase == b.phase and a.sums == b.sums for a, b in pairs)


def _apart_ns(reference: list[Step], other: list[Step], shift: int) -> float:
    return float(np.median([b.start_ns - a.start_ns for a, b in _pairs(reference, other, shift)]))
