"""What the host did while no device work ran: cuts host time by what is open on the thread.

In this order: the recorder itself, the innermost `tpinfer.host` range, a call of the device's
runtime, else `python`, which includes the framework's operators: only one of the recorders sees
those, and a report must not depend on the recorder.
"""

import numpy as np

from tpprof import intervals
from tpprof.events import Kind, Trace

PREFIX = "tpinfer.host "
"""Ranges whose name goes on with what the host does: `schedule`, `prepare`, ..."""
RECORDER, RUNTIME, PYTHON = "recorder", "runtime", "python"


class HostParts:
    """Looks up what a host thread was doing, any number of moments at once."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        ranged = {
            index: text[len(PREFIX) :].split(" ", 1)[0]
            for index, text in enumerate(trace.strings)
            if text.startswith(PREFIX)
        }
        self.names = list(dict.fromkeys((RECORDER, RUNTIME, PYTHON, *ranged.values())))
        self._part_of_text = np.full(len(trace.strings) + 1, -1, np.int16)
        for index, name in ranged.items():
            self._part_of_text[index] = self.names.index(name)
        self._recorder = self._union(trace.kind == Kind.OVERHEAD)

    def cut(
        self, starts: np.ndarray, ends: np.ndarray, lanes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Cut disjoint stretches of host time: (starts, ends, row cut from, part int16).

        `lanes`, int32 per stretch, is the thread to look at; -1 looks at none and gives `python`.
        """
        columns = [
            self._cut_lane(starts, ends, lanes == lane, lane) for lane in intervals.distinct(lanes)
        ]
        if not columns:
            empty = np.empty(0, np.int64)
            return empty, empty, empty, np.empty(0, np.int16)
        begin, stop, row, part = (np.concatenate(column) for column in zip(*columns, strict=True))
        return begin, stop, row, part

    def _cut_lane(
        self, starts: np.ndarray, ends: np.ndarray, chosen: np.ndarray, lane: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        trace, here = self._trace, self._trace.lane == lane
        ranged = np.flatnonzero(here & (trace.kind == Kind.RANGE))
        ranged = ranged[self._part_of_text[trace.name[ranged]] >= 0]
        calls = self._union(here & (trace.kind == Kind.LAUNCH))
        unions = (self._recorder, calls)
        points = [trace.start_ns[ranged], trace.end_ns[ranged]]
        points += [column for union in unions for column in union]
        rows = np.flatnonzero(chosen)
        begin, stop, row = intervals.cut(starts[rows], ends[rows], np.concatenate(points))
        part = np.full(len(begin), self.names.index(PYTHON), np.int16)
        part[intervals.locate(*calls, begin) >= 0] = self.names.index(RUNTIME)
        inner = intervals.innermost(trace.start_ns[ranged], trace.end_ns[ranged], begin)
        named = inner >= 0
        part[named] = self._part_of_text[trace.name[ranged[inner[named]]]]
        part[intervals.locate(*self._recorder, begin) >= 0] = self.names.index(RECORDER)
        return begin, stop, rows[row], part

    def _union(self, rows: np.ndarray) -> intervals.Columns:
        return intervals.merge(self._trace.start_ns[rows], self._trace.end_ns[rows])


def main_thread(trace: Trace) -> int:
    """Lane of the thread that drives the rank: where most annotated time lies, else most launches,
    else most host rows; -1 where there is no host row."""
    is_thread = np.array([not lane.is_device for lane in trace.lanes], bool)
    if not len(trace) or not is_thread.any():
        return -1
    host = is_thread[trace.lane]
    for kinds in ((Kind.RANGE,), (Kind.LAUNCH,), (Kind.OP, Kind.PYTHON)):
        rows = np.flatnonzero(host & np.isin(trace.kind, kinds))
        if len(rows):
            union = np.zeros(len(trace.lanes), np.int64)
            np.add.at(union, trace.lane[rows], trace.end_ns[rows] - trace.start_ns[rows] + 1)
            return int(union.argmax())
    return -1
