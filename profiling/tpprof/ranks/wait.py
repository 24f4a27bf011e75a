"""Wait and transfer of matched collectives, and what the last rank did meanwhile.

On the reference clock A is the latest arrival. Per rank wait = clip(A - arrival, 0, rest of its
kernel) and transfer is what remains. A rank arrives when its kernel starts, but not before the
kernel ahead of it on its stream ended (programmatic dependent launch). Waits shorter than twice
the clocks' residual are 0: they could be the clocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tpprof import intervals
from tpprof.classify.work import Work, WorkKind
from tpprof.events import Trace
from tpprof.ranks.clock import Clock
from tpprof.ranks.match import Matched

HOST_LATE = "host late"
EARLIER = "earlier "
"""Goes before the name of a collective that the last rank was still in."""


@dataclass(frozen=True)
class Ready:
    """When the transfer of each collective could begin: columns over the rows of a Work."""

    at_ns: np.ndarray
    """int64 [n]: when the last rank had come, on this rank's clock, within [start, end]."""
    known: np.ndarray
    """bool [n]: whether that could be told; elsewhere communication stays undivided."""


@dataclass(frozen=True)
class Waits:
    """Of the collectives of a `Matched` that could be divided; k rows, R columns."""

    row: np.ndarray
    """int64 [k]: row of the Matched."""
    arrival_ns: np.ndarray
    """int64 [k, R]: on each rank's own clock; 0 where the rank takes no part."""
    wait_ns: np.ndarray
    """int64 [k, R]: 0 where the rank takes no part."""
    transfer_ns: np.ndarray
    """int64 [k, R]."""
    last: np.ndarray
    """int64 [k]: column of the rank that came last; -1 where the clocks cannot tell."""
    begun_ns: np.ndarray
    """int64 [k]: first arrival, on the reference clock."""
    complete_ns: np.ndarray
    """int64 [k]: latest arrival, on the reference clock."""


def nothing_ready(work: Work) -> Ready:
    """No collective can be divided but those of a rank with itself, which waits for nobody."""
    return Ready(work.start_ns.copy(), _is_comm(work) & (work.comm_size == 1))


def _is_comm(work: Work) -> np.ndarray:
    """bool [n]."""
    return np.isin(work.kind, (WorkKind.COMM, WorkKind.FUSED_COMM))


