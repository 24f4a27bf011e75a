"""Ten thousand tiny requests through the demo model: memory, descriptors and threads of every rank
must stay flat, and every request must be answered.

    python profiling/many_requests.py --tp 2 --requests 10000

Requests differ in length, sampling and n; one in ten is cancelled halfway. What the ranks hold is
read after every tenth part; the first part warms up.
"""

import argparse
import asyncio
import os
import random
import sys
import time
from contextlib import aclosing
from pathlib import Path

from tpinfer import AsyncEngine, SamplingParams

CONCURRENT = 64
PARTS = 10


def held(pid: int) -> tuple[float, int, int]:
    """(resident MB, open descriptors, threads) of a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return int(status["VmRSS"].split()[0]) / 1024, descriptors, int(status["Threads"])


def children() -> list[int]:
    """Processes that this one started and that still run."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


async def one(engine: AsyncEngine, number: int, draw: random.Random) -> str:
    """Send one request; says how it ended."""
    params = SamplingParams(
        temperature=draw.choice((0.0, 0.8)),
        max_tokens=draw.randint(1, 6),
        n=draw.choice((1, 1, 1, 2)),
        seed=number,
        ignore_eos=True,
    )
    prompt = [draw.randrange(3, 1000) for _ in range(draw.randint(1, 24))]
    if number % 10 == 9:
        async with aclosing(engine.generate(prompt, params)) as events:
            async for _ in events:
                return "cancelled"
    result = await engine.complete(prompt, params)
    wanted = [params.max_tokens] * params.n
    return "ok" if [len(o.token_ids) for o in result.outputs] == wanted else "wrong"


async def run(tp: int, num_requests: int, depth: int) -> int:
    """Send them all; prints a line a part; returns how many were not answered as they should."""
    draw = random.Random(1)
    async with await AsyncEngine.start("story", tp=tp, steps_in_flight=depth) as engine:
        pids = [os.getpid(), *children()]
        gate = asyncio.Semaphore(CONCURRENT)
        num_wrong = 0

        async def limited(number: int) -> str:
            async with gate:
                return await one(engine, number, draw)

        first: list[tuple[float, int, int]] = []
        for part in range(PARTS):
            began_s = time.perf_counter()
            size = num_requests // PARTS
            numbers = range(part * size, (part + 1) * size)
            outcomes = await asyncio.gather(*(limited(number) for number in numbers))
            num_wrong += sum(outcome == "wrong" for outcome in outcomes)
            engine._opened.engine.scheduler.check_idle()
            now = [held(pid) for pid in pids]
            first = first or now
            shown = "  ".join(
                f"{mb:6.1f} MB {fds:3d} fds {threads:2d} threads" for mb, fds, threads in now
            )
            rate = size / (time.perf_counter() - began_s)
            print(f"{(part + 1) * size:6d}  {rate:6.0f} requests/s  {shown}", flush=True)
        print(f"{engine._opened.engine.scheduler.stats().num_steps} steps")
        grown = [b[0] - a[0] for a, b in zip(first, now, strict=True)]
        print("grown since the first part:", "  ".join(f"{mb:+.1f} MB" for mb in grown))
        return num_wrong


def main() -> int:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--steps-in-flight", type=int, default=1)
    args = parser.parse_args()
    num_wrong = asyncio.run(run(args.tp, args.requests, args.steps_in_flight))
    print(f"{num_wrong} answered wrongly")
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
