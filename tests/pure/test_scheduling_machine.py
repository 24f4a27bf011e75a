"""The scheduler against the model device: whatever comes, in whatever order, every query reads the
right keys, every sequence gets the tokens it gets alone, and ends once."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.pure.model_device import FakeCosts, Loop, ModelDevice, limits, sequence
from tpinfer.config.errors import ConfigError
from tpinfer.scheduling.request import Sequence
from tpinfer.steps.plan import SamplingRecord

SHARED = tuple(range(200, 240))
"""What prompts have in common, from the beginning."""


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come and go while steps are planned ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop(limits())
        self.depth = 1
        self.alive: list[Sequence] = []
        self.num_added = 0

    @initialize(choices=st.data())
    def begin(self, choices: st.DataObject) -> None:
        def draw(strategy: st.SearchStrategy[int]) -> int:
            return choices.draw(strategy)

        groups = draw(st.integers(1, 4))
        window = choices.draw(st.none() | st.integers(1, 9))
        self.depth = draw(st.integers(1, 3))
        chosen = limits(
            block_size=draw(st.integers(1, 4)),
            num_blocks=draw(st.integers(groups, 24)),
            max_num_seqs=draw(st.integers(1, 5)),
            max_num_batched_tokens=draw(st.integers(1, 12)),
            max_model_len=60,
            window=window,
            num_groups=groups,
            num_host_blocks=draw(st.sampled_from([0, 0, 3, 9, 30])),
            prefix_caching=choices.draw(st.booleans()),
            step_budget_ns=choices.draw(st.none() | st.integers(0, 12)),
            ageing_ns=10,
        )
        costs = FakeCosts(1, draw(st.integers(0, 6)), window) if draw(st.integers(0, 2)) else None
        self.loop = Loop(chosen, costs)

    @rule(
        shared=st.integers(0, 20),
        tail=st.lists(st.integers(0, 3), max_size=6),
        max_tokens=st.integers(1, 16),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        priority=st.integers(-2, 2),
        salt=st.sampled_from(["", "", "", "a"]),
        whole=st.sampled_from([False, False, False, True]),
        broken=st.sampled_from([False, False, False, False, True]),
    )
    def add(
        self,
        shared: int,
        tail: list[int],
        max_tokens: int,
        n: int,
        priority: int,
        salt: str,
        whole: bool,
        broken: bool,
    ) -> None:
        family = [
            sequence(
                SHARED[:shared] + tuple(tail),
                max_tokens,
                self.loop.now_ns,
                sampling=SamplingRecord(index=index),
                priority=priority,
                cache_salt=salt,
                needs_whole_prompt=whole,
            )
            for index in range(n)
        ]
        try:
            self.loop.add(*family)
        except ConfigError:
            assert all(one.id == -1 for one in family)
            return
        self.num_added += n
        self.alive += family
        if broken:
            self.loop.broken.add(family[-1].id)

    @precondition(lambda self: len(self.loop.in_flight) < self.depth)
    @rule()
    def plan(self) -> None:
        self.loop.plan()

    @precondition(lambda self: self.loop.in_flight)
    @rule()
    def commit(self) -> None:
        self.loop.commit()

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 1000), reason=st.sampled_from(["abort", "cut"]))
    def end(self, which: int, reason: str) -> None:
        one = self.alive[which % len(self.alive)]
        was_unfinished = one.finish_reason is None
        assert self.loop.scheduler.finish(one, reason) == was_unfinished
        if was_unfinished:
            self.loop.saw_end(one)
        assert not one.blocks and one.row == -1

    @precondition(lambda self: self.loop.in_flight)
    @rule()
    def fail(self) -> None:
        scheduled, _ = self.loop.in_flight.popleft()
        for one in self.loop.scheduler.fail(scheduled):
            assert one in scheduled.sequences and one.finish_reason == "error"
            self.loop.saw_end(one)

    @rule()
    def rebuild(self) -> None:
        interrupted = self.loop.scheduler.rebuild()
        assert all(one.finish_reason is None for one in interrupted)
        self.loop.in_flight.clear()
        self.loop.device = ModelDevice(self.loop.scheduler.limits)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 1000), steps=st.integers(0, 3))
    def hold_back(self, which: int, steps: int) -> None:
        one = self.alive[which % len(self.alive)]
        self.loop.scheduler.hold_back(one, self.loop.device.last_step + steps)

    @rule(rounds=st.integers(1, 12))
    def run_on(self, rounds: int) -> None:
        for _ in range(rounds):
            while len(self.loop.in_flight) < self.depth and self.loop.plan():
                pass
            if self.loop.in_flight:
                self.loop.commit()

    @invariant()
    def adds_up(self) -> None:
        scheduler = self.loop.scheduler
        scheduler.check()
        self.alive = [one for one in self.alive if one.finish_reason is None]
        assert scheduler.num_running + scheduler.num_waiting == len(self.alive)

    def teardown(self) -> None:
        self.loop.drain(self.depth)
        assert len(self.loop.ended) == self.num_added


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)
