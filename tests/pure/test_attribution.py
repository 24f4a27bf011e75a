"""Attribution of made-up recordings: it adds up to the nanosecond, and the right leaf moves when a
cause moves."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.recorded_runs import (
    CEILINGS,
    DECODE,
    PREFILL,
    SPEC,
    attributor,
    delayed,
    even_step,
    leaf_sums,
    ledgers,
    record,
    runs,
    waiting,
)
from tpinfer.config.dtypes import DType
from tpinfer.costs.bound import classify
from tpinfer.costs.leaves import LEAVES, ROLLUP
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.step_record import HostSpan, Measurements, StepRecord
from tpinfer.engine.attribution import Attribution, Attributor, RankSplit
from tpinfer.engine.timeline import StepClassifier, match_collectives, op_starts
from tpinfer.sharding.partition import partition_model

moments = st.integers(0, 4000)


def collectives(tp: int = 2) -> list[int]:
    """Places of the collectives in the program."""
    ledger = ledgers(tp)[0]
    return [i for i, op in enumerate(ledger.op_ids()) if ledger.kind(op).is_collective]


@given(runs(), moments, moments, moments)
def test_leaves_sum_to_the_wall(
    measured: list[Measurements], one: int, other: int, queued_until: int
) -> None:
    start, end = sorted((one, other))
    found = attributor(measured).attribute(start, end, queued_until)
    assert [split.rank for split in found.ranks] == list(range(len(measured)))
    assert found.wall_ns == end - start
    for split in found.ranks:
        assert split.wall_ns == end - start
        assert sum(split.leaves.values()) == end - start
        assert sum(split.rollup.values()) == end - start
        assert sum(split.host_parts.values()) == split.leaves.get("host", 0)
        assert min(split.leaves.values(), default=1) > 0, "a leaf without time is left out"
        assert split.leaves.get("queue", 0) == max(0, min(end, queued_until) - start)


@given(runs(), moments, moments, moments)
def test_two_halves_of_a_window_add_up(
    measured: list[Measurements], one: int, other: int, cut: int
) -> None:
    start, middle, end = sorted((one, other, cut))
    whose = attributor(measured)
    halves = whose.attribute(start, middle) + whose.attribute(middle, end)
    assert halves == whose.attribute(start, end)


def painted(measured: list[Measurements], rank: int) -> dict[int, str]:
    """The leaf of every nanosecond of a rank that something covers, one by one. A step's ops keep
    their time whatever the host did meanwhile; else what began earlier keeps it."""
    ledger, mine = ledgers(len(measured))[rank], measured[rank]
    everywhere = set.intersection(*({r.step_id for r in one.records} for one in measured))
    spans = [(span.start_ns, span.end_ns, "host") for span in mine.spans]
    pieces: list[tuple[int, int, str]] = []
    for step in mine.records:
        level = CEILINGS.memory_level(ledger.step_working_set_bytes(step.aggregates))
        steps = [r for one in measured for r in one.records if r.step_id == step.step_id]
        last_end = step.ops_start_ns
        for i, op in enumerate(ledger.op_ids()):
            kind, cost = ledger.kind(op), ledger.cost(op, step.aggregates)
            leaf = classify(kind, cost, DType.FLOAT32, level, CEILINGS).leaf
            start, end = int(op_starts(step)[i]), step.op_ends_ns[i]
            pieces.append((last_end, start, "host"))
            if kind.is_collective and len(measured) > 1 and step.step_id in everywhere:
                arrival = max(int(op_starts(other)[i]) for other in steps)
                arrived = min(max(arrival, start), end)
                pieces += [(start, arrived, "comm_wait"), (arrived, end, leaf)]
            else:
                pieces.append((start, end, "comm_unsplit" if kind.is_collective else leaf))
            last_end = end
        pieces.append((last_end, step.end_ns, "host"))
    leaves: dict[int, str] = {}
    by_start = sorted(pieces, key=lambda piece: piece[0])
    for start, end, leaf in by_start + spans:
        for moment in range(start, end):
            leaves.setdefault(moment, leaf)
    return leaves


@given(runs(max_ns=12), st.integers(0, 300), st.integers(0, 300))
def test_every_nanosecond_has_the_leaf_it_should(
    measured: list[Measurements], one: int, other: int
) -> None:
    start, end = sorted((one, other))
    found = attributor(measured).attribute(start, end)
    for split, mine in zip(found.ranks, measured, strict=True):
        leaves = painted(measured, split.rank)
        expected: dict[str, int] = {leaf: 0 for leaf in LEAVES}
        for moment in range(start, end):
            absent = "unrecorded" if moment < mine.recorded_from_ns else "idle_unexplained"
            expected[leaves.get(moment, absent)] += 1
        assert split.leaves == {leaf: spent for leaf, spent in expected.items() if spent}


def two_ranks(delay_ns: int, late: int = 1, at: str = "layers.0.attn.qkv") -> Attribution:
    """One step of two ranks in lock-step, where rank `late` spends `delay_ns` more in one op."""
    step = even_step(2, 0, 1000)
    slow = delayed(step, ledgers(2)[0].op_ids().index(at), delay_ns)
    quick = waiting(step, slow, collectives())
    ranks = [quick, slow] if late else [slow, quick]
    measured = [Measurements(rank, [one], []) for rank, one in enumerate(ranks)]
    return attributor(measured).attribute(1000, slow.end_ns)


@pytest.mark.parametrize("delay_ns", [0, 20_000, 50_000, 250_000, 1_000_000])
@pytest.mark.parametrize("late", [0, 1])
def test_a_late_rank_is_waited_for_and_named(delay_ns: int, late: int) -> None:
    found = two_ranks(delay_ns, late)
    waits = [split.leaves.get("comm_wait", 0) for split in found.ranks]
    assert waits[late] == 0 and waits[1 - late] == delay_ns
    caused = [split.caused_wait_ns for split in found.ranks]
    assert caused[late] == delay_ns and caused[1 - late] == 0
    undisturbed = two_ranks(0).ranks[0].leaves["comm_transfer"]
    assert [split.leaves["comm_transfer"] for split in found.ranks] == [undisturbed] * 2


def test_the_late_ranks_own_time_stays_what_it_was_spent_on() -> None:
    plain, found = two_ranks(0).ranks[1], two_ranks(70_000).ranks[1]
    moved = {
        leaf: found.leaves.get(leaf, 0) - plain.leaves.get(leaf, 0)
        for leaf in LEAVES
        if found.leaves.get(leaf) != plain.leaves.get(leaf)
    }
    assert list(moved.values()) == [70_000]
    assert next(iter(moved)) in ("compute", "memory", "latency")


def test_a_longer_transfer_is_nobodys_fault() -> None:
    """Both ranks arrive together and the wire is slow: no waiting, nobody named."""
    place = collectives()[1]
    steps = [delayed(even_step(2, 0, 0), place, 90_000) for _ in range(2)]
    measured = [Measurements(rank, [one], []) for rank, one in enumerate(steps)]
    found = attributor(measured).attribute(0, steps[0].end_ns)
    for split in found.ranks:
        assert "comm_wait" not in split.leaves and split.caused_wait_ns == 0
        assert split.leaves["comm_transfer"] == 90_000 + 1000 * len(collectives())


def test_three_ranks_wait_for_the_last() -> None:
    first = collectives(3)[0]
    steps = [delayed(even_step(3, 0, 0), 0, delay) for delay in (500, 9000, 2000)]
    steps = [waiting(step, steps[1], collectives(3)) for step in steps]
    measured = [Measurements(rank, [one], []) for rank, one in enumerate(steps)]
    found = attributor(measured).attribute(0, steps[1].end_ns)
    assert [split.leaves.get("comm_wait", 0) for split in found.ranks] == [8500, 0, 7000]
    assert [split.caused_wait_ns for split in found.ranks] == [0, 15_500, 0]
    until_first = attributor(measured).attribute(0, steps[1].op_ends_ns[first - 1])
    assert sum(split.caused_wait_ns for split in until_first.ranks) == 0, "not yet arrived"


@pytest.mark.parametrize("missing", [0, 1])
def test_a_step_that_one_rank_lost_stays_unsplit(missing: int) -> None:
    steps = [even_step(2, 0, 0), even_step(2, 1, 50_000)]
    measured = [Measurements(0, list(steps), []), Measurements(1, list(steps), [])]
    del measured[missing].records[1]
    found = attributor(measured).attribute(50_000, steps[1].end_ns)
    split = found.ranks[1 - missing]
    assert split.leaves["comm_unsplit"] == 1000 * len(collectives())
    assert leaf_sums(split.leaves, "comm_wait", "comm_transfer") == 0
    assert found.warnings == (
        "1 step is not on every rank's record: waiting and transfer are told apart there only "
        "where a rank stamped its own waits",
    )
    whole = attributor(measured).attribute(0, steps[0].end_ns)
    assert "comm_unsplit" not in whole.ranks[0].leaves, "the other step is split as ever"


def test_a_ranks_own_stamps_split_what_the_others_lost() -> None:
    places = collectives()
    stamped = replace(even_step(2, 0, 0), waits_ns={place: 400 for place in places})
    measured = [Measurements(0, [stamped], []), Measurements(1, [], [])]
    split = attributor(measured).attribute(0, stamped.end_ns).ranks[0]
    assert split.leaves["comm_wait"] == 400 * len(places)
    assert split.leaves["comm_transfer"] == 600 * len(places)


def test_steps_of_different_programs_stay_unsplit() -> None:
    step = even_step(2, 0, 0)
    shorter = record(0, 0, [1000] * (len(step.op_ends_ns) - 1))
    num_met = np.array([2 * (i in collectives()) for i in range(len(step.op_ends_ns))])
    assert match_collectives([step, shorter], num_met) is None
    assert match_collectives([step, step], num_met) is not None


def in_lock_step(group: Sequence[CostLedger], delays_ns: Mapping[tuple[int, str], int]):
    """One step of all ranks: every op takes 1000 ns and what `delays_ns` adds for (rank, op); a
    collective's begin when the last rank that meets in it has come."""
    now = [0] * len(group)
    ends: list[list[int]] = [[] for _ in group]
    for op in group[0].op_ids():
        size = len(group[0].ranks_met(op))
        for rank in range(len(group)):
            now[rank] += delays_ns.get((rank, op), 0)
        if size:
            firsts = range(0, len(group), size)
            now = [max(now[first : first + size]) for first in firsts for _ in range(size)]
        for rank in range(len(group)):
            now[rank] += 1000
            ends[rank].append(now[rank])
    return [
        Measurements(rank, [StepRecord(0, "decode", DECODE, 0, mine[-1], 0, mine)], [])
        for rank, mine in enumerate(ends)
    ]


