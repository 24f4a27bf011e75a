"""What is known of one run before anybody asks: verdicts, matches, clocks, waits, timelines."""

from collections.abc import Sequence
from dataclasses import dataclass

from tpinfer.config.ceilings import Ceilings
from tpprof.attribute.idle import LaunchFloors
from tpprof.attribute.integrity import check
from tpprof.attribute.sweep import Recorded, sweep
from tpprof.attribute.timeline import Timeline
from tpprof.attribute.windows import HostTimes, host_times
from tpprof.classify.steps import find_steps
from tpprof.classify.work import Work
from tpprof.events import Trace
from tpprof.ranks.capture import Capture, read_capture
from tpprof.ranks.clock import Clock, fit_clocks
from tpprof.ranks.match import Matched, match
from tpprof.ranks.step_order import same_numbers
from tpprof.ranks.wait import Ready, Waits, columns_of, divide, estimated, ready_of


@dataclass(frozen=True)
class RankFindings:
    """One run, ready to be asked about any window. Sequences go by rank, lowest first."""

    traces: Sequence[Trace]
    works: Sequence[Work]
    hosts: Sequence[HostTimes]
    recorded: Sequence[Recorded]
    matched: Matched
    clocks: Sequence[Clock]
    waits: Waits
    ready: Sequence[Ready]
    timelines: Sequence[Timeline]
    capture: Capture
    is_estimated: bool
    """One rank's file alone: its communication is divided by a ceiling."""
    ceilings: Ceilings | None
    """Of the rank shown; what kernels were judged by."""
    warnings: list[str]

    @property
    def spans_ns(self) -> list[tuple[int, int]]:
        """Window `all` of each rank, on its own clock."""
        return [(host.span.start_ns, host.span.end_ns) for host in self.hosts]

    @property
    def num_steps(self) -> int:
        """Steps that the rank shown recorded; 1 where nobody marked any."""
        return len(self.hosts[0].steps) or 1


def prepare_works(
    traces: Sequence[Trace],
    works: Sequence[Work],
    floors: LaunchFloors | None = None,
    ceilings: Ceilings | None = None,
) -> RankFindings:
    """Match, align and sweep; `works` in the order of `traces`, which is by rank."""
    floors = floors or LaunchFloors()
    steps, works, matching, told = same_numbers(
        [trace.rank for trace in traces], [find_steps(trace) for trace in traces], works
    )
    hosts = [host_times(*one) for one in zip(traces, works, steps, strict=True)]
    recorded = [
        check(trace, work, host.steps)
        for trace, work, host in zip(traces, works, hosts, strict=True)
    ]
    capture = read_capture(trace.source for trace in traces)
    matched = match(traces, matching)
    clocks = _clocks(traces, works, matched, recorded, capture)
    waits = divide(matched, works, clocks)
    is_estimated = len(traces) == 1
    ready = (
        [estimated(works[0])]
        if is_estimated
        else [ready_of(matched, waits, i, work) for i, work in enumerate(works)]
    )
    timelines = [
        sweep(*one, _hull(one[3], host), floors)
        for one, host in zip(zip(traces, works, ready, recorded, strict=True), hosts, strict=True)
    ]
    findings = RankFindings(
        traces, works, hosts, recorded, matched, clocks, waits, ready, timelines, capture,
        is_estimated, ceilings, [],
    )  # fmt: skip
    findings.warnings.extend([*_warnings(findings), *told])
    return findings


def _clocks(
    traces: Sequence[Trace],
    works: Sequence[Work],
    matched: Matched,
    recorded: Sequence[Recorded],
    capture: Capture,
) -> list[Clock]:
    on_cpu = {trace.rank for trace, work in zip(traces, works, strict=True) if work.is_cpu}
    return fit_clocks(
        [trace.rank for trace in traces],
        [one.start_ns for one in recorded],
        matched,
        columns_of(matched, [work.end_ns for work in works]),
        columns_of(matched, [work.end_ns - work.start_ns for work in works]),
        [ranks & on_cpu for ranks in capture.shared_clocks],
    )


def _hull(recorded: Recorded, host: HostTimes) -> tuple[int, int]:
    """What a timeline must cover: all that was recorded, and the window `all`."""
    span = host.span
    return min(recorded.start_ns, span.start_ns), max(recorded.end_ns, span.end_ns)


def _warnings(found: RankFindings) -> list[str]:
    told = [text for trace in found.traces for text in trace.warnings]
    told += [text for work in found.works for text in work.warnings]
    told += [text for host in found.hosts for text in host.warnings]
    told += [text for one in found.recorded for text in one.warnings]
    told += found.matched.warnings
    told += [
        f"rank {clock.rank}: its clock is not aligned, its collectives stay comm_unsplit: "
        f"{clock.reason}"
        for clock in found.clocks
        if not clock.accepted
    ]
    for trace, timeline in zip(found.traces, found.timelines, strict=True):
        if timeline.num_negative_launches:
            told.append(
                f"rank {trace.rank}: {timeline.num_negative_launches} kernels start before the "
                "call that launched them; no launch latency is claimed for them"
            )
        if not len(trace):
            told.append(f"rank {trace.rank}: {trace.source} holds no events")
    told += _absent(found)
    numbers = {len(host.steps) for host in found.hosts}
    if len(numbers) > 1:
        each = ", ".join(f"rank {h.trace.rank}: {len(h.steps)}" for h in found.hosts)
        told.append(f"ranks recorded different numbers of steps ({each})")
    return list(dict.fromkeys(told))


def _absent(found: RankFindings) -> list[str]:
    """Collectives that cannot be divided for want of a peer or by their nature."""
    told = []
    if len(found.matched):
        lacking = int(found.matched.is_partial.sum())
        if lacking:
            told.append(
                f"{lacking} collectives have ranks whose traces were not given: they stay "
                "comm_unsplit; give the traces of all ranks"
            )
        loose = int((~found.matched.synchronising).sum())
        if loose:
            told.append(
                f"{loose} broadcasts, sends and the like let ranks leave before all have come: "
                "they stay comm_unsplit"
            )
    if found.is_estimated and (found.ready[0].known & (found.works[0].comm_size != 1)).any():
        told.append(
            "one rank's trace was given: wait and transfer are estimated from a ceiling; give the "
            "traces of all ranks to measure them"
        )
    return told
