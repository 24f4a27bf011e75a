"""Which wall intervals are asked about, from host boundaries, on every rank's own clock.

`all`: from the first step's start to the last one's end, else all that host rows span. `steps`:
each step as annotated. `ttft` and `itl`: each request by its own marks; without such marks the
prefill and the decode steps, from token-ready to token-ready, which tiles the time also where step
n+1 is launched while step n runs. Never from the first kernel to the last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from tpprof.attribute.requests import RequestTimes, find_requests, token_ready
from tpprof.classify.steps import Step
from tpprof.classify.work import Work
from tpprof.events import Trace
from tpprof.ranks.clock import Clock

WINDOWS = ("all", "steps", "ttft", "itl")


MOST_BEHIND, WORTH_TELLING = 0.5, 0.1
"""Shares of the work behind the last step's annotation: above the first the window goes on to its
end, above the second it is told."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """One window on one rank, on its clock."""

    start_ns: int
    end_ns: int
    queued_until_ns: int | None = None

    @property
    def begun_ns(self) -> int:
        """Where work on it could begin: what lies before is `queue`."""
        if self.queued_until_ns is None:
            return self.start_ns
        return min(max(self.start_ns, self.queued_until_ns), self.end_ns)


@dataclass(frozen=True)
class Wanted:
    """One window on the ranks that have it."""

    label: str
    by_column: dict[int, Stretch]
    """By place of the rank's trace."""


@dataclass(frozen=True)
class HostTimes:
    """What the host of one rank says of time."""

    trace: Trace
    steps: list[Step]
    tiles: list[tuple[int, int]]
    """Per step, from token-ready to token-ready; the first begins with its annotation."""
    requests: list[RequestTimes]
    span: Stretch
    """The window `all`."""
    warnings: list[str] = field(default_factory=list)


def host_times(trace: Trace, work: Work, steps: list[Step]) -> HostTimes:
    """Token-ready boundaries, requests and the whole span of one rank."""
    ready = token_ready(trace, work, steps)
    begin = [step.start_ns for step in steps[:1]] + ready[:-1]
    tiles = [(min(a, b), b) for a, b in zip(begin, ready, strict=True)]
    warnings = []
    span = _span(trace, work, steps)
    share = _share_behind(work, span.end_ns) if steps else 0.0
    if steps and span.end_ns > steps[-1].end_ns:
        warnings.append(
            f"rank {trace.rank}: most of the work ran after the host had left its last step; the "
            "window goes on to the end of it"
        )
    elif share > WORTH_TELLING:
        warnings.append(
            f"rank {trace.rank}: {100 * share:.0f} % of the work ran after the host had left its "
            "last step and is not in the window; record more steps"
        )
    if not steps and len(trace) and trace.is_device().all():
        warnings.append(
            f"rank {trace.rank} recorded no host rows: its window runs from the first device row "
            "to the last; record the host too"
        )
    return HostTimes(trace, steps, tiles, find_requests(trace), span, warnings)


def _share_behind(work: Work, moment_ns: int) -> float:
    """Share of the steps' work that ran after a moment."""
    mine = work.step >= 0
    length = work.end_ns[mine] - work.start_ns[mine]
    behind = np.clip(work.end_ns[mine] - moment_ns, 0, length)
    return float(behind.sum() / length.sum()) if length.any() else 0.0


def _span(trace: Trace, work: Work, steps: list[Step]) -> Stretch:
    if steps:
        end_ns = steps[-1].end_ns
        if _share_behind(work, end_ns) > MOST_BEHIND:
            # The host ran ahead, and its few steps are over before the device has done them.
            end_ns = int(work.end_ns[work.step >= 0].max())
        return Stretch(steps[0].start_ns, end_ns)
    if not len(trace):
        return Stretch(0, 0)
    is_thread = np.array([not lane.is_device for lane in trace.lanes], bool)
    rows = is_thread[trace.lane] & ~trace.is_device()
    if not rows.any():
        rows = np.ones(len(trace), bool)
    return Stretch(int(trace.start_ns[rows].min()), int(trace.end_ns[rows].max()))


