"""Time of an all-reduce between CPU ranks of this host, per backend and size, side by side.

    python profiling/collective_latency.py --ranks 2

Backends take turns (A B A B ...), five rounds; each figure is the median over the rounds of the
median of a round, in us, on rank 0. DeepSpeed's op is left out where it is not built.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter_ns

from tpinfer.config.environment import read_environment
from tpinfer.launching.guard import guard_rank, run_rank
from tpinfer.launching.ranks import launch
from tpinfer.launching.seat import Seat, seat_from_environment

SIZES = (2 << 10, 8 << 10, 64 << 10, 1 << 20, 8 << 20)
ROUNDS = 5


def median_us(all_reduce: Callable[[object], None], num_bytes: int) -> float:
    """Of one backend and size."""
    import torch

    buffer = torch.zeros(num_bytes // 4)
    samples = []
    for _ in range(200 if num_bytes <= 1 << 16 else 20):
        began_ns = perf_counter_ns()
        all_reduce(buffer)
        samples.append((perf_counter_ns() - began_ns) / 1e3)
    return statistics.median(samples)


def measure(seat: Seat) -> int:
    """One rank; rank 0 prints."""
    import torch

    from tpinfer.collectives.deepspeed_shm import DeepSpeedGroup, library_path
    from tpinfer.collectives.shared_memory import open_shared_memory
    from tpinfer.collectives.torch_groups import directory_store, open_gloo
    from tpinfer.machine.discover import discover_machine

    torch.set_num_threads(1)
    cores = discover_machine().num_cores
    groups = {}
    for name, native in (("ring in C", True), ("ring in Python", False)):
        label = f"{seat.run_id}-{name.replace(' ', '-')}"
        groups[name] = open_shared_memory(label, seat.rank, seat.world, 60.0, cores, native)
    if library_path().is_file() and seat.world <= cores:
        ring = open_shared_memory(f"{seat.run_id}-under", seat.rank, seat.world, 60.0, cores)
        groups["DeepSpeed"] = DeepSpeedGroup(ring, library_path(), seat.run_id)
    meeting = read_environment().rendezvous
    assert meeting is not None, "our launcher names a place to meet"
    groups["gloo"] = open_gloo(
        directory_store(meeting, seat.world, 60.0), seat.rank, seat.world, 60.0
    )
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for size in SIZES:
            for name, group in groups.items():
                group.barrier()
                found.setdefault((name, size), []).append(median_us(group.all_reduce, size))
    if seat.rank == 0:
        print("| us | " + " | ".join(f"{size >> 10} KB" for size in SIZES) + " |")
        print("|---" * (len(SIZES) + 1) + "|")
        for name in groups:
            cells = [f"{statistics.median(found[name, size]):.1f}" for size in SIZES]
            print(f"| {name} | " + " | ".join(cells) + " |")
    for group in groups.values():
        group.close()
    return 0


def main() -> int:
    """Launcher or rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    environment = read_environment()
    if environment.rank is None:
        return launch(sys.argv[1:], args.ranks, module="profiling.collective_latency")
    seat = replace(seat_from_environment(environment, "cpu"), generation=0)
    guard_rank(seat)
    return run_rank(seat, environment, lambda: measure(seat))


if __name__ == "__main__":
    sys.exit(main())
