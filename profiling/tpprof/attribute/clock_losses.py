"""What of the time above the floor is the device's clock: lost = clocks + rest, kernel by kernel.

A kernel's floor is that of a device at full clock. While it ran below, an arithmetic floor would
have been longer by full over mean core clock, and a memory floor by full over mean memory clock;
what that adds, but no more than the kernel lost, is the part of the clocks. Launch floors and
collectives do not scale, and caches not with the memory's clock, so nothing is claimed for them.

Full is the clock that the arithmetic rates were measured at where that is known, else the highest
the device has. Samples of an idle device say nothing about kernels and are left out; in between
clocks are taken to change evenly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tpinfer.config.ceilings import Ceilings
from tpinfer.config.clock_samples import ClockSamples, describe_reasons
from tpinfer.costs.leaves import LEAVES
from tpprof.classify.work import Work, WorkKind
from tpprof.results import DeviceClock

_REACH = 5
"""Periods beyond the first and last sample that they still speak for."""
_SCALED = (LEAVES.index("compute"), LEAVES.index("memory"))


@dataclass(frozen=True)
class ClockLosses:
    """Columns over the entries of a Work."""

    clocks_ns: np.ndarray
    """int64 [n]: part of time minus floor; 0 where no clock is known."""
    reason: np.ndarray
    """int64 [n]: index into `reasons`."""
    reasons: list[str]
    compute_mhz: np.ndarray
    """float64 [n]: mean over the entry; NaN where unknown."""
    memory_mhz: np.ndarray
    full_compute_mhz: float | None
    full_memory_mhz: float | None


def clock_losses(work: Work, samples: ClockSamples, ceilings: Ceilings) -> ClockLosses | None:
    """None where the samples are of another time than the work, or say nothing of any clock."""
    busy = samples.busy()
    if not len(work) or not busy:
        return None
    times = _on_clock_of(work, samples)
    if times is None:
        return None
    compute, memory = (
        _mean_clock(work, times, column, samples.period_ns)
        for column in (_known(samples.compute_mhz, busy), _known(samples.memory_mhz, busy))
    )
    if np.isnan(compute).all() and np.isnan(memory).all():
        return None
    full_compute = ceilings.compute_mhz or samples.most_compute_mhz
    full_memory = samples.most_memory_mhz
    reason, reasons = _reasons(work, times, samples, busy)
    grown = np.maximum(
        work.ceilings_ns.get("compute", np.zeros(len(work), np.int64))
        * _slowdown(full_compute, compute),
        _from_memory(work, ceilings) * _slowdown(full_memory, memory),
    )
    most = np.maximum(work.end_ns - work.start_ns - work.floor_ns, 0)
    scaled = np.isin(work.leaf, _SCALED) & (work.floor_ns > 0)
    added = np.where(scaled, np.rint(np.minimum(grown - work.floor_ns, most)), 0)
    return ClockLosses(
        clocks_ns=np.maximum(added, 0).astype(np.int64),
        reason=reason,
        reasons=reasons,
        compute_mhz=compute,
        memory_mhz=memory,
        full_compute_mhz=full_compute,
        full_memory_mhz=full_memory,
    )


def device_clock(
    work: Work, chosen: np.ndarray, samples: ClockSamples, losses: ClockLosses
) -> DeviceClock:
    """The chosen entries of one rank in sum; copies are no kernels."""
    chosen = chosen[work.kind[chosen] != WorkKind.COPY]
    length = work.end_ns[chosen] - work.start_ns[chosen]
    has_floor = work.floor_ns[chosen] > 0
    clocks = losses.clocks_ns[chosen]
    by_reason: dict[str, int] = {}
    for number in np.unique(losses.reason[chosen]).tolist():
        spent = int(clocks[losses.reason[chosen] == number].sum())
        if spent:
            by_reason[losses.reasons[number]] = spent
    compute, memory = losses.compute_mhz[chosen], losses.memory_mhz[chosen]
    known = ~np.isnan(compute) | ~np.isnan(memory)
    total = int(length.sum())
    hottest = [value for value in samples.temperature_c if value is not None]
    return DeviceClock(
        rank=samples.rank,
        kind=samples.kind,
        device=samples.device,
        num_samples=len(samples.busy()),
        coverage=float(length[known].sum() / total) if total else 0.0,
        compute_mhz=_weighted(compute, length),
        full_compute_mhz=losses.full_compute_mhz,
        memory_mhz=_weighted(memory, length),
        full_memory_mhz=losses.full_memory_mhz,
        power_w=samples.median(samples.power_w),
        power_limit_w=samples.power_limit_w,
        temperature_c=max(hottest, default=None),
        lost_ns=int((length - work.floor_ns[chosen])[has_floor].sum()),
        clocks_ns=int(clocks.sum()),
        reasons_ns=dict(sorted(by_reason.items(), key=lambda item: (-item[1], item[0]))),
    )


def _on_clock_of(work: Work, samples: ClockSamples) -> np.ndarray | None:
    """int64 [samples]: their times on the clock of the trace, which is the monotonic one or the
    system's; None where neither meets it."""
    moments = np.array(samples.monotonic_ns, np.int64)
    pairs = np.array(samples.clock_pairs, np.int64)
    ahead = pairs[:, 1] - pairs[:, 0]
    since = (moments - pairs[0, 0]).astype(np.float64)
    drift = np.interp(since, pairs[:, 0] - pairs[0, 0], ahead - ahead[0])
    real = moments + ahead[0] + np.rint(drift).astype(np.int64)
    begin, end = int(work.start_ns.min()), int(work.end_ns.max())
    reach = _REACH * samples.period_ns
    for times in (moments, real):
        if times[0] - reach <= end and times[-1] + reach >= begin:
            return times
    return None


