"""The same wall once more, by step, phase, layer, op, kernel or stream.

A piece in which work ran belongs to what ran. Idle time belongs to what came next in the window,
which is what it waited for: its leaves (`host`, `launch_latency`, `graph_gap`, ...) tell it apart
from time that ran. What belongs to none is `(unattributed)`, so that rows of a rank sum to its
wall.
"""

from collections.abc import Sequence

import numpy as np

from tpinfer.costs.leaves import LEAVES
from tpprof import intervals
from tpprof.attribute.timeline import Pieces
from tpprof.classify.steps import Step
from tpprof.classify.work import Work
from tpprof.events import Trace
from tpprof.results import Group

GROUPINGS = ("rank", "step", "phase", "layer", "op", "kernel", "stream")
UNATTRIBUTED = "(unattributed)"


def keys_of(
    by: str, trace: Trace, work: Work, steps: Sequence[Step]
) -> tuple[np.ndarray, list[str]]:
    """(index into the keys per row of the Work, -1 for none; the keys)."""
    if by == "op":
        return work.key.astype(np.int64), work.keys
    if by == "kernel":
        return trace.name[work.row].astype(np.int64), trace.strings
    if by == "stream":
        return work.lane.astype(np.int64), [_lane_text(trace, i) for i in range(len(trace.lanes))]
    if by == "layer":
        layers = [f"layers.{layer}" for layer in range(int(work.layer.max(initial=-1)) + 1)]
        return work.layer.astype(np.int64), layers
    labels = {step.number: step.label if by == "step" else step.phase for step in steps}
    keys = list(dict.fromkeys(label for label in labels.values() if label))
    place = {key: index for index, key in enumerate(keys)}
    numbers, inverse = np.unique(work.step, return_inverse=True)
    found = [place.get(labels.get(number, ""), -1) for number in numbers.tolist()]
    return np.array(found, np.int64)[inverse], keys


def _lane_text(trace: Trace, lane: int) -> str:
    one = trace.lanes[lane]
    return f"device {one.device} stream {one.tid}" if one.is_device else f"thread {one.tid}"


def group(
    by: str,
    trace: Trace,
    work: Work,
    steps: Sequence[Step],
    windows: Sequence[tuple[Pieces, int, int]],
) -> list[Group]:
    """Rows of one rank, the largest first, `(unattributed)` last.

    `windows` has per window its pieces, its wall and how much of it was `queue`; what the pieces
    leave of the wall lies outside the recording.
    """
    if by == "rank":
        index, keys = np.zeros(len(work), np.int64), [f"rank {trace.rank}"]
        rest = 0
    else:
        index, keys = keys_of(by, trace, work, steps)
        rest = len(keys)
    slots = np.append(np.where(index < 0, rest, index), rest)
    table = np.zeros((len(keys) + 1, len(LEAVES)), np.int64)
    ran: list[np.ndarray] = []
    for pieces, wall_ns, queued_ns in windows:
        np.add.at(table, (slots[pieces.owner], pieces.leaf), pieces.length_ns)
        table[rest, LEAVES.index("queue")] += queued_ns
        outside_ns = wall_ns - queued_ns - int(pieces.length_ns.sum())
        table[rest, LEAVES.index("unrecorded")] += outside_ns
        ran.append(pieces.owner[pieces.busy])
    entries = intervals.distinct(np.concatenate(ran)) if ran else np.empty(0, np.int64)
    counts = np.bincount(slots[entries], minlength=len(table))
    found = [
        Group(
            key=UNATTRIBUTED if slot == len(keys) else keys[slot],
            rank=trace.rank,
            wall_ns=int(table[slot].sum()),
            leaves={LEAVES[leaf]: int(table[slot, leaf]) for leaf in np.flatnonzero(table[slot])},
            num_events=int(counts[slot]),
        )
        for slot in np.flatnonzero(table.any(1)).tolist()
    ]
    found.sort(key=lambda one: (one.key == UNATTRIBUTED, -one.wall_ns, one.key))
    wall_ns = sum(wall for _, wall, _ in windows)
    assert sum(one.wall_ns for one in found) == wall_ns, "groups must sum to the wall"
    return found
