"""What of a recording can be trusted: where events were lost, and rows that cannot be true.

Recorders drop events, above all under graph replay. A step is lost where a graph launch has fewer
nodes than its siblings (or none), where a launched kernel is missing, where a kernel has no length,
or where one is longer than its whole step. Idle time of such a step is `unrecorded`: work may have
run in it.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tpprof import intervals
from tpprof.attribute.sweep import Recorded
from tpprof.classify.steps import Step, step_at
from tpprof.classify.work import Work, WorkKind
from tpprof.events import Kind, Trace

_LAUNCHING_KERNELS = ("launchkernel", "launchcooperative", "modulelaunch")
_NEARLY_ALL = 0.95
_LAUNCHING = ("launchkernel", "launchcooperative", "memcpyasync", "memsetasync", "modulelaunch")


def check(trace: Trace, work: Work, steps: Sequence[Step]) -> Recorded:
    """Judge one rank's recording."""
    steps = list(steps)
    if not len(trace):
        none = np.empty(0, np.int64)
        return Recorded(0, 0, np.zeros(0, bool), (none, none))
    broken, causes = np.zeros(len(work), bool), []
    moments: list[np.ndarray] = []
    if not work.is_cpu:
        short = short_launches(trace, steps)
        if len(short):
            moments.append(trace.start_ns[short])
            causes.append(f"{len(short)} graph launches have fewer kernels than their siblings")
        missing = _launches_without_kernel(trace)
        if len(missing):
            moments.append(trace.start_ns[missing])
            causes.append(f"{len(missing)} launched kernels are missing")
        broken = _cannot_be_true(trace, work, steps)
        if broken.any():
            rows = np.flatnonzero(broken)
            launch = trace.launch[work.row[rows]]
            moments.append(np.where(launch >= 0, trace.start_ns[launch], work.start_ns[rows]))
            causes.append(f"{len(rows)} kernels have impossible times")
    lost = _stretches(trace, work, broken, steps, moments)
    told = []
    if causes:
        told.append(
            f"rank {trace.rank}: the recorder lost events ({'; '.join(causes)}): idle time of "
            f"{len(lost[0])} stretches is unrecorded, not idle; record fewer steps at a time"
        )
    elif trace.num_lost > 0:
        told.append(
            f"rank {trace.rank}: the recorder lost or damaged {trace.num_lost} rows, and nothing "
            "says where; idle time may hide work"
        )
    between_ns = _between_steps(steps)
    first, last = int(trace.start_ns.min()) - between_ns, int(trace.end_ns.max()) + between_ns
    return Recorded(first, last, broken, lost, tuple(told))


def _between_steps(steps: list[Step]) -> int:
    """Usual pause between steps: where nothing is annotated, the recorder may still have run for
    that long before the first row and behind the last one."""
    if len(steps) < 2:
        return 0
    return int(np.median([b.start_ns - a.end_ns for a, b in pairwise(steps)]))


def _is_named(trace: Trace, words: Sequence[str]) -> np.ndarray:
    """bool [rows]: calls whose name has one of the words."""
    named = [any(word in text.lower() for word in words) for text in trace.strings]
    return (trace.kind == Kind.LAUNCH) & np.array(named, bool)[trace.name]


def _launches_without_kernel(trace: Trace) -> np.ndarray:
    """Rows of calls whose kernel or copy is missing.

    Unless the recorder says that it lost some, only kernels count, only where nearly all have
    theirs, and only between launches that do: a recording may begin and end between the two.
    """
    if trace.num_lost > 0:
        calls = np.flatnonzero(_is_named(trace, _LAUNCHING))
        return calls[~np.isin(calls, trace.launch)]
    calls = np.flatnonzero(_is_named(trace, _LAUNCHING_KERNELS))
    linked = np.isin(calls, trace.launch)
    if not linked.any():
        return calls[:0]
    first, last = np.flatnonzero(linked)[[0, -1]]
    inside, has = calls[first : last + 1], linked[first : last + 1]
    return inside[~has] if has.mean() >= _NEARLY_ALL else calls[:0]


def _cannot_be_true(trace: Trace, work: Work, steps: list[Step]) -> np.ndarray:
    """bool [n]: kernels without length (where times are finer than 1 us), and such as are longer
    than their whole step and end after what follows them on their stream."""
    length = work.end_ns - work.start_ns
    is_kernel = work.kind != WorkKind.COPY
    broken = np.zeros(len(work), bool)
    if (work.start_ns % 1_000).any() or (work.end_ns % 1_000).any():
        broken |= is_kernel & (length == 0)
    if not steps or not len(work):
        return broken
    launch = trace.launch[work.row]
    issued = np.where(launch >= 0, trace.start_ns[launch], work.start_ns)
    place = step_at(steps, issued)
    longest = np.array([step.end_ns - step.start_ns for step in steps])
    # A stream runs in order: whoever lasts beyond its successor's end did not really run. The last
    # one may be as long as all that the host recorded.
    order = np.lexsort((work.start_ns, work.lane))
    host = np.flatnonzero(~trace.is_device())
    following = work.start_ns + int(trace.end_ns[host].max() - trace.start_ns[host].min())
    same = work.lane[order][1:] == work.lane[order][:-1]
    following[order[:-1][same]] = work.end_ns[order[1:][same]]
    outlasts = is_kernel & (place >= 0) & (work.end_ns > following)
    return broken | (outlasts & (length > longest[place]))


