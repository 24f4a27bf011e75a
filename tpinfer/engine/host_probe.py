"""What the host does for a step besides its ops: part of `topo probe`.

On rank 0 the scheduler plans a step and takes its tokens; on every rank the plan becomes tensors
before the first op, and results are taken behind the last. Sending plans between processes and text
are not in it.
"""

import statistics
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from tpinfer.config.measured import HostTime
from tpinfer.costs.step_record import StepRecord
from tpinfer.scheduling.limits import SchedulerLimits
from tpinfer.scheduling.request import Sequence as Request
from tpinfer.scheduling.scheduler import Scheduler

_STEPS, _PROMPT = 40, 16


def around_ops_s(records: Sequence[StepRecord]) -> float:
    """Median seconds of a step before its first op and behind its last one."""
    return statistics.median(
        (one.ops_start_ns - one.start_ns + max(0, one.end_ns - one.op_ends_ns[-1])) * 1e-9
        for one in records
    )


def planning_s(limits: SchedulerLimits, num_rows: int) -> float:
    """Median seconds that the scheduler takes for a step of so many decodes: planning it and taking
    its tokens. `limits` must let that many run."""
    scheduler = Scheduler(limits)
    for row in range(num_rows):
        prompt = tuple((7 * row + place) % 1000 for place in range(_PROMPT))
        scheduler.add(Request(row, prompt, 2 * _STEPS, frozenset(), row + 1))
    times: list[float] = []
    while len(times) < _STEPS:
        began = perf_counter()
        scheduled = scheduler.schedule(10**9)
        assert scheduled is not None, "limits let every row run"
        spent = perf_counter() - began
        first = scheduled.num_decodes
        drawn = first + sum(scheduled.plan.num_samples[first:])
        began = perf_counter()
        scheduler.commit(scheduled, [1] * drawn, 10**9)
        if first == num_rows:
            times.append(spent + perf_counter() - began)
    scheduler.abort_all()
    return statistics.median(times)


def fit_host_time(seconds: Sequence[tuple[int, float]]) -> HostTime:
    """A start and so much a row, by least squares of the relative error over (rows, seconds of a
    step); neither below 0."""
    rows, times = (np.array(column, float) for column in zip(*seconds, strict=True))
    columns = np.stack([np.ones(len(rows)), rows], 1) / times[:, None]
    step_s, row_s = np.linalg.lstsq(columns, np.ones(len(rows)), rcond=None)[0]
    if row_s < 0:
        return HostTime(float(1 / np.mean(1 / times)), 0.0)
    if step_s < 0:
        return HostTime(0.0, float(1 / np.mean(rows / times)))
    return HostTime(float(step_s), float(row_s))