def test_ranks_that_share_a_kv_head_wait_for_each_other_alone() -> None:
    cut = partition_model(SPEC, 4, None, "auto")
    assert cut.kv_group_size == 2
    group = [CostLedger(SPEC, cut, r, DType.FLOAT32, DType.FLOAT32) for r in range(4)]
    assert {len(group[0].ranks_met(op)) for op in group[0].op_ids()} == {0, 2, 4}

    def leaves(delay_ns: int) -> list[Mapping[str, int]]:
        measured = in_lock_step(group, {(3, "layers.0.attn.qkv"): delay_ns})
        judged = Attributor(measured, group, [CEILINGS] * 4)
        end_ns = measured[0].records[0].end_ns
        return [split.leaves for split in judged.attribute(0, end_ns).ranks]

    even, late = leaves(0), leaves(500)
    assert [mine.get("comm_wait", 0) for mine in even] == [0, 0, 0, 0]
    # Rank 2 waits in the gather of queries; 0 and 1 not before all ranks meet, behind attention.
    assert [mine.get("comm_wait", 0) for mine in late] == [500, 500, 500, 0]
    assert [m["comm_transfer"] for m in late] == [m["comm_transfer"] for m in even]


def test_one_rank_has_no_collectives_and_no_warning() -> None:
    step = even_step(1, 0, 0)
    found = attributor([Measurements(0, [step], [])]).attribute(0, step.end_ns)
    assert not any(leaf.startswith("comm") for leaf in found.ranks[0].leaves)
    assert found.warnings == ()


