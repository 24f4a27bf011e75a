"""How much of the device time each statement of the report rests on."""

from collections.abc import Sequence

import numpy as np

from tpinfer.costs.leaves import LEAVES
from tpprof.classify.work import Work, WorkKind
from tpprof.events import Trace
from tpprof.results import Coverage, Split

_NOT_EXPLAINED = ("idle_unexplained", "comm_unsplit", "unmodelled", "unrecorded")


def cover(
    traces: Sequence[Trace],
    works: Sequence[Work],
    chosen: Sequence[np.ndarray],
    matched: Sequence[np.ndarray],
    splits: Sequence[Split],
) -> Coverage:
    """Over all ranks. `chosen` has rows of each Work that ran in the windows, `matched` a bool
    [n] of each: divided by its peers' arrivals. A share of nothing is 1."""
    parts = [_shares(*one) for one in zip(traces, works, chosen, matched, strict=True)]
    held, all_of = np.sum([[p[0], p[1]] for p in parts] or np.zeros((1, 2, 5)), axis=0)
    layer, model, comm_bytes, ranks, link = (
        float(have / of) if of else 1.0 for have, of in zip(held, all_of, strict=True)
    )
    wall = sum(split.wall_ns for split in splits)
    dark = sum(split.leaves.get(leaf, 0) for split in splits for leaf in _NOT_EXPLAINED)
    return Coverage(
        layer=layer,
        flop_model=model,
        comm_bytes=comm_bytes,
        matched_ranks=ranks,
        launch_link=link,
        explained=1 - dark / wall if wall else 1.0,
    )


def _shares(
    trace: Trace, work: Work, chosen: np.ndarray, matched: np.ndarray
) -> tuple[list[int], list[int]]:
    """(ns that have it, ns that could) for layer, model, bytes, match and launch."""
    length = (work.end_ns - work.start_ns)[chosen]
    comm = np.isin(work.kind[chosen], (WorkKind.COMM, WorkKind.FUSED_COMM))
    compute = work.kind[chosen] == WorkKind.COMPUTE
    modelled = work.leaf[chosen] != LEAVES.index("unmodelled")
    linked = (trace.launch[work.row[chosen]] >= 0) | work.is_cpu
    conditions = (
        (work.layer[chosen] >= 0, np.ones(len(chosen), bool)),
        (modelled, compute),
        (work.comm_bytes[chosen] >= 0, comm),
        (matched[chosen], comm),
        (linked, np.ones(len(chosen), bool)),
    )
    have = [int(length[has & could].sum()) for has, could in conditions]
    return have, [int(length[could].sum()) for _, could in conditions]
