"""Where ranks run: whole memory nodes, never one core; what the user or a launcher said counts."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpinfer.config.environment import read_environment
from tpinfer.costs.binding import (
    Binding,
    CoreLayout,
    ThreadWishes,
    choose_binding,
    core_ranges,
)
from tpinfer.launching.binding import bind_thread, thread_wishes
from tpinfer.launching.seat import Seat, Starter

ONE = CoreLayout((tuple(range(2)),))
TWO = CoreLayout((tuple(range(8)), tuple(range(8, 16))))
PAIRED = CoreLayout(((0, 1, 4, 5), (2, 3, 6, 7)), siblings=((0, 4), (1, 5), (2, 6), (3, 7)))
FOUR = CoreLayout(tuple(tuple(range(4 * i, 4 * i + 4)) for i in range(4)))


def all_ranks(layout: CoreLayout, world: int) -> list[Binding]:
    return [choose_binding(layout, rank, world) for rank in range(world)]


def test_two_ranks_on_two_nodes_get_one_each() -> None:
    first, second = all_ranks(TWO, 2)
    assert (first.cores, second.cores) == TWO.nodes
    assert first.num_threads == second.num_threads == 8
    assert first.place_reason.startswith("2 ranks on 2 nodes: node 0 cores 0-7")
    assert second.place == "cores 8-15" and "first touches" in second.place_reason


def test_four_ranks_on_two_nodes_share_them_and_two_on_four_take_two() -> None:
    shared = all_ranks(TWO, 4)
    assert [one.cores for one in shared] == [TWO.nodes[0]] * 2 + [TWO.nodes[1]] * 2
    assert {one.num_threads for one in shared} == {4}
    assert [one.cores for one in all_ranks(FOUR, 2)] == [tuple(range(8)), tuple(range(8, 16))]
    assert all_ranks(FOUR, 2)[1].place_reason.startswith("2 ranks on 4 nodes: nodes 2-3")


def test_a_host_with_one_node_is_left_to_the_kernel() -> None:
    for one in all_ranks(ONE, 2):
        assert one.cores is None and one.place == "as it is" and one.num_threads == 1
        assert "whichever is idle" in one.place_reason
    three = all_ranks(TWO, 3)
    assert all(one.cores is None and "3 ranks do not divide" in one.place_reason for one in three)
    assert three[0].num_threads == 5
    assert choose_binding(TWO, 0, 1).num_threads == 16


def test_hardware_threads_of_one_core_count_once() -> None:
    first, second = all_ranks(PAIRED, 2)
    assert first.cores == (0, 1, 4, 5) and second.num_threads == 2
    assert "4 hardware threads are not counted twice" in first.threads_reason
    assert choose_binding(PAIRED, 0, 1).num_threads == 4


def test_a_quota_is_not_a_place() -> None:
    granted = CoreLayout(TWO.nodes, num_granted=4)
    found = choose_binding(granted, 1, 2)
    assert (found.cores, found.num_threads) == (None, 2)
    assert "4 cores' worth" in found.threads_reason and "grants 4 of 16" in found.place_reason


@pytest.mark.parametrize(
    ("wishes", "cores", "threads", "why"),
    [
        (ThreadWishes(num_threads=3), TWO.nodes[1], 3, "node 1"),
        (ThreadWishes(affinity_variable="OMP_PLACES"), None, 8, "OMP_PLACES is set"),
        (ThreadWishes(bound_by="mpirun"), None, 8, "mpirun has bound it already"),
    ],
)
def test_what_others_said_counts(
    wishes: ThreadWishes, cores: tuple[int, ...] | None, threads: int, why: str
) -> None:
    found = choose_binding(TWO, 1, 2, wishes)
    assert (found.cores, found.num_threads) == (cores, threads)
    assert why in found.place_reason


def seat(launcher: Starter, world: int = 2) -> Seat:
    return Seat(0, world, 0, world, "cpu", "run", 0, launcher)


@pytest.mark.parametrize(
    ("launcher", "world", "said", "wish"),
    [
        ("tpinfer", 2, "4", None),  # what our launcher writes for 8 cores
        ("tpinfer", 2, "3", 3),
        ("torchrun", 2, "1", None),
        ("torchrun", 2, "2", 2),
        ("single", 1, "1", 1),
        ("single", 1, None, None),
    ],
)
def test_whose_omp_num_threads_it_is(
    launcher: Starter, world: int, said: str | None, wish: int | None
) -> None:
    variables = {} if said is None else {"OMP_NUM_THREADS": said}
    found = thread_wishes(read_environment(variables), seat(launcher, world), 8)
    assert found.num_threads == wish


@pytest.mark.parametrize(
    ("launcher", "usable", "parent", "world", "sharing", "threads"),
    [
        ("mpirun", 8, 16, 2, 1, 8),  # each rank has a socket of its own
        ("mpirun", 8, 16, 4, 2, 4),
        ("slurm", 1, 16, 2, 1, 1),
        ("mpirun", 8, 8, 2, None, 4),  # everything was given the same eight
        ("mpirun", 8, 0, 2, None, 4),
        ("torchrun", 8, 16, 2, None, 4),
    ],
)
def test_cores_that_a_launcher_gave_to_one_rank_are_not_divided_again(
    launcher: Starter,
    usable: int,
    parent: int,
    world: int,
    sharing: int | None,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    wishes = thread_wishes(read_environment({}), seat(launcher, world), usable, parent)
    assert wishes.num_sharing == sharing
    assert (wishes.bound_by == launcher) == (launcher != "torchrun")
    layout = CoreLayout((tuple(range(usable)),))
    assert choose_binding(layout, 0, world, wishes).num_threads == threads


def test_openmp_variables_are_seen() -> None:
    variables = {"GOMP_CPU_AFFINITY": "0-3", "OMP_PLACES": ""}
    found = thread_wishes(read_environment(variables), seat("tpinfer"), 8)
    assert found.affinity_variable == "GOMP_CPU_AFFINITY"


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 16))
def test_every_rank_gets_cores_that_exist_and_no_core_is_promised_twice(
    num_nodes: int, per_node: int, world: int
) -> None:
    nodes = tuple(tuple(range(i * per_node, (i + 1) * per_node)) for i in range(num_nodes))
    found = all_ranks(CoreLayout(nodes), world)
    everything = {core for node in nodes for core in node}
    assert all(one.num_threads >= 1 for one in found)
    if world <= num_nodes * per_node:
        assert sum(one.num_threads for one in found) <= len(everything)
    if found[0].cores is not None:
        assert {core for one in found for core in one.cores or ()} == everything
        assert len({len(one.cores or ()) for one in found}) == 1


def test_binding_a_thread_can_be_taken_back() -> None:
    before = os.sched_getaffinity(0)
    back = bind_thread(sorted(before)[:1])
    try:
        assert os.sched_getaffinity(0) == set(sorted(before)[:1])
    finally:
        back()
    assert os.sched_getaffinity(0) == before
    bind_thread([max(before) + 1000])()
    bind_thread(None)()
    assert os.sched_getaffinity(0) == before


def test_ranges_are_short() -> None:
    assert core_ranges((0, 1, 2, 3, 8, 10, 11)) == "0-3,8,10-11"
