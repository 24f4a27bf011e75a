"""Time of one step plan from rank 0 to another process, over shared memory.

    python profiling/wire_latency.py

Prints the median of half a round trip of 500-byte frames, in us. The target is 60 us.
"""

import os
import statistics
import sys
import time

from tpinfer.steps.wire import PlanReader, PlanWriter

FRAMES = 2000
NAME = f"latency-{os.getpid()}"


def echo(name: str) -> None:
    """The other process: send back what arrives."""
    reader, writer = PlanReader(f"{name}-there", 0, 10.0), PlanWriter(f"{name}-back", 1)
    while (frame := reader.receive(10.0)) != b"end":
        writer.send(frame)


def main() -> int:
    """Measure and print."""
    if os.fork() == 0:
        echo(NAME)
        os._exit(0)
    writer, reader = PlanWriter(f"{NAME}-there", 1), PlanReader(f"{NAME}-back", 0, 10.0)
    one_way_us = []
    for _ in range(FRAMES):
        began_ns = time.perf_counter_ns()
        writer.send(b"x" * 500)
        reader.receive(10.0)
        one_way_us.append((time.perf_counter_ns() - began_ns) / 2000)
    writer.send(b"end")
    os.wait()
    reader.close()
    writer.close()
    ranked = sorted(one_way_us)
    print(
        f"step plan, one way: median {statistics.median(ranked):.1f} us, "
        f"p99 {ranked[int(len(ranked) * 0.99)]:.1f} us over {FRAMES} frames of 500 bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
