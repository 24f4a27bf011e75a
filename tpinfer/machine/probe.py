"""A start-up read of what one rank can reach, with all ranks of the group at it at once.

Each number is the best of several short trials: a ceiling is what the machine can do, not what
it did while others used it. Not a benchmark of any op; `measure` takes half a minute and tells
more.
"""

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter_ns

import torch

from tpinfer.collectives.group import Group
from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.machine.clock_source import source_of
from tpinfer.machine.discover import Machine, discover_machine
from tpinfer.numerics.torch_dtypes import to_torch

ORIGIN = "measured at start-up"
_SMALL_BYTES, _LARGE_BYTES = 4096, 1 << 20
_NO_PEERS_BYTES_PER_S = float("inf")


def probe_ceilings(
    group: Group,
    dtypes: Sequence[DType],
    budget_s: float,
    device: torch.device,
    machine: Machine | None = None,
) -> Ceilings:
    """Ceilings of this rank's slice. A collective call; every rank gets its own numbers.

    `budget_s` is for the trials; making what they read comes on top. On a GPU times are taken with
    events.
    """
    clock = clock_of(device)
    share_ns = int(budget_s * 1e9 / (4 + len(dtypes)))
    with torch.inference_mode():
        if device.type == "cuda":
            memory = _gpu_memory(device, clock, share_ns)
        else:
            memory = _cpu_memory(machine or discover_machine(), group, clock, share_ns)
        group.barrier()
        rates = {dtype: _matmul_rate(dtype, device, clock, share_ns) for dtype in dtypes}
        source, _ = source_of(device)
        compute_mhz = source.read().compute_mhz if source is not None else None
        floor_s = _op_floor_s(device, clock, share_ns)
        group.barrier()
        latency_s, bandwidth = _collective(group, device)
    return Ceilings(memory, rates, floor_s, latency_s, bandwidth, ORIGIN, compute_mhz=compute_mhz)


def probe_host_copy(device: torch.device, num_bytes: int = 1 << 24) -> float:
    """Bytes per second of copies between the device's memory and (on a GPU pinned) host memory;
    best of three, after one that does not count."""
    is_cuda = device.type == "cuda"
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
    clock = clock_of(device)
    target.copy_(source)
    best_ns = min(clock(lambda: target.copy_(source, non_blocking=True)) for _ in range(3))
    return num_bytes / best_ns * 1e9


Clock = Callable[[Callable[[], object]], int]
"""Runs something once and says how many ns it took."""


def clock_of(device: torch.device) -> Clock:
    """How time is taken on `device`."""
    return _device_clock(device) if device.type == "cuda" else _host_clock


def _host_clock(call: Callable[[], object]) -> int:
    began = perf_counter_ns()
    call()
    return perf_counter_ns() - began


def _device_clock(device: torch.device) -> Clock:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(call: Callable[[], object]) -> int:
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize(device)
        return max(1, int(start.elapsed_time(stop) * 1e6))

    return clock


def _best_ns(clock: Clock, call: Callable[[], object], budget_ns: int) -> int:
    """Shortest of the trials that fit the budget; at least three."""
    best, began, trials = clock(call), perf_counter_ns(), 1
    while trials < 3 or perf_counter_ns() - began < budget_ns:
        best = min(best, clock(call))
        trials += 1
    return best


