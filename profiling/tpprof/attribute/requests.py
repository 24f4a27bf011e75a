"""Requests as the host marked them, and when each step's tokens were ready."""

import re
from dataclasses import dataclass

import numpy as np

from tpprof import intervals
from tpprof.classify.steps import Step
from tpprof.classify.work import Work, WorkKind
from tpprof.events import Kind, Trace

_PAIR = re.compile(r"(\w+)=([^\s\]]+)")


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """When a request moved on, on the clock of the rank that serves it."""

    request: str
    accepted_ns: int | None
    admitted_ns: int | None
    tokens_ns: tuple[int, ...]
    """When each recorded token was on the host, ascending."""
    first_index: int
    """Index of the first of them among the request's tokens; 0 where recording saw the first."""


def find_requests(trace: Trace) -> list[RequestTimes]:
    """Requests in order of their first mark, from `tpinfer.accept`, `.admit` and `.token`."""
    kinds: dict[int, tuple[str, str, int]] = {}
    for index, text in enumerate(trace.strings):
        mark, _, rest = text.partition(" ")
        if mark in ("tpinfer.accept", "tpinfer.admit", "tpinfer.token"):
            pairs = dict(_PAIR.findall(rest))
            number = pairs.get("index", "")
            if "request" in pairs and (mark != "tpinfer.token" or number.isdigit()):
                kinds[index] = mark, pairs["request"], int(number or 0)
    marked: dict[str, dict[str, int]] = {}
    tokens: dict[str, dict[int, int]] = {}
    rows = np.flatnonzero((trace.kind == Kind.RANGE) & np.isin(trace.name, list(kinds)))
    for row in rows.tolist():
        mark, request, number = kinds[int(trace.name[row])]
        when = marked.setdefault(request, {})
        if mark == "tpinfer.token":
            tokens.setdefault(request, {}).setdefault(number, int(trace.end_ns[row]))
        else:
            when.setdefault(mark, int(trace.start_ns[row]))
    return [
        RequestTimes(
            request=request,
            accepted_ns=when.get("tpinfer.accept"),
            admitted_ns=when.get("tpinfer.admit"),
            tokens_ns=tuple(sorted(tokens.get(request, {}).values())),
            first_index=min(tokens.get(request, {0: 0})),
        )
        for request, when in marked.items()
    ]


def token_ready(trace: Trace, work: Work, steps: list[Step]) -> list[int]:
    """Per step, when its tokens were on the host: the end of the call that waited for its last
    device-to-host copy, else of that copy, else of the annotation; never before the step before.
    """
    ready = [step.end_ns for step in steps]
    lower = [text.lower().replace(" ", "") for text in trace.strings]
    to_host = np.array(["dtoh" in text or "devicetohost" in text for text in lower], bool)
    waiting = np.array(["synchronize" in t or "memcpywithstream" in t for t in lower], bool)
    copies = np.flatnonzero(work.kind == WorkKind.COPY)
    if len(copies):
        copies = copies[to_host[trace.name[work.row[copies]]]]
    if not len(copies):
        return np.maximum.accumulate(np.array(ready, np.int64)).tolist()
    calls = np.flatnonzero((trace.kind == Kind.LAUNCH) & waiting[trace.name])
    calls = calls[np.argsort(trace.end_ns[calls], kind="stable")]
    copied = {}
    for number in intervals.distinct(work.step[copies]).tolist():
        copied[number] = int(work.end_ns[copies[work.step[copies] == number]].max())
    ends = [copied.get(step.number) for step in steps]
    for place, end in enumerate(ends):
        if end is None:
            continue
        call = int(np.searchsorted(trace.end_ns[calls], end))
        following = next((later for later in ends[place + 1 :] if later is not None), None)
        seen = call < len(calls) and (following is None or trace.start_ns[calls[call]] < following)
        ready[place] = int(trace.end_ns[calls[call]]) if seen else end
    return np.maximum.accumulate(np.array(ready, np.int64)).tolist()
