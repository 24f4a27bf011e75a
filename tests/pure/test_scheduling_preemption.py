"""Out of blocks: who gives way, how, and what host memory keeps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pure.model_device import FakeCosts, Loop, alone, limits, sequence
from tpinfer.scheduling.request import Sequence

TO_HOST, RECOMPUTE = FakeCosts(token_ns=10, block_ns=0), FakeCosts(token_ns=1, block_ns=1000)


def crowd(loop: Loop, count: int, prompt: int = 7, max_tokens: int = 20) -> list[Sequence]:
    """Requests that share nothing and end by their length."""
    found = []
    for index in range(count):
        tokens = tuple(range(1000 * index, 1000 * index + prompt))
        one = sequence(tokens, max_tokens, index)
        one.stop_token_ids, one.index = frozenset(), index
        found.append(one)
        loop.add(one)
    return found


def test_the_last_to_come_gives_way_and_keeps_its_place() -> None:
    loop = Loop(limits(num_blocks=12, max_num_batched_tokens=32, max_num_seqs=3))
    first, second, third, fourth = crowd(loop, 4)
    while not third.num_preemptions:
        loop.step()
        assert not (first.num_preemptions or second.num_preemptions)
    assert third.row < 0 and fourth.admitted_ns == 0, "who came later is not let past it"
    loop.drain()
    assert loop.scheduler.stats().num_recomputed > 0
    assert all(one.token_ids == alone(one) for one in (first, second, third, fourth))


def test_priority_decides_before_arrival() -> None:
    loop = Loop(limits(num_blocks=12, max_num_batched_tokens=32))
    late = [sequence(tuple(range(1000 * i, 1000 * i + 7)), 20, i, priority=-i) for i in range(3)]
    for one in late:
        one.stop_token_ids = frozenset()
        loop.add(one)
    while not any(one.num_preemptions for one in late):
        loop.step()
    assert [one.num_preemptions for one in late] == [1, 0, 0]
    loop.drain()


@pytest.mark.parametrize("caching", [True, False])
def test_blocks_move_to_host_memory_and_back_where_that_is_cheaper(caching: bool) -> None:
    chosen = limits(
        num_blocks=12, max_num_batched_tokens=32, num_host_blocks=12, prefix_caching=caching
    )
    for costs, is_moved in ((TO_HOST, True), (RECOMPUTE, False)):
        loop = Loop(chosen, costs)
        requests = crowd(loop, 3)
        loop.drain()
        stats = loop.scheduler.stats()
        assert (stats.num_moved_out > 0) == is_moved == (stats.num_recomputed == 0)
        assert all(one.token_ids == alone(one) for one in requests)
        if is_moved:
            fed = sum(len(one.prompt_token_ids) + len(one.token_ids) - 1 for one in requests)
            assert loop.device.num_query_tokens == fed, "nothing is computed twice"


def test_without_room_in_host_memory_tokens_are_computed_again() -> None:
    loop = Loop(limits(num_blocks=12, max_num_batched_tokens=32, num_host_blocks=1), TO_HOST)
    crowd(loop, 3)
    loop.drain()
    assert loop.scheduler.stats().num_moved_out == 0 < loop.scheduler.stats().num_recomputed


def test_a_sequence_that_is_moved_out_can_be_aborted() -> None:
    loop = Loop(limits(num_blocks=12, max_num_batched_tokens=32, num_host_blocks=12), TO_HOST)
    *_, last = crowd(loop, 3)
    while not last.num_preemptions:
        loop.step()
    assert last.host_blocks
    loop.scheduler.abort(last)
    loop.saw_end(last)
    loop.drain()


def test_preempted_in_flight_counts_what_is_drawn_and_comes_back_after_it() -> None:
    loop = Loop(limits(num_blocks=12, max_num_batched_tokens=32))
    first, second, third = crowd(loop, 3)
    while not third.num_preemptions:
        loop.plan()
        if len(loop.in_flight) == 3 and not third.num_preemptions:
            loop.commit()
    assert third.num_drawing > 0 and not third.blocks
    before = len(third.token_ids)
    while third.num_drawing:
        assert third.row < 0
        loop.commit()
    assert len(third.token_ids) > before
    loop.drain(3)
    assert all(one.token_ids == alone(one) for one in (first, second, third))


def test_evicted_prefixes_come_back_from_host_memory() -> None:
    chosen = limits(num_blocks=8, num_host_blocks=32, max_num_batched_tokens=64)
    loop = Loop(chosen)
    prompts = [tuple(range(1000 * i, 1000 * i + 21)) for i in range(4)]
    for prompt in prompts:
        loop.add(sequence(prompt, 2))
        loop.drain()
    again = sequence(prompts[0], 2)
    loop.add(again)
    scheduled = loop.plan()
    assert scheduled is not None and again.num_cached_tokens == 20
    assert len(scheduled.plan.from_host) == 5 and scheduled.plan.num_tokens == (1,)
    loop.commit()
    loop.drain()
    stats = loop.scheduler.stats()
    assert stats.num_blocks_fetched == 5 and stats.num_blocks_saved >= 10


def test_admission_leaves_room_to_those_who_run() -> None:
    """Without it, who was just let in would be preempted again before its prompt is done."""
    loop = Loop(limits(num_blocks=16, max_num_batched_tokens=32, max_num_seqs=8))
    crowd(loop, 8, prompt=9, max_tokens=24)
    loop.drain()
    stats = loop.scheduler.stats()
    assert 0 < stats.num_recomputed <= 8


@settings(deadline=None, max_examples=100)
@given(
    st.integers(2, 8),
    st.integers(1, 12),
    st.integers(1, 24),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([None, TO_HOST, RECOMPUTE]),
)
def test_however_small_the_cache_everybody_ends(
    count: int, prompt: int, max_tokens: int, groups: int, depth: int, costs: FakeCosts | None
) -> None:
    needed = -(-(prompt + max_tokens - 1) // 4)
    chosen = limits(
        num_blocks=max(needed, groups),
        num_groups=groups,
        num_host_blocks=20,
        max_num_seqs=8,
        max_num_batched_tokens=16,
    )
    loop = Loop(chosen, costs)
    requests = crowd(loop, count, prompt, max_tokens)
    loop.drain(depth)
    assert all(one.token_ids == alone(one) for one in requests)
