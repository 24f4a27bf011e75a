"""What the ranks of a run reach, for the measured layer of a topology: about half a minute with
all of them at it at once.

Memory is read over working sets of many sizes, weights are multiplied by few and many rows, small
ops and copies are timed, and collectives over sizes. Every rank measures at the same moment and
the slowest one's figure is kept, because the others wait for it. Times are medians, rates come from
them: what a machine does, not what it did once (`probe` looks for ceilings instead). On a GPU they
are taken with events.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import torch

from tpinfer.collectives.group import Group
from tpinfer.config.dtypes import DType
from tpinfer.config.measured import CollectiveFit, Copy, GemmRate, MemoryRead
from tpinfer.machine.curve_fit import fit_two_lines
from tpinfer.machine.discover import Machine
from tpinfer.machine.probe import Clock, clock_of
from tpinfer.numerics.torch_dtypes import to_torch

MatMul = Callable[[torch.Tensor], torch.Tensor]
BindLinear = Callable[[torch.Tensor, torch.device], MatMul]
"""A weight [N, K] -> the product with it, as the runtime multiplies."""
Say = Callable[[str], None]

GEMM_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_LEAST_ROWS = 64  # a decode's; these are measured however long they take
_NO_GOOD = 1.5
"""A dtype that another is so many times as fast as is not measured with more rows."""
_MESSAGE_BYTES = tuple(512 << (2 * i) for i in range(8))  # 512 B to 8 MB
_MORE_MESSAGE_BYTES = (32 << 20, 128 << 20)
_SMALLEST_SET = 128 << 10
_LEAST_TRIALS = 3
_LONG_NS = 100_000_000
"""A call that takes so long is timed once: what disturbs a machine lies within it."""
_LONGEST_FIGURE_S = 1.0, 6.0
"""What a figure may take at least and at most, whatever the budget."""


@dataclass(frozen=True, slots=True)
class RankFigures:
    """The same on every rank."""

    memory: tuple[MemoryRead, ...]
    gemms: tuple[GemmRate, ...]
    eager_floor_s: float
    graph_floor_s: float | None
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class Trials:
    """How this rank takes times, in step with the others of `group`."""

    group: Group
    device: torch.device
    clock: Clock
    budget_ns: int
    """For one figure."""

    @property
    def enough_ns(self) -> int:
        """What few trials may take together."""
        return max(_LONG_NS, self.budget_ns)

    @property
    def longest_s(self) -> float:
        """What is too long for one figure, with the call that does not count."""
        least, most = _LONGEST_FIGURE_S
        return min(max(16 * self.budget_ns * 1e-9, least), most)

    def seconds(self, call: Callable[[], object]) -> float:
        """Median time of a call while all ranks make it; of the slowest rank."""
        self.group.barrier()
        self.clock(call)
        times, spent_ns, began_ns = [], 0, perf_counter_ns()
        while spent_ns < (self.budget_ns if len(times) >= _LEAST_TRIALS else self.enough_ns):
            times.append(self.clock(call))
            spent_ns = perf_counter_ns() - began_ns
        return self.slowest(statistics.median(times) * 1e-9)

    def slowest(self, value: float) -> float:
        """The largest of all ranks' values."""
        mine = torch.tensor([value], dtype=torch.float64, device=self.device)
        if self.group.size == 1:
            return value
        everyone = mine.new_empty(self.group.size, 1)
        self.group.all_gather(everyone, mine)
        return float(everyone.max())