def test_what_was_dropped_is_unrecorded_and_not_idle() -> None:
    step = even_step(1, 7, 10_000)
    measured = [Measurements(0, [step], [], recorded_from_ns=10_000)]
    whose = attributor(measured)
    found = whose.attribute(0, step.end_ns + 500).ranks[0].leaves
    assert (found["unrecorded"], found["idle_unexplained"]) == (10_000, 500)
    assert whose.attribute(0, 4000).ranks[0].rollup["host"] == 4000
    complete = attributor([replace(measured[0], recorded_from_ns=0)]).attribute(0, 10_000)
    assert complete.ranks[0].leaves == {"idle_unexplained": 10_000}


def test_host_spans_name_what_the_host_did() -> None:
    step = record(0, 1000, [100] * len(ledgers(1)[0].op_ids()), before_ns=300, after_ns=50)
    spans = [HostSpan("schedule", 200, 1000), HostSpan("prepare", 1000, 1300)]
    spans.append(HostSpan("detokenize", step.end_ns, step.end_ns + 40))
    found = attributor([Measurements(0, [step], spans)]).attribute(0, step.end_ns + 40)
    assert found.ranks[0].host_parts == {
        "schedule": 800, "prepare": 300, "detokenize": 40, "python": 50,
    }  # fmt: skip
    assert found.ranks[0].leaves["idle_unexplained"] == 200


