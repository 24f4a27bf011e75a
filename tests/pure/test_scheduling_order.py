"""Who is served first, and how long anybody waits."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pure.model_device import Loop, limits, sequence
from tpinfer.scheduling.request import Sequence

REQUEST = st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(-2, 2), st.integers(0, 40))
"""Prompt tokens, tokens to generate, priority, time of arrival in ns."""
AGEING_NS = 10


def request(index: int, drawn: tuple[int, int, int, int]) -> Sequence:
    prompt, max_tokens, priority, arrival_ns = drawn
    tokens = tuple(range(100 * index, 100 * index + prompt))
    one = sequence(tokens, max_tokens, arrival_ns, priority=priority)
    one.index = index
    return one


def work(one: Sequence) -> int:
    """Most steps it takes once it is served first: a token in each."""
    return len(one.prompt_token_ids) + one.max_tokens


def test_priority_beats_arrival_and_waiting_makes_up_for_it() -> None:
    loop = Loop(limits(max_num_seqs=1, ageing_ns=AGEING_NS))
    first = request(0, (2, 2, 0, 0))
    patient = request(1, (2, 2, 1, 1))  # as if it had arrived at 11
    early, late = request(2, (2, 2, 0, 10)), request(3, (2, 2, 0, 12))
    loop.add(first)
    loop.step()
    for one in (late, patient, early):
        loop.add(one)
    loop.drain()
    ended = sorted((one for one in (first, patient, early, late)), key=lambda s: s.admitted_ns)
    assert ended == [first, early, patient, late]


@settings(deadline=None, max_examples=150)
@given(
    st.lists(REQUEST, min_size=2, max_size=10),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(8, 20),
    st.integers(1, 3),
)
def test_nobody_is_let_past_out_of_order(
    drawn: list[tuple[int, int, int, int]],
    num_rows: int,
    num_tokens: int,
    num_blocks: int,
    depth: int,
) -> None:
    """A sequence of priority p is overtaken only by those of priority q that arrive at most
    (p - q) * ageing_ns after it."""
    chosen = limits(
        max_num_seqs=num_rows,
        max_num_batched_tokens=num_tokens,
        num_blocks=num_blocks,
        ageing_ns=AGEING_NS,
    )
    loop, there = Loop(chosen), list[Sequence]()
    arriving = sorted((request(i, one) for i, one in enumerate(drawn)), key=_arrival)
    while arriving or loop.scheduler.has_work:
        while arriving and (arriving[0].accepted_ns <= loop.now_ns or not loop.scheduler.has_work):
            there.append(arriving.pop(0))
            loop.add(there[-1])
        planned = loop.plan() if len(loop.in_flight) < depth else None
        for one in planned.admitted if planned else ():
            for passed in there:
                if passed.row < 0 and passed.finish_reason is None:
                    lead_ns = (passed.priority - one.priority) * AGEING_NS
                    assert one.accepted_ns - passed.accepted_ns <= lead_ns, "let past too far"
        if loop.in_flight and (planned is None or len(loop.in_flight) == depth):
            loop.commit()
    assert len(loop.ended) == len(drawn)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(REQUEST, max_size=6),
    st.integers(0, 30),
    st.lists(REQUEST, min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(8, 20),
)
def test_nobody_waits_longer_than_the_bound(
    before: list[tuple[int, int, int, int]],
    head_start: int,
    drawn: list[tuple[int, int, int, int]],
    num_rows: int,
    num_tokens: int,
    num_blocks: int,
) -> None:
    """With `ahead` the sequences before it in order, a sequence gets a row within
    (1 + number of ahead) * (sum of the work of those that run or are ahead) steps, work being
    prompt and generated tokens. For the first in order has a place in every step until it ends; and
    while it waits, nobody is let in, so that those who run come to an end one by one."""
    chosen = limits(
        max_num_seqs=num_rows,
        max_num_batched_tokens=num_tokens,
        num_blocks=num_blocks,
        ageing_ns=AGEING_NS,
    )
    loop = Loop(chosen)
    early = [request(i, one) for i, one in enumerate(before)]
    late = [request(50 + i, one) for i, one in enumerate(drawn)]
    for one in early:
        loop.add(one)
    for _ in range(head_start):
        loop.step()
    for one in late:
        loop.add(one)
    unfinished = [one for one in [*early, *late] if one.finish_reason is None]
    bounds = {}
    for one in late:
        ahead = [other for other in unfinished if other.order < one.order]
        others = {other.id: other for other in ahead} | {s.id: s for s in loop.scheduler.running}
        bounds[one.id] = (1 + len(ahead)) * sum(work(other) for other in others.values())
    num_steps = 0
    while loop.scheduler.has_work:
        loop.step()
        for one in late:
            if one.row >= 0 or one.finish_reason is not None:
                assert num_steps <= bounds.pop(one.id, num_steps)
        num_steps += 1
    assert not bounds


def _arrival(one: Sequence) -> int:
    return one.accepted_ns