def wanted_windows(
    kind: str, hosts: Sequence[HostTimes], clocks: Sequence[Clock]
) -> tuple[list[Wanted], list[str]]:
    """The windows of one kind of WINDOWS, and what could not be had."""
    shown = min(range(len(hosts)), key=lambda column: hosts[column].trace.rank)
    if kind == "all":
        return [Wanted("all", {i: host.span for i, host in enumerate(hosts)})], []
    if kind == "steps":
        return _of_steps(hosts, lambda _: True, "{}")
    requests = hosts[shown].requests
    asked = [one for times in requests for one in _of_request(kind, times)]
    if asked:
        return [_on_all(*one, shown, hosts, clocks) for one in asked], _untold(
            kind, requests, clocks
        )
    phases = ("prefill", "mixed") if kind == "ttft" else ("decode",)
    return _of_steps(hosts, lambda step: step.phase in phases, kind + " {}", tiled=True)


def _of_steps(
    hosts: Sequence[HostTimes],
    chosen: Callable[[Step], bool],
    label: str,
    tiled: bool = False,
) -> tuple[list[Wanted], list[str]]:
    found: dict[int, Wanted] = {}
    for column, host in enumerate(hosts):
        for step, tile in zip(host.steps, host.tiles, strict=True):
            if chosen(step):
                wanted = found.setdefault(step.number, Wanted(label.format(step.label), {}))
                begin, end = tile if tiled else (step.start_ns, step.end_ns)
                wanted.by_column[column] = Stretch(begin, end)
    partial = sum(len(wanted.by_column) < len(hosts) for wanted in found.values())
    told = []
    if partial:
        told.append(f"{partial} of {len(found)} steps are not in the recording of every rank")
    return [found[number] for number in sorted(found)], told


def _of_request(kind: str, times: RequestTimes) -> list[tuple[str, Stretch]]:
    """Label and stretch, on the clock of the rank that serves it, of each window it has."""
    name = f"{kind} request {times.request}"
    if kind == "itl":
        return [
            (f"{name} token {times.first_index + place}", Stretch(a, b))
            for place, (a, b) in enumerate(pairwise(times.tokens_ns), 1)
        ]
    if times.accepted_ns is None or times.first_index or not times.tokens_ns:
        return []
    end = max(times.accepted_ns, times.tokens_ns[0])
    return [(name, Stretch(times.accepted_ns, end, times.admitted_ns))]


def _on_all(
    label: str,
    stretch: Stretch,
    shown: int,
    hosts: Sequence[HostTimes],
    clocks: Sequence[Clock],
) -> Wanted:
    """The same moments on every rank whose clock is known."""
    moments = np.array([stretch.start_ns, stretch.begun_ns, stretch.end_ns])
    by_column = {}
    for column in range(len(hosts)):
        if column == shown:
            by_column[column] = stretch
        elif clocks[column].accepted:
            local = clocks[column].from_reference(clocks[shown].to_reference(moments))
            start, begun, end = np.maximum.accumulate(local).tolist()
            by_column[column] = Stretch(start, end, begun)
    return Wanted(label, by_column)


def _untold(kind: str, requests: list[RequestTimes], clocks: Sequence[Clock]) -> list[str]:
    told = []
    lacking = sum(not _of_request(kind, times) for times in requests)
    if lacking:
        what = "accepted and given a first token" if kind == "ttft" else "given two tokens"
        told.append(f"{lacking} of {len(requests)} requests were not {what} while recording ran")
    apart = [str(clock.rank) for clock in clocks if not clock.accepted]
    if apart:
        told.append(
            f"windows of requests leave out rank {', '.join(apart)}: "
            "no accepted clock says where they lie there"
        )
    return told