@pytest.mark.parametrize(
    ("changes", "grows", "shrinks"),
    [
        ({"flops_per_s": {DType.FLOAT32: 1e9}}, "compute", "memory"),
        ({"flops_per_s": {DType.FLOAT32: 1e13}}, "memory", "compute"),
        ({"kernel_floor_s": 1e-3}, "small_kernels", "compute"),
        ({"kernel_floor_s": 1e-12}, "memory", "small_kernels"),
    ],
)
def test_a_ceiling_moves_the_split_and_nothing_else(
    changes: dict[str, object], grows: str, shrinks: str
) -> None:
    """The times are measured; only what they are blamed on follows the ceilings."""
    step = record(0, 0, [1000] * len(ledgers(1)[0].op_ids()), PREFILL)
    measured = [Measurements(0, [step], [])]
    changed = replace(CEILINGS, **changes)  # pyright: ignore[reportArgumentType]
    before, after = (
        attributor(measured, ceilings).attribute(0, step.end_ns).ranks[0].rollup
        for ceilings in (CEILINGS, changed)
    )
    assert after[grows] > before[grows] and after[shrinks] < before[shrinks]
    assert sum(after.values()) == sum(before.values()) == step.end_ns
    assert (after["host"], after["communication"]) == (before["host"], before["communication"])


@given(runs())
def test_floor_and_lost_add_up_to_kernel_time(measured: list[Measurements]) -> None:
    whose = attributor(measured)
    for rank, mine in enumerate(measured):
        rows = whose.floors(rank)
        took = sum(sum(r.op_ends_ns) - int(op_starts(r).sum()) for r in mine.records)
        assert sum(row.time_ns for row in rows) == took
        assert all(row.floor_ns + row.lost_ns == row.time_ns for row in rows)
        assert [row.time_ns for row in rows] == sorted((r.time_ns for r in rows), reverse=True)
        classifier = StepClassifier(ledgers(len(measured))[rank], CEILINGS)
        floors = sum(int(classifier.classify(r)[1].sum()) for r in mine.records)
        assert sum(row.floor_ns for row in rows) == floors


def test_the_working_set_is_that_of_the_largest_step() -> None:
    ledger = ledgers(1)[0]
    count = len(ledger.op_ids())
    steps = [record(0, 0, [1] * count, PREFILL), record(1, 99, [1] * count, DECODE)]
    measured = [Measurements(0, steps, [])]
    assert PREFILL.sk < DECODE.sk == 50
    expected = ledger.weight_bytes_read + 50 * ledger.kv_bytes_per_token
    assert attributor(measured).working_set_bytes(0) == expected
    nothing = attributor([Measurements(0, [], [])])
    assert nothing.working_set_bytes(0) == ledger.weight_bytes_read


def test_a_window_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"5\.\.4 ends before it starts"):
        attributor([Measurements(0, [], [])]).attribute(5, 4)


def test_every_leaf_is_under_one_word() -> None:
    assert list(ROLLUP) == ["compute", "memory", "communication", "small_kernels", "host", "queue"]
    under = [leaf for leaves in ROLLUP.values() for leaf in leaves]
    assert sorted(under) == sorted(LEAVES)


def test_json_keeps_the_sums() -> None:
    value = json.loads(json.dumps(two_ranks(3000).to_json()))
    assert list(value) == [
        "wall_ns", "leaves", "rollup", "ranks", "method", "ceilings_origin", "warnings",
    ]  # fmt: skip
    assert (value["method"], value["ceilings_origin"]) == ("counters", "made up")
    assert value["leaves"] == value["ranks"][0]["leaves"]
    for split in value["ranks"]:
        assert sum(split["leaves"].values()) == sum(split["rollup"].values()) == value["wall_ns"]
    assert [split["caused_wait_ns"] for split in value["ranks"]] == [0, 3000]


def test_added_windows_keep_each_warning_once() -> None:
    one = Attribution((RankSplit(0, 5, {"host": 5}, {"python": 5}, 1),), "made up", ("a",))
    other = Attribution((RankSplit(0, 3, {"memory": 3}, {}, 2),), "made up", ("b", "a"))
    added = one + other
    assert added.warnings == ("a", "b")
    assert added.ranks == (RankSplit(0, 8, {"host": 5, "memory": 3}, {"python": 5}, 3),)


def test_ranks_may_have_ceilings_of_their_own() -> None:
    """Ranks on unequal devices are judged each by its own."""
    step = even_step(2, 0, 0)
    measured = [Measurements(rank, [step], []) for rank in range(2)]
    slow = replace(CEILINGS, flops_per_s={DType.FLOAT32: 1e6})
    found = Attributor(measured, ledgers(2), [CEILINGS, slow]).attribute(0, step.end_ns)
    compute = [split.rollup["compute"] for split in found.ranks]
    assert compute[1] > compute[0]