def short_launches(trace: Trace, steps: list[Step]) -> np.ndarray:
    """Rows of graph launches that have fewer nodes than the mode of their siblings, or none.

    Siblings replay one graph: they share node ids. Without ids, siblings have the same place among
    the launches of steps of the same shape, and a launch counts as short only if its kernels are
    among those of a whole one, so that another graph is not taken for a damaged one.
    """
    graphs = np.flatnonzero(_is_named(trace, ("graphlaunch",)))
    if not len(graphs):
        return graphs
    rows = np.flatnonzero(trace.is_device() & np.isin(trace.launch, graphs))
    launch = np.searchsorted(graphs, trace.launch[rows])
    count = np.bincount(launch, minlength=len(graphs))
    by_node = bool((trace.node[rows] >= 0).any())
    if by_node:
        family = _families_by_node(launch, trace.node[rows], len(graphs))
    else:
        family = _families_by_place(trace, graphs, steps)
    whole = _mode_per_family(family, count)
    short = (count < count[whole]) | (count == 0)
    if not by_node:
        short &= (count == 0) | _is_part_of(launch, trace.name[rows], whole)
    return graphs[short]


def _families_by_node(launch: np.ndarray, node: np.ndarray, num_launches: int) -> np.ndarray:
    """int64 [launches]: equal for launches that are joined by shared nodes."""
    family = np.arange(num_launches)
    known = node >= 0
    launch = launch[known]
    _, node = np.unique(node[known], return_inverse=True)
    lowest = np.full(int(node.max(initial=-1)) + 1, num_launches)
    while True:
        np.minimum.at(lowest, node, family[launch])
        smaller = family.copy()
        np.minimum.at(smaller, launch, lowest[node])
        if (smaller == family).all():
            return family
        family = smaller


def _families_by_place(trace: Trace, graphs: np.ndarray, steps: list[Step]) -> np.ndarray:
    place = step_at(steps, trace.start_ns[graphs])
    shapes: dict[object, int] = {}
    ordinals: dict[int, int] = {}
    family = []
    for row, step in zip(graphs.tolist(), place.tolist(), strict=True):
        ordinal = ordinals.get(step, 0) if step >= 0 else 0
        ordinals[step] = ordinal + 1
        shape = (steps[step].phase, steps[step].sums.get("rows")) if step >= 0 else ()
        key = (int(trace.name[row]), ordinal, shape)
        family.append(shapes.setdefault(key, len(shapes)))
    return np.array(family)


def _mode_per_family(family: np.ndarray, count: np.ndarray) -> np.ndarray:
    """int64 [launches]: a launch of the same family with its most frequent count; the larger count
    of equally frequent ones."""
    pairs, first, times = np.unique(
        np.stack((family, count), 1), axis=0, return_index=True, return_counts=True
    )
    order = np.lexsort((pairs[:, 1], times, pairs[:, 0]))
    last = np.append(pairs[order][1:, 0] != pairs[order][:-1, 0], True)
    best = dict(zip(pairs[order][last, 0].tolist(), first[order][last].tolist(), strict=True))
    return np.array([best[number] for number in family.tolist()])


def _is_part_of(launch: np.ndarray, name: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """bool [launches]: no kernel name comes more often than in the launch `whole` names."""
    width = int(name.max(initial=0)) + 1
    code, times = np.unique(launch.astype(np.int64) * width + name, return_counts=True)
    owner = code // width
    wanted = whole[owner] * width + code % width
    place = np.clip(np.searchsorted(code, wanted), 0, max(len(code) - 1, 0))
    allowed = np.where(code[place] == wanted, times[place], 0) if len(code) else times
    part = np.ones(len(whole), bool)
    part[owner[times > allowed]] = False
    return part


def _stretches(
    trace: Trace,
    work: Work,
    broken: np.ndarray,
    steps: list[Step],
    moments: list[np.ndarray],
) -> intervals.Columns:
    """What the steps in which something was lost span on the host and on the device; outside steps,
    from that moment to the next op's end."""
    if not moments:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    when = np.concatenate(moments)
    place = step_at(steps, when)
    starts, ends = [], []
    for number in np.unique(place[place >= 0]).tolist():
        step = steps[number]
        mine = (work.step == step.number) & ~broken
        starts.append(min(step.start_ns, int(work.start_ns[mine].min(initial=step.start_ns))))
        ends.append(max(step.end_ns, int(work.end_ns[mine].max(initial=step.end_ns))))
    outside = when[place < 0]
    calls = np.append(trace.start_ns[_is_named(trace, ("graphlaunch",))], trace.end_ns.max())
    starts += outside.tolist()
    ends += calls[
        np.minimum(np.searchsorted(calls, outside, side="right"), len(calls) - 1)
    ].tolist()
    return intervals.merge(np.array(starts, np.int64), np.array(ends, np.int64))
