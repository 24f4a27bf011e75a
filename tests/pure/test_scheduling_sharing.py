"""What is computed once: prefixes, and the prompt of n continuations."""

import pytest

from tests.pure.model_device import Loop, alone, limits, sequence
from tpinfer.scheduling.prefix_cache import block_key, chain_keys, root_key
from tpinfer.scheduling.request import Sequence
from tpinfer.scheduling.scheduler import Scheduler
from tpinfer.steps.plan import SamplingRecord

PREFIX = tuple(range(1000, 1512))


def family(n: int, prompt: tuple[int, ...], max_tokens: int = 6) -> list[Sequence]:
    """The n continuations of a request that nothing stops."""
    members = [sequence(prompt, max_tokens, sampling=SamplingRecord(index=i)) for i in range(n)]
    for one in members:
        one.stop_token_ids = frozenset()
    return members


@pytest.mark.parametrize("budget", [64, 2048])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_prefix_of_many_requests_is_computed_once(budget: int, depth: int) -> None:
    """All come at once: those behind the first wait for what it is just computing."""
    chosen = limits(
        block_size=16,
        num_blocks=400,
        max_num_seqs=32,
        max_num_batched_tokens=budget,
        max_model_len=1024,
    )
    loop = Loop(chosen)
    requests = [sequence((*PREFIX, 5000 + i, 6000 + i, 7000 + i), 4, i) for i in range(32)]
    for one in requests:
        one.stop_token_ids = frozenset()
        loop.add(one)
    loop.drain(depth)
    stats = loop.scheduler.stats()
    assert stats.num_hit_tokens == 31 * 512
    assert [one.num_cached_tokens for one in requests] == [0] + [512] * 31
    assert loop.device.num_query_tokens == 512 + 32 * (3 + 3)


def test_others_are_let_in_while_one_waits_for_a_prefix() -> None:
    loop = Loop(limits(num_blocks=64, max_num_batched_tokens=32))
    same = [sequence(PREFIX[:20], 2, at) for at in range(2)]
    other = sequence(3, 2, 5)
    for one in (*same, other):
        loop.add(one)
    scheduled = loop.plan()
    assert scheduled is not None and scheduled.admitted == (same[0], other)
    loop.commit()
    scheduled = loop.plan()
    assert scheduled is not None and scheduled.admitted == (same[1],)
    loop.commit()
    loop.drain()
    assert same[1].num_cached_tokens == 16


def test_who_waits_for_a_prefix_computes_it_when_the_other_gives_up() -> None:
    loop = Loop(limits(num_blocks=64))
    first, second = (sequence(PREFIX[:20], 2, at) for at in range(2))
    loop.add(first)
    loop.add(second)
    loop.step()
    loop.plan()
    assert first.num_planned == 16 and second.row < 0
    loop.scheduler.abort(first)
    loop.plan()
    assert second.num_cached_tokens == 8, "the first two blocks were committed"
    loop.commit()
    loop.commit()
    loop.drain()


def test_generated_tokens_are_found_too_and_the_last_token_is_always_computed() -> None:
    loop = Loop(limits(num_blocks=64, max_num_batched_tokens=64))
    (first,) = family(1, PREFIX[:6], 10)
    loop.add(first)
    loop.drain()
    everything = (*first.prompt_token_ids, *first.token_ids)
    again, whole = sequence(everything[:12], 2), sequence(everything[:13], 2)
    for one in (again, whole):
        loop.add(one)
        loop.drain()
    # 15 tokens were fed; of 12 tokens the third block is left, as one token must run.
    assert (again.num_cached_tokens, whole.num_cached_tokens) == (8, 12)


@pytest.mark.parametrize(("salt", "adapter"), [("b", ""), ("", "b")])
def test_salt_and_adapter_keep_prefixes_apart(salt: str, adapter: str) -> None:
    loop = Loop(limits(num_blocks=64, max_num_batched_tokens=64))
    other = sequence(20, 2, cache_salt=salt, adapter=adapter)
    for one in (sequence(20, 2), other, sequence(20, 2)):
        loop.add(one)
        loop.drain()
    assert loop.scheduler.stats().num_hit_tokens == 16


def test_keys_tell_salt_from_adapter_and_every_token_from_every_other() -> None:
    roots = [root_key(*pair) for pair in [("", ""), ("a", ""), ("", "a"), ("ab", "c"), ("a", "bc")]]
    assert len(set(roots)) == 5
    keys = list(chain_keys(roots[0], tuple(range(10)), 4))
    assert len(keys) == 2 and keys[1] == block_key(keys[0], (4, 5, 6, 7))
    assert len({block_key(keys[0], tokens) for tokens in [(1, 2), (2, 1), (1, 1 << 40)]}) == 3


