"""The scheduler: nothing is lost, nothing is owned twice, what cannot run is refused with both
numbers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpinfer.config.errors import ConfigError
from tpinfer.scheduling.block_pool import BlockPool
from tpinfer.scheduling.request import Sequence
from tpinfer.scheduling.scheduler import Scheduler, SchedulerLimits


def limits(**changes: int | None) -> SchedulerLimits:
    values: dict[str, int | None] = {
        "block_size": 4,
        "num_blocks": 16,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 8,
        "max_model_len": 64,
        "window": None,
    }
    return SchedulerLimits(**(values | changes))  # pyright: ignore[reportArgumentType]


def sequence(index: int, prompt: int, max_tokens: int) -> Sequence:
    return Sequence(index, tuple(range(prompt)), max_tokens, frozenset({999}), accepted_ns=0)


def run(scheduler: Scheduler, token: int = 7) -> list[Sequence]:
    """Drive to the end, checking what must hold at every step."""
    finished: list[Sequence] = []
    for now in range(1, 2000):
        if not scheduler.has_work:
            return finished
        scheduler.admit(now)
        plan = scheduler.plan()
        assert plan is not None
        assert sum(plan.num_tokens) <= scheduler.limits.max_num_batched_tokens
        assert len(set(plan.rows)) == len(plan.rows)
        held = [block for s in scheduler.running for block in s.blocks]
        assert len(held) == len(set(held)), "a block has two owners"
        assert len(held) + scheduler.pool.num_free == scheduler.limits.num_blocks
        size = scheduler.limits.block_size
        for s in scheduler.running:
            counts = dict(zip(plan.rows, plan.num_tokens, strict=True))
            if s.row in counts:
                end = s.num_computed + counts[s.row]
                assert (s.num_dropped_blocks + len(s.blocks)) * size >= end
        samples = sum(plan.num_samples)
        news = scheduler.commit(plan, [token] * samples, now)
        finished += [s for s, _ in news if s.finish_reason]
    raise AssertionError("the scheduler never came to rest")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=12),
    st.sampled_from([None, 3, 8]),
)
def test_every_request_ends_once_with_its_tokens(
    shapes: list[tuple[int, int]], window: int | None
) -> None:
    scheduler = Scheduler(limits(window=window))
    sequences = [sequence(i, prompt, tokens) for i, (prompt, tokens) in enumerate(shapes)]
    for s in sequences:
        scheduler.add(s)
    finished = run(scheduler)
    assert sorted(s.index for s in finished) == list(range(len(shapes)))
    assert all(len(s.token_ids) == s.max_tokens for s in sequences)
    assert scheduler.pool.num_free == scheduler.limits.num_blocks


def test_a_stop_token_ends_a_sequence() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(sequence(0, 3, 10))
    (ended,) = run(scheduler, token=999)
    assert ended.finish_reason == "stop" and ended.token_ids == [999]


def test_decodes_come_before_prompt_chunks() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(sequence(0, 2, 5))
    scheduler.admit(1)
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(plan, [7], 2)
    scheduler.add(sequence(1, 20, 5))
    scheduler.admit(3)
    plan = scheduler.plan()
    assert plan is not None
    assert list(zip(plan.num_tokens, plan.num_samples, strict=True)) == [(1, 1), (7, 0)]


def test_what_never_fits_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"needs 8 KV blocks .* has 4"):
        Scheduler(limits(num_blocks=4)).add(sequence(0, 20, 13))
    with pytest.raises(ConfigError, match=r"make 70, but --max-model-len is 64"):
        Scheduler(limits()).add(sequence(0, 60, 10))


def test_blocks_of_one_sequence_adjoin() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(sequence(0, 5, 20))
    scheduler.admit(1)
    plan = scheduler.plan()
    assert plan is not None and plan.new_blocks == ((0, 0, 1, 2, 3, 4, 5),)


def test_blocks_behind_every_window_are_given_back() -> None:
    scheduler = Scheduler(limits(window=4))
    scheduler.add(sequence(0, 8, 40))
    most = 0
    while scheduler.has_work:
        scheduler.admit(0)
        plan = scheduler.plan()
        assert plan is not None
        most = max(most, len(scheduler.running[0].blocks))
        scheduler.commit(plan, [7] * sum(plan.num_samples), 0)
    assert most <= 4, "47 tokens of context must not hold 12 blocks when a window of 4 is read"


def test_abort_ends_running_and_waiting_and_frees_all() -> None:
    scheduler = Scheduler(limits(max_num_seqs=1))
    for index in range(3):
        scheduler.add(sequence(index, 3, 5))
    scheduler.admit(0)
    scheduler.plan()
    ended = scheduler.abort_all("abort")
    assert [s.finish_reason for s in ended] == ["abort"] * 3
    assert scheduler.pool.num_free == 16 and not scheduler.has_work


def test_released_rows_travel_with_the_next_plan_unless_taken_again() -> None:
    scheduler = Scheduler(limits(max_num_seqs=2))
    for index, tokens in enumerate((1, 3, 1)):
        scheduler.add(sequence(index, 1, tokens))
    seen = []
    while scheduler.has_work:
        admitted = [s.row for s in scheduler.admit(0)]
        plan = scheduler.plan()
        assert plan is not None
        seen.append((admitted, plan.released_rows))
        scheduler.commit(plan, [7] * len(plan.rows), 0)
    # Sequence 2 takes the row that sequence 0 left: its record replaces the old one, so that
    # releasing the row with the next plan would lose it.
    assert seen == [([0, 1], ()), ([0], ()), ([], (0,))]


@given(st.lists(st.integers(1, 6), max_size=8))
def test_pool_prefers_runs(counts: list[int]) -> None:
    pool, held = BlockPool(16), []
    for count in counts:
        if count > pool.num_free:
            with pytest.raises(ValueError, match="KV blocks asked for"):
                pool.take(count)
            break
        taken = pool.take(count)
        assert taken == tuple(range(taken[0], taken[0] + count))
        held += taken
    assert len(set(held)) == len(held)