def measure_rank(
    group: Group,
    device: torch.device,
    machine: Machine,
    dtypes: Sequence[DType],
    bind_linear: BindLinear,
    budget_s: float,
    say: Say = lambda text: None,
) -> RankFigures:
    """All figures but those of collectives. A collective call; `budget_s` is what it takes, about,
    beside making what is read."""
    num_figures = 12 + len(dtypes) * len(GEMM_ROWS) + 6
    trials = Trials(group, device, clock_of(device), int(budget_s / num_figures * 1e9))
    with torch.inference_mode():
        say("reading memory")
        memory = _memory(trials, machine)
        gemms: list[GemmRate] = []
        say("multiplying")
        for dtype in dtypes:
            gemms += _gemms(trials, dtype, bind_linear, gemms)
        say("timing small ops and copies")
        small = torch.ones(16, device=device)
        eager = trials.seconds(lambda: small + small)
        graph = _graph_floor_s(trials) if device.type == "cuda" else None
        return RankFigures(memory, tuple(gemms), eager, graph, _copies(trials))


def _memory(trials: Trials, machine: Machine) -> tuple[MemoryRead, ...]:
    """Reads by working set: of a matrix-vector product, as decoding reads weights, or of a plain
    sum, which is sometimes the faster reader."""
    found: list[MemoryRead] = []
    for level, capacity, num_bytes in _working_sets(machine, trials.group.size, trials.device):
        columns = 1024
        weight = torch.ones(num_bytes // 4 // columns, columns, device=trials.device)
        vector = torch.ones(columns, device=trials.device)
        out = torch.empty(weight.shape[0], device=trials.device)

        def read(w: torch.Tensor = weight, v: torch.Tensor = vector, o: torch.Tensor = out) -> None:
            torch.mv(w, v, out=o)

        spent = min(trials.seconds(read), trials.seconds(weight.sum))
        found.append(MemoryRead(level, weight.nbytes, weight.nbytes / spent, capacity))
    return tuple(found)


def _working_sets(
    machine: Machine, num_ranks: int, device: torch.device
) -> list[tuple[str, int, int]]:
    """(level, what a rank can count on of it, bytes to read) by rising bytes."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return [("HBM", total, 256 << 20), ("HBM", total, 1 << 30)]
    levels: list[tuple[str, int]] = []
    for cache in machine.caches:
        if cache.level >= 2:
            sharing = max(1, min(num_ranks, cache.num_sharing))
            levels.append((f"L{cache.level}", cache.num_bytes // sharing))
    levels = levels or [("L2", 1 << 20)]
    last = max(min(4 * levels[-1][1], 96 << 20), 16 << 20)
    sizes, size = [], _SMALLEST_SET
    while size < last:
        sizes.append(size)
        size *= 2
    found: list[tuple[str, int, int]] = []
    for size in [*sizes, last]:
        # A level holds what leaves it room for everything else that is in use.
        level = next(((n, c) for n, c in levels if size <= 0.75 * c), None)
        if level is not None:
            found.append((level[0], level[1], size))
        elif size >= 2 * levels[-1][1] or size == last:  # between, both answer
            found.append(("DRAM", machine.memory_bytes // num_ranks, size))
    return found


def _gemms(
    trials: Trials, dtype: DType, bind_linear: BindLinear, others: Sequence[GemmRate]
) -> list[GemmRate]:
    """Weights by few and by many rows; `others` are of other dtypes. The weights are larger than a
    processor's caches, so that one row shows what reading them costs."""
    columns, inner = 16384, 8192 if trials.device.type == "cuda" else 4096
    torch_dtype = to_torch(dtype)
    multiply = bind_linear(
        torch.ones(columns, inner, dtype=torch_dtype, device=trials.device), trials.device
    )
    found: list[GemmRate] = []
    slowest_s = 0.0
    for rows in GEMM_ROWS:
        if rows > _LEAST_ROWS:
            rival = max(
                (one.flops_per_s for one in others if one.rows == found[-1].rows), default=0
            )
            is_no_good = rival > _NO_GOOD * found[-1].flops_per_s
            if is_no_good or 2 * (2 * slowest_s) > trials.longest_s:
                break
        x = torch.ones(rows, inner, dtype=torch_dtype, device=trials.device)
        slowest_s = trials.seconds(lambda x=x: multiply(x))
        rate = 2 * rows * columns * inner / slowest_s
        found.append(GemmRate(dtype, rows, columns, inner, rate))
    return found


def _graph_floor_s(trials: Trials) -> float:
    """Time of a kernel that does next to nothing, inside a replayed graph."""
    count = 200
    values = torch.ones(16, device=trials.device)
    values.add_(1)
    torch.cuda.synchronize(trials.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            values.add_(1)
    return trials.seconds(graph.replay) / count


def _copies(trials: Trials) -> tuple[Copy, ...]:
    device = trials.device
    # On a GPU 16 MB would stay in its cache, and be copied in less time than a launch takes.
    num_bytes = 1 << (28 if device.type == "cuda" else 24)
    there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    paths = [("host_to_host", there, torch.empty_like(there))]
    if device.type == "cuda":
        host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        paths = [
            ("device_to_device", there, torch.empty_like(there)),
            ("device_to_host", there, host),
            ("host_to_device", host, there),
        ]
    found = []
    for path, source, target in paths:
        large = trials.seconds(lambda s=source, t=target: t.copy_(s, non_blocking=True))
        small = trials.seconds(lambda s=source, t=target: t[:64].copy_(s[:64], non_blocking=True))
        found.append(Copy(path, num_bytes / max(large - small, large / 2), small))
    return tuple(found)


def measure_collectives(
    groups: Mapping[str, Group], device: torch.device, budget_s: float, say: Say = lambda text: None
) -> tuple[CollectiveFit, ...]:
    """All-reduce and all-gather over sizes, by each of `groups` (by the name `--collective` takes).
    A collective call of ranks that are at least two."""
    found: list[CollectiveFit] = []
    clock = clock_of(device)
    for by, group in groups.items():
        say(f"all-reduce and all-gather by {by}")
        budget_ns = int(budget_s * 1e9 / len(groups) / (2 * len(_MESSAGE_BYTES)))
        trials = Trials(group, device, clock, budget_ns)
        found += [_fit(trials, op, by) for op in ("all_reduce", "all_gather")]
    return tuple(found)


def _fit(trials: Trials, op: str, by: str) -> CollectiveFit:
    sizes = _MESSAGE_BYTES
    if trials.device.type == "cuda":
        sizes += _MORE_MESSAGE_BYTES
    peers, size = trials.group.size - 1, trials.group.size
    share = (2 if op == "all_reduce" else 1) * peers / size
    points = {num_bytes: _collective_s(trials, op, num_bytes) for num_bytes in sizes}
    lines = fit_two_lines([share * b for b in points], list(points.values()))
    # Measured on one number of ranks: what each further rank adds is not told apart.
    return CollectiveFit(
        op=op,
        by=by,
        graph=False,
        a_s=lines.a_s,
        b_s=0.0,
        b1_bytes_per_s=lines.b1_bytes_per_s,
        c_s=lines.c_s,
        d_s=0.0,
        b2_bytes_per_s=lines.b2_bytes_per_s,
        smallest_bytes=sizes[0],
        largest_bytes=sizes[-1],
        error=lines.error,
        points=points,
    )


def _collective_s(trials: Trials, op: str, num_bytes: int) -> float:
    """Median time of one call. All ranks make the same number of calls: a collective that one rank
    makes once more would never end."""
    group, device = trials.group, trials.device
    count = num_bytes // 4
    mine = torch.zeros(count if op == "all_reduce" else count // group.size, device=device)
    everyone = torch.zeros(group.size, mine.shape[0], device=device)

    def call() -> None:
        if op == "all_reduce":
            group.all_reduce(mine)
        else:
            group.all_gather(everyone, mine)

    group.barrier()
    first_s = trials.slowest(trials.clock(call) * 1e-9)
    usual_s = trials.slowest(min(trials.clock(call) for _ in range(2)) * 1e-9)
    wanted = trials.budget_ns * 1e-9 / max(min(first_s, usual_s), 1e-7)
    num_trials = max(_LEAST_TRIALS, min(400, int(wanted)))
    group.barrier()
    return trials.slowest(statistics.median(trials.clock(call) for _ in range(num_trials)) * 1e-9)
