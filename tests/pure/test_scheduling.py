"""The scheduler rule by rule: what a step holds, what is refused, how sequences end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pure.model_device import STOP_TOKEN, FakeCosts, Loop, alone, limits, sequence
from tpinfer.config.errors import ConfigError
from tpinfer.scheduling.request import NO_TOKEN, Sequence
from tpinfer.scheduling.scheduler import Scheduler


def shapes(loop: Loop) -> list[tuple[int, int]]:
    """(query tokens, samples) of each row of the next step, which is then committed."""
    scheduled = loop.plan()
    assert scheduled is not None
    loop.commit()
    return list(zip(scheduled.plan.num_tokens, scheduled.plan.num_samples, strict=True))


def plain(prompt: int, max_tokens: int = 4, at: int = 0, **changes: object) -> Sequence:
    """A prompt that shares nothing and that no token stops."""
    tokens = tuple(range(1000 * at, 1000 * at + prompt))
    one = sequence(tokens, max_tokens, at, **changes)
    one.stop_token_ids = frozenset()
    return one


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=12),
    st.sampled_from([None, 3, 8]),
    st.integers(1, 3),
)
def test_every_request_ends_once_with_its_tokens(
    lengths: list[tuple[int, int]], window: int | None, depth: int
) -> None:
    loop = Loop(limits(window=window))
    sequences = [sequence(prompt, tokens) for prompt, tokens in lengths]
    for one in sequences:
        loop.add(one)
    loop.drain(depth)
    assert sorted(loop.ended) == list(range(len(lengths)))
    assert all(one.token_ids == alone(one) for one in sequences)


def test_decodes_come_before_prompt_chunks() -> None:
    loop = Loop(limits())
    loop.add(plain(2, 5))
    loop.step()
    loop.add(plain(20, 5, at=1))
    assert shapes(loop) == [(1, 1), (7, 0)]


def test_a_stop_token_ends_a_sequence() -> None:
    scheduler = Scheduler(limits())
    one = sequence(3, 10)
    scheduler.add(one)
    scheduled = scheduler.schedule(5)
    assert scheduled is not None and scheduled.admitted == (one,) and one.admitted_ns == 5
    assert scheduler.commit(scheduled, [STOP_TOKEN], 6) == [(one, STOP_TOKEN)]
    assert (one.finish_reason, one.token_ids, one.token_times_ns) == ("stop", [STOP_TOKEN], [6])
    scheduler.check_idle()


def test_what_never_fits_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"needs 8 KV blocks .* has 4"):
        Scheduler(limits(num_blocks=4)).add(sequence(20, 13))
    with pytest.raises(ConfigError, match=r"make 70, but 64 is the limit"):
        Scheduler(limits()).add(sequence(60, 10))
    with pytest.raises(ConfigError, match="no tokens"):
        Scheduler(limits()).add(sequence(0, 10))
    with pytest.raises(ConfigError, match="--max-tokens 0"):
        Scheduler(limits()).add(sequence(1, 0))


def test_one_continuation_that_never_fits_refuses_its_request() -> None:
    scheduler = Scheduler(limits())
    with pytest.raises(ConfigError):
        scheduler.add(sequence(3, 4), sequence(3, 400))
    assert not scheduler.has_work


@pytest.mark.parametrize(("num_blocks", "groups"), [(4, 1), (6, 3), (8, 4)])
def test_a_window_needs_no_more_than_it_reaches(num_blocks: int, groups: int) -> None:
    chosen = limits(num_blocks=num_blocks, num_groups=groups, window=8, max_model_len=900)
    loop = Loop(chosen)
    loop.add(plain(300, 100))
    loop.drain()
    with pytest.raises(ConfigError, match=r"needs \d+ KV blocks"):
        Loop(limits(num_blocks=4, window=15)).add(sequence(40, 20))


def test_blocks_of_sequences_that_grow_side_by_side_adjoin() -> None:
    loop = Loop(limits(num_blocks=64, max_num_batched_tokens=32))
    both = [plain(5, 40, at) for at in range(2)]
    for one in both:
        loop.add(one)
    for _ in range(30):
        loop.step()
    for one in both:
        first = one.blocks[0]
        assert one.blocks == list(range(first, first + 9))


def test_blocks_behind_every_window_are_given_back() -> None:
    loop, most = Loop(limits(window=4)), 0
    one = plain(8, 40)
    loop.add(one)
    while loop.scheduler.has_work:
        loop.step()
        most = max(most, len(one.blocks))
    assert most <= 3, "47 tokens of context must not hold 12 blocks when a window of 4 is read"


def test_released_rows_travel_with_the_next_plan_unless_taken_again() -> None:
    loop, seen = Loop(limits(max_num_seqs=2)), []
    for at, tokens in enumerate((1, 3, 1)):
        loop.add(plain(1, tokens, at))
    while loop.scheduler.has_work:
        scheduled = loop.plan()
        assert scheduled is not None
        rows = [record.row for record in scheduled.records]
        seen.append((rows, scheduled.plan.released_rows))
        loop.commit()
    # Sequence 2 takes the row that sequence 0 left: its record replaces the old one, so that
    # releasing the row with the next plan would lose it.
    assert seen == [([0, 1], ()), ([0], ()), ([], (0,))]


def test_abort_frees_blocks_and_row_at_once_even_in_flight() -> None:
    loop = Loop(limits(max_num_seqs=1))
    running, waiting = plain(3, 9), plain(3, 9, at=1)
    for one in (running, waiting):
        loop.add(one)
    loop.plan()
    assert loop.scheduler.abort(running) and not loop.scheduler.abort(running)
    loop.saw_end(running)
    scheduled = loop.plan()
    assert scheduled is not None and scheduled.sequences == (waiting,)
    assert loop.commit() == [], "a token for a sequence that ended is nobody's"
    assert loop.scheduler.finish(waiting, "stop")
    assert waiting.finish_reason == "stop" and loop.commit() == []
    loop.scheduler.check_idle()


def test_a_broken_sequence_ends_alone_and_leaves_nothing_to_be_found() -> None:
    loop = Loop(limits())
    broken, sound = plain(9, 3), plain(9, 3, at=1)
    for one in (broken, sound):
        loop.add(one)
    loop.broken = {broken.id}
    for _ in range(3):
        loop.step()
    assert (broken.finish_reason, broken.token_ids) == ("error", [])
    again = plain(9, 3)
    loop.add(again)
    loop.drain()
    assert again.finish_reason == sound.finish_reason == "length" and not again.num_cached_tokens


def test_a_failed_step_ends_its_sequences_alone() -> None:
    loop = Loop(limits(max_num_seqs=2))
    sequences = [plain(3, 5, at) for at in range(3)]
    for one in sequences:
        loop.add(one)
    loop.plan()
    scheduled, _ = loop.in_flight.popleft()
    assert loop.scheduler.fail(scheduled) == tuple(sequences[:2])
    assert [one.finish_reason for one in sequences] == ["error", "error", None]
    loop.drain()
    assert sequences[2].finish_reason == "length"


def test_steps_are_committed_in_order_with_all_their_tokens() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(plain(3, 5))
    first, second = scheduler.schedule(1), scheduler.schedule(1)
    assert first is not None and second is not None
    with pytest.raises(ValueError, match=r"step 1 is not the oldest in flight"):
        scheduler.commit(second, [1], 2)
    with pytest.raises(ValueError, match="step 0 draws 1 tokens, 0 came"):
        scheduler.commit(first, [], 2)
    assert scheduler.num_in_flight == 2
    scheduler.commit(first, [1], 2)
    scheduler.commit(second, [1], 2)
    with pytest.raises(ValueError, match=r"steps in flight: \[\]"):
        scheduler.commit(second, [1], 2)


def test_nothing_is_planned_beyond_the_last_token() -> None:
    scheduler = Scheduler(limits())
    one = plain(3, 2)
    scheduler.add(one)
    plans = [scheduler.schedule(1) for _ in range(4)]
    assert [plan is not None for plan in plans] == [True, True, False, False]
    for plan in plans[:2]:
        assert plan is not None
        scheduler.commit(plan, [5], 2)
    assert one.finish_reason == "length" and one.token_ids == [5, 5]


def test_a_sequence_is_left_out_until_its_step_while_others_are_in_flight() -> None:
    loop = Loop(limits())
    held, other = plain(3, 9), plain(3, 9, at=1)
    for index, one in enumerate((held, other)):
        one.index = index
        loop.add(one)
    loop.step()
    loop.scheduler.hold_back(held, 3)
    rows = []
    for _ in range(3):
        scheduled = loop.plan()
        assert scheduled is not None
        rows.append({one.index for one in scheduled.sequences})
    assert rows == [{0, 1}, {1}, {0, 1}], "nothing is in flight at first; then step 3 is its step"


@pytest.mark.parametrize("budget_ns", [0, 1, 5, 8, 100])
def test_a_time_budget_holds_prompts_back_but_not_for_ever(budget_ns: int) -> None:
    chosen = limits(step_budget_ns=budget_ns, max_num_batched_tokens=64, num_blocks=64)
    loop = Loop(chosen, FakeCosts(token_ns=1))
    loop.add(plain(2, 30))
    loop.step()
    loop.add(plain(50, 2, at=1))
    (decode, chunk), size = shapes(loop), chosen.block_size
    room = (budget_ns - 1) // size * size
    assert decode == (1, 1)
    assert chunk[0] == min(50, max(size, room)), "whole blocks, one of them at least"
    loop.drain()


def test_a_row_is_needed_beside_blocks() -> None:
    loop = Loop(limits(max_num_seqs=1))
    for at in range(2):
        loop.add(plain(2, 3, at))
    loop.step()
    assert (loop.scheduler.num_running, loop.scheduler.num_waiting) == (1, 1)


def test_rebuild_begins_again_with_what_was_generated() -> None:
    loop = Loop(limits())
    one, late = plain(5, 8), plain(5, 8, at=1)
    loop.add(one)
    loop.step()
    loop.step()
    loop.plan()
    loop.add(late)
    assert loop.scheduler.rebuild() == (one,)
    loop.in_flight.clear()
    loop.device = type(loop.device)(loop.scheduler.limits)
    scheduled = loop.plan()
    assert scheduled is not None
    (record, _) = scheduled.records
    assert record.token_ids == (*one.prompt_token_ids, *alone(one)[:2])
    assert (record.num_computed, record.num_prompt_tokens) == (0, 5)
    loop.drain()
    assert one.token_ids == alone(one)


def test_check_says_what_does_not_add_up() -> None:
    scheduler = Scheduler(limits())
    one = plain(5, 8)
    scheduler.add(one)
    scheduler.schedule(1)
    with pytest.raises(RuntimeError, match="1 sequences unfinished, 1 in rows, 2 of 16 blocks"):
        scheduler.check_idle()
    one.blocks.pop()
    with pytest.raises(RuntimeError, match=r"14 free \+ 0 cached \+ 2 referenced of 16"):
        scheduler.check()


def test_no_token_is_no_token_of_a_vocabulary() -> None:
    assert NO_TOKEN < 0
