"""The block pool and the host tier by themselves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpinfer.scheduling.block_pool import BlockPool
from tpinfer.scheduling.free_runs import FreeRuns
from tpinfer.scheduling.host_tier import HostTier


@given(st.lists(st.integers(1, 6), max_size=8))
def test_pool_prefers_runs(counts: list[int]) -> None:
    pool, held = BlockPool(16), list[int]()
    for count in counts:
        if count > pool.num_free:
            with pytest.raises(ValueError, match="KV blocks asked for"):
                pool.take(count)
            break
        taken = pool.take(count)
        assert taken == list(range(taken[0], taken[0] + count))
        held += taken
    assert len(set(held)) == len(held)


@given(st.data(), st.integers(1, 4), st.integers(4, 40))
def test_the_pool_never_lends_a_block_twice_and_keeps_classes(
    choices: st.DataObject, groups: int, num_blocks: int
) -> None:
    evicted: list[int] = []
    pool = BlockPool(num_blocks, groups, evicted.append)
    held: list[tuple[int, list[int]]] = []
    cached: set[int] = set()
    for _ in range(choices.draw(st.integers(1, 25))):
        action = choices.draw(st.sampled_from(["take", "take", "release", "share"]))
        if action == "take":
            first = choices.draw(st.integers(0, 9))
            count = pool.most(first, choices.draw(st.integers(1, 8)))
            taken = pool.take(count, first, None, choices.draw(st.integers(0, 12)))
            assert [b % groups for b in taken] == [(first + i) % groups for i in range(count)]
            cached -= set(evicted)
            evicted.clear()
            assert not cached & set(taken), "a cached block is given up before it is lent"
            held.append((first, taken))
        elif action == "release" and held:
            _, blocks = held.pop(choices.draw(st.integers(0, len(held) - 1)))
            keep = choices.draw(st.booleans())
            cached |= {b for b in blocks if keep and pool.references(b) == 1}
            pool.release(blocks, [b"key" if keep else None] * num_blocks)
        elif action == "share" and cached:
            block = choices.draw(st.sampled_from(sorted(cached)))
            cached.remove(block)
            pool.share(block)
            held.append((block, [block]))
        pool.recount([blocks for _, blocks in held])
        assert pool.num_cached == len(cached)


@given(st.data(), st.integers(1, 4), st.integers(1, 40))
def test_free_runs_are_what_a_set_says(
    choices: st.DataObject, groups: int, num_blocks: int
) -> None:
    runs, free = FreeRuns(num_blocks, groups), set(range(num_blocks))
    for _ in range(choices.draw(st.integers(1, 30))):
        taken = sorted(set(range(num_blocks)) - free)
        if taken and choices.draw(st.booleans()):
            block = choices.draw(st.sampled_from(taken))
            most = next(i for i in range(num_blocks) if block + i + 1 not in taken) + 1
            count = choices.draw(st.integers(1, most))
            runs.give_back(block, count)
            free.update(range(block, block + count))
        elif taken and choices.draw(st.booleans()):
            block = choices.draw(st.sampled_from(taken)) + 1
            is_first = block in free
            assert runs.take_at(block) == is_first
            free.discard(block)
        else:
            first = choices.draw(st.integers(0, 7))
            if any(b % groups == first % groups for b in free):
                [(block,)] = runs.take(1, first, None, choices.draw(st.integers(0, 9)))
                assert block in free and block % groups == first % groups
                free.remove(block)
        assert runs.num_free == [sum(b % groups == c for b in free) for c in range(groups)]


def test_growth_goes_on_behind_the_last_block() -> None:
    pool = BlockPool(64, 2)
    first = pool.take(2, 0, None, room=10)
    second = pool.take(2, 0, None, room=10)
    for place in range(2, 10):
        for held in (first, second):
            held += pool.take(1, place, held[-1], room=10 - place)
    assert first == list(range(first[0], first[0] + 10))
    assert second == list(range(second[0], second[0] + 10))


def test_evicted_neighbours_make_a_run_again() -> None:
    pool = BlockPool(128)
    blocks = pool.take(128)
    pool.release(reversed(blocks), [b"key"] * 128)
    assert (pool.num_free, pool.num_cached, pool.num_available) == (0, 128, 128)
    (block,) = pool.take(1, room=4)
    assert (pool.num_free, pool.num_cached) == (3, 124), "a 32nd of the cache at once"
    assert [pool.extend(block + i) for i in range(4)] == [True, True, True, False]


def test_a_host_block_stays_as_it_is_until_the_plan_is_issued() -> None:
    host = HostTier(1, 1)
    saved = host.keep(b"a", block=3)
    assert saved == 0 and host.find(b"a", 3) is None, "it is only being saved"
    assert host.keep(b"b", block=4) is None and host.hold([5]) is None
    host.settle()
    assert host.find(b"a", 3) == 0 and host.keep(b"a", block=3) is None
    assert host.fetch(b"a", 3) == 0 and host.hold([5]) is None, "it is only being fetched"
    host.settle()
    held = host.hold([5])
    assert (
        held is not None
        and held == [0]
        and host.find(b"a", 3) is None
        and not host.is_settled(held)
    )
    host.release(held)
    assert host.hold([5]) is None and host.num_free == 1
    host.settle()
    assert host.hold([5]) == [0]


def test_host_blocks_keep_to_their_class() -> None:
    host = HostTier(6, 3)
    assert host.hold([1, 4]) == [1, 4] and host.hold([7]) is None and host.hold([2, 3]) == [2, 0]
    assert (host.num_free, host.num_held, host.num_cached) == (2, 4, 0)


def test_prefixes_in_host_memory_go_least_recently_used_first() -> None:
    host = HostTier(2, 1)
    for key in (b"a", b"b"):
        host.keep(key, 0)
        host.settle()
    host.fetch(b"a", 0)
    host.settle()
    host.keep(b"c", 0)
    host.settle()
    assert [host.find(key, 0) is None for key in (b"a", b"b", b"c")] == [False, True, False]
    host.forget(b"a", 0)
    assert host.find(b"a", 0) is None and host.num_free == 1
