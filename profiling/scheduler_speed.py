"""Time that the scheduler takes for one step: planning it and committing its tokens.

    python profiling/scheduler_speed.py

256 sequences decode with blocks of 16 tokens, at lengths that are spread out, so that each step
some of them take a block and put one into the prefix cache. Prints, per situation, the least of
several rounds' medians and what lies around it, in us. The target is 200 us.
"""

import statistics
import sys
import time
from dataclasses import dataclass

from tpinfer.scheduling.limits import SchedulerLimits
from tpinfer.scheduling.request import Sequence
from tpinfer.scheduling.scheduler import Scheduler

TARGET_US = 200.0
NUM_RUNNING = 256
BLOCK_SIZE = 16
ROUNDS, STEPS = 7, 96
NUM_PROMPTS, NUM_OLD, PROMPT_TOKENS = 160, 121, 8_000
DECODED_TOKEN = 11


@dataclass(frozen=True, slots=True)
class Situation:
    """What there is beside the decodes."""

    name: str
    num_waiting: int = 0
    """Requests that wait for a row all the while."""
    has_prompts: bool = False
    """Whether prompts are computed all the while, one after the other, in chunks."""
    is_aligned: bool = False
    """Whether all decodes fill their blocks in the same step."""
    is_full: bool = False
    """Whether all blocks beside theirs keep prefixes of old requests, to be given up one by one."""
    depth: int = 1


SITUATIONS = (
    Situation("256 decodes"),
    Situation("256 decodes, planned one step ahead", depth=2),
    Situation("256 decodes, 32 waiting", num_waiting=32),
    Situation("256 decodes and a prompt's chunk", has_prompts=True),
    Situation("256 decodes and a prompt's chunk, 32 waiting", 32, has_prompts=True),
    Situation("256 decodes that fill blocks together", is_aligned=True),
    Situation("256 decodes, cache full of old prefixes", is_full=True),
)


def prepared(situation: Situation) -> Scheduler:
    """A scheduler with all decodes running."""
    limits = SchedulerLimits(
        block_size=BLOCK_SIZE,
        num_blocks=60_000 if situation.is_full else 120_000,
        max_num_seqs=NUM_RUNNING + situation.has_prompts,
        max_num_batched_tokens=2048,
        max_model_len=100_000,
    )
    scheduler = Scheduler(limits)
    if situation.is_full:
        for index in range(NUM_OLD):
            add(scheduler, 3000 + index, PROMPT_TOKENS, 1)
        while scheduler.has_work:
            step(scheduler)
    for index in range(NUM_RUNNING):
        add(scheduler, index, 400 + (0 if situation.is_aligned else index), 5000)
    while scheduler.num_waiting or any(not one.token_ids for one in scheduler.running):
        step(scheduler)
    for index in range(NUM_PROMPTS if situation.has_prompts else 0):
        add(scheduler, 1000 + index, PROMPT_TOKENS, 1)
    for index in range(situation.num_waiting):
        add(scheduler, 2000 + index, 500, 100)
    return scheduler


def add(scheduler: Scheduler, index: int, length: int, max_tokens: int) -> None:
    """Queue a request with a prompt of its own."""
    prompt = tuple(range(index * 50_000, index * 50_000 + length))
    scheduler.add(Sequence(index, prompt, max_tokens, frozenset({2}), index))


def step(scheduler: Scheduler) -> None:
    """Plan a step and commit it."""
    scheduled = scheduler.schedule(1)
    assert scheduled is not None
    scheduler.commit(scheduled, [DECODED_TOKEN] * sum(scheduled.plan.num_samples), 2)


def step_times_us(scheduler: Scheduler, depth: int, num_steps: int) -> list[float]:
    """Times of steps, each one plan and one commit."""
    in_flight = []
    while len(in_flight) < depth - 1:
        in_flight.append(scheduler.schedule(1))
    took = []
    for _ in range(num_steps):
        began_ns = time.perf_counter_ns()
        in_flight.append(scheduler.schedule(1))
        planned_ns = time.perf_counter_ns()
        oldest = in_flight.pop(0)
        tokens = [DECODED_TOKEN] * sum(oldest.plan.num_samples)
        resumed_ns = time.perf_counter_ns()
        scheduler.commit(oldest, tokens, 2)
        ended_ns = time.perf_counter_ns()
        took.append((planned_ns - began_ns + ended_ns - resumed_ns) / 1e3)
    for oldest in in_flight:
        scheduler.commit(oldest, [DECODED_TOKEN] * sum(oldest.plan.num_samples), 2)
    return took


def main() -> int:
    """Measure and print."""
    is_met = True
    for situation in SITUATIONS:
        scheduler = prepared(situation)
        rounds = [step_times_us(scheduler, situation.depth, STEPS) for _ in range(ROUNDS)]
        medians = sorted(statistics.median(took) for took in rounds)
        means = sorted(statistics.fmean(took) for took in rounds)
        print(
            f"{situation.name}: median {medians[0]:.0f} us (of rounds: {medians[0]:.0f} to "
            f"{medians[-1]:.0f}), mean {means[0]:.0f} us"
        )
        is_met = is_met and medians[0] <= TARGET_US
    print(f"target {TARGET_US:.0f} us")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
