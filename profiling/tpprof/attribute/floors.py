"""Kernel time of each op against the least that the ceilings allow: floor + lost = time."""

import numpy as np

from tpinfer.costs.leaves import LEAVES
from tpprof.attribute.clock_losses import ClockLosses
from tpprof.classify.work import Work, WorkKind
from tpprof.events import Trace
from tpprof.results import OpResult

_BOUNDS = ("compute", "memory", "balanced", "latency", "communication", "unmodelled")


def ops_table(
    trace: Trace, work: Work, chosen: np.ndarray, losses: ClockLosses | None = None
) -> list[OpResult]:
    """Chosen rows of the Work by op id, or kernel name where there is none, and by what bounds
    them: an op is compute-bound in one step and memory-bound in another. Most time first. Whole
    kernels count, also what other kernels hide of them; copies are no kernels. With `losses` lost
    is split into clocks and rest."""
    chosen = chosen[work.kind[chosen] != WorkKind.COPY]
    if not len(chosen):
        return []
    has_key = work.key[chosen] >= 0
    label = np.where(has_key, work.key[chosen], len(work.keys) + trace.name[work.row[chosen]])
    labels, slot = np.unique(label * len(_BOUNDS) + _bound(work)[chosen], return_inverse=True)
    length = work.end_ns[chosen] - work.start_ns[chosen]

    def total(values: np.ndarray) -> np.ndarray:
        sums = np.zeros(len(labels), np.int64)
        np.add.at(sums, slot, values)
        return sums

    time, floor = total(length), total(work.floor_ns[chosen])
    count, flops = total(np.ones_like(length)), total(np.maximum(work.flops[chosen], 0))
    moved = total(np.maximum(work.num_bytes[chosen], 0))
    vector = {name: total(column[chosen]) for name, column in work.ceilings_ns.items()}
    clocks = None if losses is None else total(losses.clocks_ns[chosen])
    found = []
    for i, number in enumerate(labels.tolist()):
        name, bound = divmod(number, len(_BOUNDS))
        count_keys, lost = len(work.keys), int(time[i] - floor[i])
        found.append(
            OpResult(
                key=work.keys[name] if name < count_keys else trace.strings[name - count_keys],
                rank=trace.rank,
                time_ns=int(time[i]),
                floor_ns=int(floor[i]),
                lost_ns=lost,
                bound=_BOUNDS[bound],
                count=int(count[i]),
                flops=int(flops[i]),
                bytes=int(moved[i]),
                ceilings_ns={ceiling: int(column[i]) for ceiling, column in vector.items()},
                lost_to={} if clocks is None else _split(lost, int(clocks[i])),
            )
        )
    return sorted(found, key=lambda op: (-op.time_ns, op.key, op.bound))


def _split(lost_ns: int, clocks_ns: int) -> dict[str, int]:
    return {"clocks": clocks_ns, "rest": lost_ns - clocks_ns}


def _bound(work: Work) -> np.ndarray:
    """int8 [n], index into _BOUNDS."""
    bound = np.full(len(work), _BOUNDS.index("unmodelled"), np.int8)
    for leaf in ("compute", "memory", "latency"):
        bound[work.leaf == LEAVES.index(leaf)] = _BOUNDS.index(leaf)
    near = np.isin(bound, (_BOUNDS.index("compute"), _BOUNDS.index("memory")))
    bound[work.balanced & near] = _BOUNDS.index("balanced")
    comm = np.isin(work.kind, (WorkKind.COMM, WorkKind.FUSED_COMM))
    bound[comm] = _BOUNDS.index("communication")
    return bound