def test_no_prefix_is_shared_when_that_is_switched_off_or_every_token_is_needed() -> None:
    for chosen, whole in ((limits(prefix_caching=False), False), (limits(), True)):
        loop = Loop(chosen)
        for _ in range(2):
            loop.add(sequence(12, 2, needs_whole_prompt=whole))
        loop.drain()
        assert loop.scheduler.stats().num_hit_tokens == 0
        assert loop.device.num_query_tokens >= 24


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("length", "num_copies"), [(10, 3), (9, 0), (12, 3), (1, 0), (4, 3)])
def test_continuations_share_one_computed_prompt(
    length: int, num_copies: int, caching: bool
) -> None:
    chosen = limits(num_blocks=64, max_num_batched_tokens=64, prefix_caching=caching)
    loop, members = Loop(chosen), family(4, PREFIX[:length])
    loop.add(*members)
    first = loop.plan()
    assert first is not None and first.sequences == (members[0],)
    loop.commit()
    second = loop.plan()
    assert second is not None
    assert len(second.plan.copies) == num_copies and second.plan.num_tokens == (1, 1, 1, 1)
    assert [record.num_computed for record in second.records] == [length - 1] * 3
    assert members[1].blocks[: (length - 1) // 4] == members[0].blocks[: (length - 1) // 4]
    loop.commit()
    loop.drain()
    assert loop.device.num_query_tokens == length + 3 + sum(len(m.token_ids) - 1 for m in members)
    assert [one.token_ids for one in members] == [alone(one) for one in members]
    assert len({tuple(one.token_ids) for one in members}) > 1
    assert loop.scheduler.stats().num_forked == 3


@pytest.mark.parametrize("caching", [True, False])
def test_continuations_go_on_without_the_first(caching: bool) -> None:
    for when in range(4):
        loop = Loop(limits(num_blocks=64, prefix_caching=caching))
        members = family(3, PREFIX[:20])
        loop.add(*members)
        for _ in range(when):
            loop.step()
        loop.scheduler.abort(members[0])
        loop.drain()
        assert [len(one.token_ids) for one in members[1:]] == [6, 6]


def test_a_first_continuation_that_ends_at_once_leaves_the_others_their_prompt() -> None:
    loop = Loop(limits(num_blocks=64, prefix_caching=False))
    members = family(3, PREFIX[:6], max_tokens=1)
    loop.add(*members)
    loop.drain()
    assert [one.token_ids for one in members] == [alone(one) for one in members]


def test_a_windowed_prefix_is_taken_over_without_what_the_window_has_passed() -> None:
    loop = Loop(limits(num_blocks=64, max_num_batched_tokens=64, window=5))
    (first,) = family(1, PREFIX[:30])
    loop.add(first)
    loop.drain()
    again = sequence(PREFIX[:30], 2)
    loop.add(again)
    scheduled = loop.plan()
    assert scheduled is not None and again.num_cached_tokens == 28
    # A query at 28 sees 24 and later: six blocks are not in the table.
    assert scheduled.plan.dropped_blocks == ((again.row, 6),)
    assert [len(blocks) - 1 for blocks in scheduled.plan.new_blocks] == [2]
    loop.commit()
    loop.drain()


def test_least_recently_used_prefixes_go_first_and_ends_before_beginnings() -> None:
    loop = Loop(limits(num_blocks=8, max_num_batched_tokens=64))
    for start in (0, 100):  # 3 full blocks each
        loop.add(sequence(PREFIX[start : start + 12], 1))
        loop.drain()
    loop.add(sequence(PREFIX[0:13], 1))  # used again
    loop.drain()
    loop.add(sequence(PREFIX[200:212], 1))
    loop.drain()
    found = []
    for start in (0, 100):
        one = sequence(PREFIX[start : start + 13], 1)
        loop.add(one)
        loop.drain()
        found.append(one.num_cached_tokens)
    assert found[0] == 12 and found[1] < 12


def test_stats_are_a_copy() -> None:
    scheduler = Scheduler(limits())
    before = scheduler.stats()
    scheduler.add(sequence(3))
    scheduler.schedule(1)
    assert (before.num_steps, scheduler.stats().num_steps) == (0, 1)
