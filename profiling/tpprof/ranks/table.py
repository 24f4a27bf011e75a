"""Collectives for the report: one entry each, or, where they are very many, added up by kind."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tpprof.classify.collective_kinds import busbw_factor
from tpprof.classify.work import Work
from tpprof.events import Trace
from tpprof.ranks.clock import Clock
from tpprof.ranks.match import Matched
from tpprof.ranks.wait import EARLIER, Ready, Waits, describe, what_last_did
from tpprof.results import CollectiveResult

MOST_SINGLE = 20_000
"""More collectives than this are added up by name, size, ranks and who was last."""


def matched_results(
    matched: Matched,
    waits: Waits,
    chosen: np.ndarray,
    traces: Sequence[Trace],
    works: Sequence[Work],
    clocks: Sequence[Clock],
) -> list[CollectiveResult]:
    """Those of `waits` that `chosen` (bool [k]) names, in order of time on the reference clock."""
    told = what_last_did(matched, waits, traces, works, clocks)
    ranks = [trace.rank for trace in traces]
    part = matched.takes_part[waits.row]
    found = []
    order = np.argsort(waits.begun_ns, kind="stable")
    for i in order[chosen[order]].tolist():
        row, columns = int(waits.row[i]), np.flatnonzero(part[i])
        transfer = waits.transfer_ns[i, columns]
        last = int(waits.last[i])
        found.append(
            CollectiveResult(
                name=matched.names[matched.name[row]],
                bytes=int(matched.num_bytes[row]),
                ranks=[ranks[column] for column in columns.tolist()],
                wait_ns=waits.wait_ns[i, columns].tolist(),
                transfer_ns=transfer.tolist(),
                busbw_gbps=_busbw(
                    matched.names[matched.name[row]],
                    int(matched.num_bytes[row]),
                    len(columns),
                    float(transfer.max()),
                ),
                last_rank=ranks[last] if last >= 0 else -1,
                last_rank_was=told[i],
                start_ns=int(waits.begun_ns[i]),
            )
        )
    return _few(found)


def estimated_results(
    trace: Trace, work: Work, ready: Ready, chosen: np.ndarray
) -> list[CollectiveResult]:
    """One rank's own, divided by a ceiling; `chosen` are rows of the Work."""
    found = []
    for entry in chosen[ready.known[chosen]].tolist():
        name = describe(trace, work, entry).removeprefix(EARLIER)
        transfer = int(work.end_ns[entry] - ready.at_ns[entry])
        size = int(work.comm_size[entry])
        found.append(
            CollectiveResult(
                name=name,
                bytes=int(work.comm_bytes[entry]),
                ranks=[trace.rank],
                wait_ns=[int(ready.at_ns[entry] - work.start_ns[entry])],
                transfer_ns=[transfer],
                busbw_gbps=_busbw(name, int(work.comm_bytes[entry]), size, transfer),
                last_rank=-1,
                start_ns=int(work.start_ns[entry]),
                method="estimated",
            )
        )
    return _few(found)


def _busbw(name: str, num_bytes: int, size: int, transfer_ns: float) -> float | None:
    """Bytes per ns are 10**9 bytes per s."""
    if num_bytes < 0 or size < 2 or transfer_ns <= 0:
        return None
    return num_bytes * busbw_factor(name, size) / transfer_ns


def _few(found: list[CollectiveResult]) -> list[CollectiveResult]:
    if len(found) <= MOST_SINGLE:
        return found
    kinds: dict[object, list[CollectiveResult]] = {}
    for one in found:
        key = (one.name, one.bytes, tuple(one.ranks), one.last_rank, one.last_rank_was)
        kinds.setdefault(key, []).append(one)
    return [_added(members) for members in kinds.values()]


def _added(members: list[CollectiveResult]) -> CollectiveResult:
    """Times of all members; bytes stay those of one, bandwidth is over all transfer time."""
    carried = carrying = 0.0
    for one in members:
        if one.busbw_gbps is not None:
            spent = max(one.transfer_ns)
            carried, carrying = carried + one.busbw_gbps * spent, carrying + spent
    return replace(
        members[0],
        wait_ns=np.sum([one.wait_ns for one in members], axis=0).tolist(),
        transfer_ns=np.sum([one.transfer_ns for one in members], axis=0).tolist(),
        busbw_gbps=carried / carrying if carrying else None,
    )
