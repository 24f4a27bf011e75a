"""A start-up read of what one rank can reach, with all ranks of the group at it at once. About
0.3 s.

Each number is the best of several short trials: a ceiling is what the machine can do, not what
it did while others used it. Not a benchmark of any op; `topo probe` will measure more, for
longer.
"""

from collections.abc import Callable, Sequence
from time import perf_counter_ns

import torch

from tpinfer.collectives.group import Group
from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
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

    On a GPU times are taken with events; that path has not run on one yet.
    """
    clock = _device_clock(device) if device.type == "cuda" else _host_clock
    share_ns = int(budget_s * 1e9 / (4 + len(dtypes)))
    group.barrier()
    with torch.inference_mode():
        if device.type == "cuda":
            memory = _gpu_memory(device, clock, share_ns)
        else:
            memory = _cpu_memory(machine or discover_machine(), group.size, clock, share_ns)
        rates = {dtype: _matmul_rate(dtype, device, clock, share_ns) for dtype in dtypes}
        floor_s = _op_floor_s(device, clock, share_ns)
        latency_s, bandwidth = _collective(group, device)
    return Ceilings(memory, rates, floor_s, latency_s, bandwidth, ORIGIN)


Clock = Callable[[Callable[[], object]], int]
"""Runs something once and says how many ns it took."""


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
    machine: Machine, num_ranks: int, clock: Clock, budget_ns: int
) -> tuple[MemoryLevel, ...]:
    """Read rates by level: matrix-vector products over float32 weights that fit it, as decoding
    reads them."""
    levels = []
    for cache in machine.caches:
        if cache.level < 2:
            continue
        # What this rank can count on: the whole of a private cache, its share of one that ranks
        # have in common.
        ranks_sharing = max(1, min(num_ranks, cache.num_sharing))
        levels.append((f"L{cache.level}", cache.num_bytes // ranks_sharing))
    levels = levels or [("cache", 1 << 20)]
    beyond = min(4 * levels[-1][1], 96 << 20)
    found = [
        MemoryLevel(name, size, _read_rate(size // 2, clock, budget_ns // 2))
        for name, size in levels
    ]
    memory = _read_rate(max(beyond, 16 << 20), clock, budget_ns)
    return (*found, MemoryLevel("DRAM", machine.memory_bytes // num_ranks, memory))


def _read_rate(num_bytes: int, clock: Clock, budget_ns: int) -> float:
    """Bytes per second of a matrix-vector product over `num_bytes` of weights."""
    columns = 1024
    weight = torch.ones(max(16, num_bytes // 4 // columns), columns)
    vector, out = torch.ones(columns), torch.empty(weight.shape[0])
    spent = _best_ns(clock, lambda: torch.mv(weight, vector, out=out), budget_ns)
    return weight.nbytes / (spent * 1e-9)


def _gpu_memory(device: torch.device, clock: Clock, budget_ns: int) -> tuple[MemoryLevel, ...]:
    """HBM by a long read; L2 is left out, since a step's weights rarely fit it."""
    weight = torch.ones(64 << 20, device=device)
    spent = _best_ns(clock, weight.sum, budget_ns)
    total = torch.cuda.get_device_properties(device).total_memory
    return (MemoryLevel("HBM", total, weight.nbytes / (spent * 1e-9)),)


def _matmul_rate(dtype: DType, device: torch.device, clock: Clock, budget_ns: int) -> float:
    """Operations per second of a square matmul in `dtype`."""
    size = 8192 if device.type == "cuda" else 512
    left = torch.ones(size, size, dtype=to_torch(dtype), device=device)
    right = torch.ones(size, size, dtype=to_torch(dtype), device=device)
    spent = _best_ns(clock, lambda: left @ right, budget_ns)
    return 2 * size**3 / (spent * 1e-9)


def _op_floor_s(device: torch.device, clock: Clock, budget_ns: int) -> float:
    """Least time of an op that does next to nothing."""
    small = torch.ones(16, device=device)
    return _best_ns(clock, lambda: small.add_(1), budget_ns // 4) * 1e-9


def _collective(group: Group, device: torch.device) -> tuple[float, float]:
    """(seconds of a small all-reduce, bytes per second of a large one); infinite bandwidth for
    one rank.

    Fixed trial counts: ranks must agree on how often they call it.
    """
    if group.size == 1:
        return 0.0, _NO_PEERS_BYTES_PER_S
    best = {}
    for num_bytes, trials in ((_SMALL_BYTES, 200), (_LARGE_BYTES, 12)):
        buffer = torch.zeros(num_bytes // 4, device=device)
        times = []
        for _ in range(trials):
            began = perf_counter_ns()
            group.all_reduce(buffer)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(perf_counter_ns() - began)
        best[num_bytes] = min(times) * 1e-9
    latency_s = best[_SMALL_BYTES]
    sent = 2 * (group.size - 1) / group.size * _LARGE_BYTES
    return latency_s, sent / max(best[_LARGE_BYTES] - latency_s, 1e-9)