def _known(column: Sequence[float | None], busy: list[int]) -> np.ndarray:
    """float64: a column with NaN where nothing was said, or nothing ran."""
    values = np.full(len(column), np.nan)
    values[busy] = [np.nan if column[i] is None else column[i] for i in busy]
    return values


def _mean_clock(work: Work, times: np.ndarray, values: np.ndarray, period_ns: int) -> np.ndarray:
    """float64 [n]: mean over each entry, NaN where it is out of reach of the samples."""
    told = ~np.isnan(values)
    if not told.any():
        return np.full(len(work), np.nan)
    origin = times[0]
    at, clock = (times[told] - origin).astype(np.float64), values[told]
    begin, end = ((edge - origin).astype(np.float64) for edge in (work.start_ns, work.end_ns))
    middle = (begin + end) / 2
    mean = np.interp(middle, at, clock)
    long = np.flatnonzero(end - begin > period_ns)
    if len(long):
        whole = _integral(at, clock, end[long]) - _integral(at, clock, begin[long])
        mean[long] = whole / (end[long] - begin[long])
    reach = _REACH * period_ns
    return np.where((middle >= at[0] - reach) & (middle <= at[-1] + reach), mean, np.nan)


def _integral(at: np.ndarray, clock: np.ndarray, until: np.ndarray) -> np.ndarray:
    """Of the line through the samples, level beyond them, from the first sample on."""
    steps = np.diff(at) * (clock[1:] + clock[:-1]) / 2
    before = np.concatenate(([0.0], np.cumsum(steps)))
    place = np.clip(np.searchsorted(at, until, side="right") - 1, 0, len(at) - 1)
    last = (clock[place] + np.interp(until, at, clock)) / 2
    return before[place] + last * (until - at[place])


def _slowdown(full_mhz: float | None, mean_mhz: np.ndarray) -> np.ndarray:
    """float64 [n]: how many times as long something took that goes by this clock; 1 where it is not
    known."""
    if not full_mhz:
        return np.ones(len(mean_mhz))
    known = mean_mhz > 0
    return np.where(known, np.maximum(full_mhz / np.where(known, mean_mhz, 1.0), 1.0), 1.0)


def _from_memory(work: Work, ceilings: Ceilings) -> np.ndarray:
    """int64 [n]: least time of what comes from memory itself; 0 where a cache holds it."""
    name = ceilings.memory[-1].name
    found = work.ceilings_ns.get(name, np.zeros(len(work), np.int64))
    return np.where(found <= work.floor_ns, found, 0)


def _reasons(
    work: Work, times: np.ndarray, samples: ClockSamples, busy: list[int]
) -> tuple[np.ndarray, list[str]]:
    """(index into the texts per entry, the texts): what the sample nearest to its middle said."""
    told = [i for i in busy if samples.reasons[i] is not None] or busy
    texts: dict[str, int] = {}
    numbers = np.array(
        [texts.setdefault(describe_reasons(samples.reasons[i]), len(texts)) for i in told]
    )
    at = times[told]
    between = at[:-1] + (at[1:] - at[:-1]) // 2
    middle = work.start_ns + (work.end_ns - work.start_ns) // 2
    return numbers[np.searchsorted(between, middle)], list(texts)


def _weighted(values: np.ndarray, weights: np.ndarray) -> float | None:
    known = ~np.isnan(values)
    total = weights[known].sum()
    return round(float((values[known] * weights[known]).sum() / total), 1) if total else None
