"""From the end of a rank to the next token, in the middle of decoding, on CPU ranks.

    python -m profiling.rebuild_time [--tries 3] [--step-timeout 2]

Each try starts an engine of two ranks on the story model, sends SIGKILL or SIGSTOP to rank 1 when a
request's tenth token has come, and takes the time until ranks of the next generation are being
started (notice; behind a SIGSTOP it holds the step's deadline) and from there to the eleventh
token.
"""

import argparse
import asyncio
import signal
import time

from tpinfer import AsyncEngine, SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


async def measure(number: int, collective: str, step_timeout_s: float) -> tuple[float, float]:
    """(signal to notice, notice to token), in s."""
    settings = {"collective": collective, "step_timeout_s": step_timeout_s, "dtype": "float32"}
    async with await AsyncEngine.start("story", tp=2, **settings) as engine:
        opened = engine._opened
        followers, rebuilds = opened._followers, opened.engine.rebuilds
        assert followers is not None and rebuilds is not None
        next_generation, noticed_s, sent_s = rebuilds.next_generation, 0.0, 0.0

        def timed(error):
            nonlocal noticed_s
            noticed_s = time.perf_counter()
            return next_generation(error)

        rebuilds.next_generation = timed
        count = 0
        async for _ in engine.generate("Once upon a time", PARAMS):
            count += 1
            if noticed_s:
                return noticed_s - sent_s, time.perf_counter() - noticed_s
            if count == 10:
                sent_s = time.perf_counter()
                followers._processes[0].send_signal(number)
    raise RuntimeError("the request ended before the end of the rank was noticed")


def main() -> None:
    """Print one line for each signal and collective."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--step-timeout", type=float, default=2.0)
    args = parser.parse_args()
    print("| signal | collective | signal to notice (s) | notice to token (s) |")
    print("|---|---|---|---|")
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for collective in ("shared_memory", "gloo"):
            pairs = [
                asyncio.run(measure(number, collective, args.step_timeout))
                for _ in range(args.tries)
            ]
            cells = (
                " ".join(f"{value:.2f}" for value in column) for column in zip(*pairs, strict=True)
            )
            print(f"| {number.name} | {collective} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
