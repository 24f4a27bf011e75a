"""The same as the state machine, drawn from fixed seeds, so that it is known what was met: every
counter of the scheduler must have moved."""

import random
from dataclasses import astuple, fields

from tests.pure.model_device import FakeCosts, Loop, ModelDevice, limits, sequence
from tpinfer.config.errors import ConfigError
from tpinfer.scheduling.limits import SchedulerLimits, SchedulerStats
from tpinfer.scheduling.request import Sequence
from tpinfer.steps.plan import SamplingRecord

SHARED = tuple(range(200, 240))
NUM_SEEDS = 120


def drawn_limits(draw: random.Random) -> SchedulerLimits:
    groups = draw.randint(1, 4)
    return limits(
        block_size=draw.randint(1, 4),
        num_blocks=draw.randint(max(groups, 4), 30),
        max_num_seqs=draw.randint(1, 6),
        max_num_batched_tokens=draw.randint(1, 16),
        window=draw.choice([None, None, draw.randint(1, 9)]),
        num_groups=groups,
        num_host_blocks=draw.choice([0, 3, 9, 30]),
        prefix_caching=draw.random() < 0.7,
        step_budget_ns=draw.choice([None, draw.randint(0, 12)]),
        ageing_ns=10,
    )


def drawn_family(draw: random.Random, now_ns: int) -> list[Sequence]:
    prompt = SHARED[: draw.randint(0, 20)] + tuple(draw.choices(range(4), k=draw.randint(0, 6)))
    max_tokens, priority = draw.randint(1, 16), draw.randint(-2, 2)
    salt, whole = draw.choice(["", "", "a"]), draw.random() < 0.2
    return [
        sequence(
            prompt,
            max_tokens,
            now_ns,
            sampling=SamplingRecord(index=index),
            priority=priority,
            cache_salt=salt,
            needs_whole_prompt=whole,
        )
        for index in range(draw.choice([1, 1, 1, 2, 4]))
    ]


class Storm:
    """One seed's requests, aborts, failures and rebuilds."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        chosen = drawn_limits(self.draw)
        costs = FakeCosts(1, self.draw.randint(0, 6), chosen.window)
        self.loop = Loop(chosen, costs if self.draw.random() < 0.6 else None)
        self.depth = self.draw.randint(1, 3)
        self.alive: list[Sequence] = []
        self.num_added = 0

    def run(self) -> SchedulerStats:
        """Do something a few dozen times, then come to rest."""
        actions = [self.add, self.plan, self.commit, self.end, self.fail, self.rebuild, self.go_on]
        for _ in range(self.draw.randint(20, 100)):
            self.draw.choices(actions, (25, 30, 25, 4, 2, 1, 10))[0]()
            self.loop.scheduler.check()
            self.alive = [one for one in self.alive if one.finish_reason is None]
        self.loop.drain(self.depth)
        assert len(self.loop.ended) == self.num_added
        return self.loop.scheduler.stats()

    def add(self) -> None:
        family = drawn_family(self.draw, self.loop.now_ns)
        try:
            self.loop.add(*family)
        except ConfigError:
            return
        self.alive += family
        self.num_added += len(family)
        if self.draw.random() < 0.1:
            self.loop.broken.add(family[-1].id)

    def plan(self) -> None:
        if len(self.loop.in_flight) < self.depth:
            self.loop.plan()

    def commit(self) -> None:
        if self.loop.in_flight:
            self.loop.commit()

    def end(self) -> None:
        if self.alive:
            one = self.draw.choice(self.alive)
            assert self.loop.scheduler.finish(one, self.draw.choice(["abort", "cut"]))
            self.loop.saw_end(one)

    def fail(self) -> None:
        if self.loop.in_flight:
            for one in self.loop.scheduler.fail(self.loop.in_flight.popleft()[0]):
                self.loop.saw_end(one)

    def rebuild(self) -> None:
        self.loop.scheduler.rebuild()
        self.loop.in_flight.clear()
        self.loop.device = ModelDevice(self.loop.scheduler.limits)

    def go_on(self) -> None:
        for _ in range(self.draw.randint(1, 8)):
            while len(self.loop.in_flight) < self.depth and self.loop.plan():
                if self.alive and self.draw.random() < 0.1:
                    later = self.loop.device.last_step + self.draw.randint(0, 3)
                    self.loop.scheduler.hold_back(self.draw.choice(self.alive), later)
            self.commit()


def test_whatever_comes_all_is_right_and_everything_was_met() -> None:
    found = [astuple(Storm(seed).run()) for seed in range(NUM_SEEDS)]
    totals = [sum(column) for column in zip(*found, strict=True)]
    names = [field.name for field in fields(SchedulerStats)]
    met = dict(zip(names, totals, strict=True))
    assert min(met.values()) > 0, met
