"""Made-up recordings of ranks, for tests of attribution that need neither torch nor time."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from tests.pure.models import tiny
from tpinfer.config.ceilings import Ceilings, MemoryLevel
from tpinfer.config.dtypes import DType
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import StepAggregates, aggregate
from tpinfer.costs.step_record import HostSpan, Measurements, StepRecord
from tpinfer.engine.attribution import Attributor
from tpinfer.engine.timeline import HOST_PARTS
from tpinfer.sharding.partition import partition_model

SPEC = tiny(num_layers=1)
DECODE = aggregate([1, 1], [20, 30], num_logit_rows=2)
PREFILL = aggregate([40], [40], num_logit_rows=1)
CEILINGS = Ceilings(
    memory=(MemoryLevel("L3", 1 << 16, 100e9), MemoryLevel("DRAM", 1 << 34, 10e9)),
    flops_per_s={DType.FLOAT32: 50e9},
    kernel_floor_s=200e-9,
    collective_latency_s=5e-6,
    collective_bytes_per_s=1e9,
    origin="made up",
)
"""Ceilings near which the small model's ops fall on all sides."""


def ledgers(tp: int) -> list[CostLedger]:
    """One per rank of the small model."""
    partition = partition_model(SPEC, tp)
    return [CostLedger(SPEC, partition, r, DType.FLOAT32, DType.FLOAT32) for r in range(tp)]


def attributor(
    measured: Sequence[Measurements], ceilings: Ceilings = CEILINGS, tp: int | None = None
) -> Attributor:
    """Of recordings of all ranks, judged by the same ceilings."""
    return Attributor(measured, ledgers(tp or len(measured)), [ceilings] * len(measured))


def record(
    step_id: int,
    start_ns: int,
    durations_ns: Sequence[int],
    aggregates: StepAggregates = DECODE,
    before_ns: int = 0,
    after_ns: int = 0,
) -> StepRecord:
    """A step of adjoining ops, `before_ns` after its start and `after_ns` before its end."""
    first = start_ns + before_ns
    ends = (first + np.cumsum(durations_ns)).tolist()
    return StepRecord(step_id, "decode", aggregates, start_ns, ends[-1] + after_ns, first, ends)


def even_step(tp: int, step_id: int, start_ns: int, op_ns: int = 1000) -> StepRecord:
    """A step whose ops all take the same time."""
    return record(step_id, start_ns, [op_ns] * len(ledgers(tp)[0].op_ids()))


def delayed(step: StepRecord, op_index: int, delay_ns: int) -> StepRecord:
    """The same step, where this op takes longer and everything behind it comes later."""
    ends = [end + (delay_ns if i >= op_index else 0) for i, end in enumerate(step.op_ends_ns)]
    return replace(step, op_ends_ns=ends, end_ns=step.end_ns + delay_ns)


def waiting(step: StepRecord, last: StepRecord, collectives: Sequence[int]) -> StepRecord:
    """The same step, where each collective ends when `last` (the other rank) ends it."""
    ends, shift = list(step.op_ends_ns), 0
    for index in range(len(ends)):
        ends[index] += shift
        if index in collectives and ends[index] < last.op_ends_ns[index]:
            shift += last.op_ends_ns[index] - ends[index]
            ends[index] = last.op_ends_ns[index]
    return replace(step, op_ends_ns=ends, end_ns=ends[-1] + step.end_ns - step.op_ends_ns[-1])


@st.composite
def runs(draw: st.DrawFn, max_ns: int = 40) -> list[Measurements]:
    """Recordings of 1 to 3 ranks: steps of random times, some with gaps between their ops, some
    missing on one rank, and host spans that may overlap anything."""
    tp, num_steps = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    num_ops = len(ledgers(tp)[0].op_ids())
    times = st.integers(0, max_ns)
    aggregates = [draw(st.sampled_from([DECODE, PREFILL])) for _ in range(num_steps)]
    measured = []
    for rank in range(tp):
        now, records = draw(times), []
        for step_id in range(num_steps):
            step = record(
                step_id,
                now,
                draw(st.lists(times, min_size=num_ops, max_size=num_ops)),
                aggregates[step_id],
                draw(times),
                draw(times),
            )
            if draw(st.booleans()):
                step = with_gaps(step, draw(st.lists(times, min_size=num_ops, max_size=num_ops)))
            now = step.end_ns + draw(times)
            if draw(st.integers(0, 5)):
                records.append(step)
        measured.append(Measurements(rank, records, draw(spans(now)), draw(recorded_from(now))))
    return measured


def spans(until_ns: int) -> st.SearchStrategy[list[HostSpan]]:
    """Host spans anywhere before `until_ns`."""
    moments = st.tuples(st.integers(0, until_ns), st.integers(0, until_ns)).map(sorted)
    one = st.builds(
        lambda part, moments: HostSpan(part, *moments), st.sampled_from(HOST_PARTS), moments
    )
    return st.lists(one, max_size=4)


def recorded_from(until_ns: int) -> st.SearchStrategy[int]:
    """Since when records are complete: often since ever."""
    return st.just(0) | st.integers(0, until_ns)


def with_gaps(step: StepRecord, gaps_ns: Sequence[int]) -> StepRecord:
    """The same step on a rank whose ops start up to `gaps_ns` after the one before ended."""
    before = [step.ops_start_ns, *step.op_ends_ns[:-1]]
    starts = [
        min(start + gap, end)
        for start, gap, end in zip(before, gaps_ns, step.op_ends_ns, strict=True)
    ]
    return replace(step, op_starts_ns=starts)


def leaf_sums(leaves: Mapping[str, int], *names: str) -> int:
    """ns of some leaves."""
    return sum(leaves.get(name, 0) for name in names)