def columns_of(matched: Matched, values: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [m, R]: a column of each rank's Work at the matched rows; 0 where there is none."""
    table = np.zeros(matched.work.shape, np.int64)
    for column, value in enumerate(values):
        rows = matched.work[:, column]
        table[rows >= 0, column] = value[rows[rows >= 0]]
    return table


def arrivals(work: Work) -> np.ndarray:
    """int64 [n]: start, or the end of what ran ahead on the same lane where that is later."""
    order = np.lexsort((work.start_ns, work.lane))
    same = work.lane[order][1:] == work.lane[order][:-1]
    ahead = work.start_ns.copy()
    ahead[order[1:][same]] = work.end_ns[order[:-1][same]]
    return np.clip(ahead, work.start_ns, work.end_ns)


def divide(matched: Matched, works: Sequence[Work], clocks: Sequence[Clock]) -> Waits:
    """Wait and transfer of the collectives that synchronise all ranks, where clocks allow."""
    part = matched.takes_part
    arrival = columns_of(matched, [arrivals(work) for work in works])
    end = columns_of(matched, [work.end_ns for work in works])
    trusted = np.array([clock.fitted for clock in clocks], bool)
    reference = np.array([clock.reference for clock in clocks])
    never = np.iinfo(np.int64)
    lowest = np.where(part, reference, never.max).min(1, initial=never.max)
    one_clock = (~part | (reference == lowest[:, None])).all(1)
    divisible = matched.synchronising & ~matched.is_partial
    row = np.flatnonzero(divisible & (~part | trusted).all(1) & one_clock)
    part, arrival, end = part[row], arrival[row], end[row]
    aligned = np.stack([c.to_reference(arrival[:, i]) for i, c in enumerate(clocks)], 1)
    latest = np.where(part, aligned, never.min)
    last, complete = latest.argmax(1), latest.max(1, initial=never.min)
    begun = np.where(part, aligned, never.max).min(1, initial=never.max)
    local = np.stack([clock.from_reference(complete) for clock in clocks], 1)
    wait = np.where(part, np.clip(local - arrival, 0, end - arrival), 0)
    wait[np.arange(len(row)), last] = 0
    residual = np.array([clock.residual_ns for clock in clocks])
    wait[wait < 2 * np.where(part, residual, 0).max(1, initial=0)[:, None]] = 0
    return Waits(
        row=row,
        arrival_ns=np.where(part, arrival, 0),
        wait_ns=wait,
        transfer_ns=np.where(part, end - arrival - wait, 0),
        last=np.where(wait.any(1), last, -1),
        begun_ns=begun,
        complete_ns=complete,
    )


def ready_of(matched: Matched, waits: Waits, column: int, work: Work) -> Ready:
    """What the sweep of one rank needs."""
    ready = nothing_ready(work)
    entry = matched.work[waits.row, column]
    mine = entry >= 0
    wait = waits.wait_ns[mine, column]
    arrival = waits.arrival_ns[mine, column]
    ready.known[entry[mine]] = True
    ready.at_ns[entry[mine]] = np.where(wait > 0, arrival + wait, work.start_ns[entry[mine]])
    return ready


def estimated(work: Work) -> Ready:
    """One rank's file alone: what a ceiling allows is transfer, at the end; the rest is wait."""
    alone = nothing_ready(work)
    known = _is_comm(work) & (work.floor_ns > 0) & ~alone.known
    transfer = np.minimum(work.end_ns - work.start_ns, work.floor_ns)
    at_ns = np.where(known, work.end_ns - transfer, alone.at_ns)
    return Ready(at_ns, known | alone.known)


def what_last_did(
    matched: Matched,
    waits: Waits,
    traces: Sequence[Trace],
    works: Sequence[Work],
    clocks: Sequence[Clock],
) -> list[str]:
    """Per row of `waits` what the last rank spent most of the others' waiting on; "" where nobody
    is known to be last."""
    told = [""] * len(waits.row)
    for column, (trace, work, clock) in enumerate(zip(traces, works, clocks, strict=True)):
        mine = np.flatnonzero(waits.last == column)
        if not len(mine):
            continue
        begun = clock.from_reference(waits.begun_ns[mine])
        entry = matched.work[waits.row[mine], column]
        busiest = _busiest(work, begun, waits.arrival_ns[mine, column])
        for row, own, doer in zip(mine.tolist(), entry.tolist(), busiest.tolist(), strict=True):
            told[row] = HOST_LATE if doer in (-1, own) else describe(trace, work, doer)
    return told


def describe(trace: Trace, work: Work, entry: int) -> str:
    """Name of a piece of work for a sentence: op id or operator, else kernel; of communication its
    kind."""
    is_comm = work.kind[entry] in (WorkKind.COMM, WorkKind.FUSED_COMM)
    named = work.comm_op[entry] if is_comm else work.key[entry]
    text = work.keys[named] if named >= 0 else trace.text(work.row[entry])
    return EARLIER + text if is_comm else text


def _busiest(work: Work, begun_ns: np.ndarray, until_ns: np.ndarray) -> np.ndarray:
    """int64 [queries]: row of the Work that ran longest in [begun, until); -1 where the rank was
    idle for longer than compute, and longer than communication, ran."""
    found = np.full(len(begun_ns), -1, np.int64)
    totals, longest = [], []
    is_comm = _is_comm(work)
    for chosen in (~is_comm, is_comm):
        rows = np.flatnonzero(chosen)
        begin, stop = intervals.first_come(work.start_ns[rows], work.end_ns[rows])
        filled = stop > begin
        rows, begin, stop = rows[filled], begin[filled], stop[filled]
        total = intervals.covered_before(begin, stop, until_ns)
        totals.append(total - intervals.covered_before(begin, stop, begun_ns))
        longest.append(_longest(rows, begin, stop, begun_ns, until_ns))
    idle = until_ns - begun_ns - totals[0] - totals[1]
    by_compute = (totals[0] >= totals[1]) & (totals[0] > idle)
    by_comm = ~by_compute & (totals[1] > idle)
    found[by_compute] = longest[0][by_compute]
    found[by_comm] = longest[1][by_comm]
    return found


def _longest(
    rows: np.ndarray,
    begin: np.ndarray,
    stop: np.ndarray,
    begun_ns: np.ndarray,
    until_ns: np.ndarray,
) -> np.ndarray:
    """Row of the disjoint interval with the largest part in [begun, until); -1 for none."""
    if not len(rows):
        return np.full(len(begun_ns), -1, np.int64)
    first = np.searchsorted(stop, begun_ns, side="right")
    after = np.searchsorted(begin, until_ns, side="left")
    inner = intervals.longest_between(stop - begin, first + 1, after - 1)
    best = np.full(len(begun_ns), -1, np.int64)
    most = np.zeros(len(begun_ns), np.int64)
    for candidate in (first, after - 1, inner):
        valid = (candidate >= first) & (candidate < after)
        place = np.where(valid, candidate, 0)
        part = np.minimum(stop[place], until_ns) - np.maximum(begin[place], begun_ns)
        better = valid & (part > most)
        best[better], most[better] = candidate[better], part[better]
    return np.where(best >= 0, rows[best], -1)
