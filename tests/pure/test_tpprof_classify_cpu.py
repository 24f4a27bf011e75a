"""classify_trace on CPU ranks of other engines."""

from hypothesis import given
from hypothesis import strategies as st
from tpprof.classify.classify import classify_trace
from tpprof.classify.work import WorkKind
from tpprof.events import Lane

from tests.pure.tpprof_rows import WORKER, Rows
from tests.pure.tpprof_works import BF16, CEILINGS, at, check_whole, key, mm


def test_foreign_operators_on_a_cpu() -> None:
    """The outermost with a model stands for what it calls; what others do themselves counts too."""
    rows = Rows()
    rows.op("aten::linear", 1000, 2000, [([2, 4], "float"), ([8, 4], "float")])
    rows.op("aten::addmm", 1100, 1900, [([8], "float"), ([2, 4], "float"), ([4, 8], "float")])
    rows.op("aten::expand", 1110, 1120, [([8], "float")])
    rows.op("my::block", 3000, 5000)
    rows.op("aten::silu", 3500, 4000, [([16], "float")])
    rows.op("aten::to", 6000, 7000, [([16], "float")])
    rows.op("aten::copy_", 6400, 6900, [([16], BF16), ([16], "float")])
    rows.op("aten::mm", 1000, 1500, mm(2, 2, 2)[1], lane=WORKER)
    trace = rows.trace()
    work = classify_trace(trace, CEILINGS)
    check_whole(trace, work)
    assert work.is_cpu
    spans = [(key(work, i), int(work.start_ns[i]), int(work.end_ns[i])) for i in range(len(work))]
    assert spans == [
        ("aten::linear", 1000, 2000),
        ("my::block", 3000, 3500),
        ("aten::silu", 3500, 4000),
        ("my::block", 4000, 5000),
        ("aten::to", 6000, 6400),
        ("aten::copy_", 6400, 6900),
        ("aten::to", 6900, 7000),
    ]
    assert work.flops.tolist() == [128, -1, 80, -1, 0, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.integers(0, 3)), max_size=8))
def test_every_moment_of_foreign_operators_is_some_work(
    trees: list[tuple[int, int, int]],
) -> None:
    """Nested operators of any kind cover what the outermost do, once."""
    rows, now = Rows(), 0
    names = ["aten::linear", "my::op", "aten::view", "aten::silu"]
    total = 0
    for gap, length, what in trees:
        now += gap
        rows.op(names[what], now, now + 4 * length, [([2, 4], "float"), ([8, 4], "float")])
        rows.op(names[(what + 1) % 4], now + length, now + 3 * length, [([2], "float")])
        rows.op(names[(what + 2) % 4], now + length, now + 2 * length)
        now += 4 * length
        total += 4 * length
    trace = rows.trace()
    work = classify_trace(trace, CEILINGS)
    check_whole(trace, work)
    assert (work.end_ns - work.start_ns).sum() == total
    assert (work.start_ns[1:] >= work.end_ns[:-1]).all()


def test_gloo_on_a_foreign_cpu_rank() -> None:
    """Its threads communicate; the call that hands over is the host's time."""
    rows = Rows()
    linear = rows.op("aten::linear", 1000, 2000, [([2, 4], "float"), ([8, 4], "float")])
    rows.op("c10d::allreduce_", 2100, 2200, [([[2, 8]], "TensorList")])
    rows.op("aten::view", 2120, 2130, [([2, 8], "float")])
    reduce = rows.range("gloo:all_reduce", 2300, 6000, WORKER)
    reduce.shapes = '[[[2, 8]], ["float"]]'
    gather = rows.range("gloo:all_gather", 7000, 9000, Lane(False, 100, 102))
    rows.range("gloo:wait", 7000, 9000, WORKER)
    trace = rows.trace(world_size=2)
    work = classify_trace(trace, CEILINGS)
    check_whole(trace, work)
    assert len(work) == 3 and work.kind.tolist() == [0, 1, 1]
    assert at(trace, work, linear) == 0
    found = at(trace, work, reduce), at(trace, work, gather)
    assert [work.keys[work.comm_op[i]] for i in found] == ["allreduce", "allgather"]
    assert [int(work.comm_size[i]) for i in found] == [2, 2]
    assert len({int(work.comm_group[i]) for i in found}) == 1
    assert [int(work.comm_bytes[i]) for i in found] == [64, -1]
    assert work.floor_ns[found[0]] == round(5000 + 64 / 100)


def test_a_foreign_cpu_backend_without_threads() -> None:
    """Then the call is the collective, and what the recorder tells inside it counts."""
    rows = Rows()
    rows.op("aten::linear", 1000, 2000, [([2, 4], "float"), ([8, 4], "float")])
    call = rows.op("c10d::allreduce_", 2100, 4200, [([[2, 8]], "TensorList")])
    inner = rows.op("record_param_comms", 2150, 2160)
    inner.told = ("allreduce", 64, "tp", 2, 17)
    trace = rows.trace(world_size=2)
    work = classify_trace(trace, CEILINGS)
    check_whole(trace, work)
    entry = at(trace, work, call)
    assert len(work) == 2 and work.kind[entry] == WorkKind.COMM
    assert work.keys[work.comm_op[entry]] == "allreduce"
    told = work.comm_bytes[entry], work.comm_size[entry], work.comm_sequence[entry]
    assert told == (64, 2, 17) and work.keys[work.comm_group[entry]] == "tp"
