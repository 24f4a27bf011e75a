"""Time of one step plan from rank 0 to another process, encoded, sent, received and decoded, over
shared memory and over TCP on the loopback; and what looking for failures costs rank 0.

    python -m profiling.wire_latency [--frames 2000] [--rows 1 32 256]

A plan goes there and comes back, each way encoded by one process and decoded by the other; half of
the round trip counts. Targets: 40 us to encode and decode 256 rows, 60 us from end to end through
shared memory.
"""

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tpinfer.steps.handshake import WireRun
from tpinfer.steps.interface import PlanReader, PlanWriter
from tpinfer.steps.plan import StepPlan, decode, encode
from tpinfer.steps.shm_reader import ShmPlanReader
from tpinfer.steps.shm_writer import ShmPlanWriter
from tpinfer.steps.tcp_reader import TcpPlanReader
from tpinfer.steps.tcp_writer import TcpPlanWriter

HERE = "127.0.0.1"
NAME = f"latency-{os.getpid()}"
Ends = tuple[PlanWriter, PlanReader]


def decode_step(num_rows: int) -> StepPlan:
    """A decode step in which every sixteenth row gets a block, as they do with blocks of 16."""
    rows = tuple(range(num_rows))
    blocks = tuple((row, 5000 + row) for row in rows[::16])
    return StepPlan(100_000, rows, (1,) * num_rows, (1,) * num_rows, blocks)


def codec_us(plan: StepPlan, num_rounds: int) -> float:
    """Median time to encode and decode in one process."""
    return _median([_timed(lambda: decode(encode(plan))) for _ in range(num_rounds)])


@contextlib.contextmanager
def shared_memory(name: str, peer: Callable[[PlanWriter, PlanReader], None]) -> Iterator[Ends]:
    """Ends in this process; `peer` runs in another one."""
    child = os.fork()
    if child == 0:
        reader = ShmPlanReader(f"{name}-there", 0, 10.0)
        peer(ShmPlanWriter(f"{name}-back", 1), reader)
        os._exit(0)
    writer = ShmPlanWriter(f"{name}-there", 1)
    yield writer, ShmPlanReader(f"{name}-back", 0, 10.0)
    os.waitpid(child, 0)
    writer.close()


@contextlib.contextmanager
def tcp(name: str, peer: Callable[[PlanWriter, PlanReader], None]) -> Iterator[Ends]:
    """The same over two connections."""
    runs = [WireRun(f"{name}-{way}", 2, os.urandom(32)) for way in ("there", "back")]
    writer, back = (TcpPlanWriter(HERE, 0, run, [1]) for run in runs)
    child = os.fork()
    if child == 0:
        reader = TcpPlanReader(HERE, writer.port, runs[0], 1, 10.0)
        back.wait_attached(10.0)
        peer(back, reader)
        os._exit(0)
    writer.wait_attached(10.0)
    yield writer, TcpPlanReader(HERE, back.port, runs[1], 1, 10.0)
    os.waitpid(child, 0)
    writer.close()
    back.close()


def echo(writer: PlanWriter, reader: PlanReader) -> None:
    """The other process: decode what arrives and send it back, encoded anew."""
    while frame := reader.receive(10.0):
        writer.send(encode(decode(frame)))
    writer.close()


def one_way_us(ends: Ends, plan: StepPlan, num_frames: int) -> list[float]:
    """Half of each round trip, sorted."""
    writer, reader = ends

    def round_trip() -> None:
        writer.send(encode(plan))
        decode(reader.receive(10.0))

    return sorted(_timed(round_trip) / 2 for _ in range(num_frames))


def looks_ns(num_readers: int, num_rounds: int) -> dict[str, float]:
    """Median time of a look at the status of so many readers, all of them well."""
    found = {}
    shm = ShmPlanWriter(f"{NAME}-look", num_readers)
    readers: list[PlanReader] = [ShmPlanReader(f"{NAME}-look", i, 5.0) for i in range(num_readers)]
    run = WireRun(f"{NAME}-look", num_readers + 1, os.urandom(32))
    remote = TcpPlanWriter(HERE, 0, run, range(1, num_readers + 1))
    waiting = threading.Thread(target=remote.wait_attached, args=(10.0,))
    waiting.start()
    readers += [TcpPlanReader(HERE, remote.port, run, i + 1, 10.0) for i in range(num_readers)]
    waiting.join()
    for name, writer in (("shared memory", shm), ("TCP", remote)):
        for what, look in (("steps", writer.failed_steps), ("readers", writer.failed_readers)):
            taken_us = _median([_timed(look) for _ in range(num_rounds)])
            found[f"failed {what} of {num_readers} ranks, {name}"] = 1e3 * taken_us
    for end in (*readers, shm, remote):
        end.close()
    return found


def _timed(call: Callable[[], object]) -> float:
    began_ns = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began_ns) / 1e3


def _median(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=2000, help="round trips of each (2000)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256], help="rows of a plan")
    args = parser.parse_args()
    for num_rows in args.rows:
        plan = decode_step(num_rows)
        print(
            f"{num_rows} rows, {len(encode(plan))} bytes: encode and decode "
            f"{codec_us(plan, args.frames):.1f} us"
        )
        for open_ends in (shared_memory, tcp):
            with open_ends(f"{NAME}-{num_rows}", echo) as ends:
                ranked = one_way_us(ends, plan, args.frames)
                ends[0].send(b"")
                ends[1].close()
            name = open_ends.__name__.replace("_", " ")
            print(
                f"  {name}, from end to end: median {_median(ranked):.1f} us, "
                f"p99 {ranked[int(len(ranked) * 0.99)]:.1f} us over {args.frames} plans"
            )
    for name, taken_ns in looks_ns(8, args.frames).items():
        print(f"a look for {name}: {taken_ns:.0f} ns")
    return 0


if __name__ == "__main__":
    sys.exit(main())