def _cpu_memory(
    machine: Machine, group: Group, clock: Clock, budget_ns: int
) -> tuple[MemoryLevel, ...]:
    """Read rates by level, of float32 weights that fit it. All ranks are at the same level at once,
    since they share what lies behind it."""
    num_ranks = group.size
    levels: list[tuple[str, int]] = []
    for cache in machine.caches:
        if cache.level < 2:
            continue
        # What this rank can count on: the whole of a private cache, its share of one that ranks
        # have in common.
        ranks_sharing = max(1, min(num_ranks, cache.num_sharing))
        levels.append((f"L{cache.level}", cache.num_bytes // ranks_sharing))
    levels = levels or [("cache", 1 << 20)]
    beyond = max(min(4 * levels[-1][1], 96 << 20), 16 << 20)
    reads = [(name, size, size // 2, budget_ns // 2) for name, size in levels]
    reads.append(("DRAM", machine.memory_bytes // num_ranks, beyond, budget_ns))
    found: list[MemoryLevel] = []
    fastest = 0.0
    for name, capacity, num_bytes, share_ns in reversed(reads):
        # A level is no slower than the one behind it, whatever a busy moment made of it.
        fastest = max(fastest, _read_rate(num_bytes, group, clock, share_ns))
        found.insert(0, MemoryLevel(name, capacity, fastest))
    return tuple(found)


def _read_rate(num_bytes: int, group: Group, clock: Clock, budget_ns: int) -> float:
    """Bytes per second over `num_bytes` of weights: of a matrix-vector product, as decoding reads
    them, or of a plain sum, which is sometimes the faster reader."""
    columns = 1024
    weight = torch.ones(max(16, num_bytes // 4 // columns), columns)
    vector, out = torch.ones(columns), torch.empty(weight.shape[0])
    group.barrier()
    spent = _best_ns(clock, lambda: torch.mv(weight, vector, out=out), budget_ns // 2)
    spent = min(spent, _best_ns(clock, weight.sum, budget_ns // 2))
    return weight.nbytes / (spent * 1e-9)


def _gpu_memory(device: torch.device, clock: Clock, budget_ns: int) -> tuple[MemoryLevel, ...]:
    """HBM by a long read; L2 is left out, since a step's weights rarely fit it."""
    weight = torch.ones(64 << 20, device=device)
    spent = _best_ns(clock, weight.sum, budget_ns)
    total = torch.cuda.get_device_properties(device).total_memory
    return (MemoryLevel("HBM", total, weight.nbytes / (spent * 1e-9)),)


def _matmul_rate(dtype: DType, device: torch.device, clock: Clock, budget_ns: int) -> float:
    """Operations per second of a square matmul in `dtype`, as large as fits the budget three times:
    a dtype the processor does not know is a hundred times slower than one it does."""
    size, largest = (1024, 8192) if device.type == "cuda" else (64, 512)
    best = 0.0
    while True:
        left = torch.ones(size, size, dtype=to_torch(dtype), device=device)
        right = torch.ones(size, size, dtype=to_torch(dtype), device=device)
        multiply = partial(torch.mm, left, right)
        last = size == largest
        spent = _best_ns(clock, multiply, budget_ns // 2 if last else 0)
        best = max(best, 2 * size**3 / (spent * 1e-9))
        if last or 8 * 3 * spent > budget_ns:
            return best
        size *= 2


def _op_floor_s(device: torch.device, clock: Clock, budget_ns: int) -> float:
    """Least time of an op that does next to nothing."""
    left, right = torch.ones(16, device=device), torch.ones(16, device=device)
    return _best_ns(clock, lambda: left + right, budget_ns // 4) * 1e-9


def _collective(group: Group, device: torch.device) -> tuple[float, float]:
    """(seconds of a small all-reduce, bytes per second of a large one); infinite bandwidth for
    one rank.

    Fixed trial counts: ranks must agree on how often they call it.
    """
    if group.size == 1:
        return 0.0, _NO_PEERS_BYTES_PER_S
    usual = {}
    for num_bytes, trials in ((_SMALL_BYTES, 200), (_LARGE_BYTES, 12)):
        buffer = torch.zeros(num_bytes // 4, device=device)
        times = []
        for _ in range(trials):
            began = perf_counter_ns()
            group.all_reduce(buffer)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(perf_counter_ns() - began)
        # The lower quartile: where ranks take turns on a core, the least is a stroke of luck.
        usual[num_bytes] = sorted(times)[trials // 4] * 1e-9
    latency_s = usual[_SMALL_BYTES]
    sent = 2 * (group.size - 1) / group.size * _LARGE_BYTES
    return latency_s, sent / max(usual[_LARGE_BYTES] - latency_s, 1e-9)
