"""Which rows of an Nsight Systems export belong to which rank.

A rank is a process that gave a device work. A process that drives several devices (one thread
each, or one thread for all) is as many ranks: each takes the rows of its device and the threads
that launched on it; threads that launched nothing go to the lowest device. A device that got less
than 1 % of what the busiest one of its process got is no rank of its own (a stray context on
device 0, a copy from a peer): its rows stay with the busiest. Where no process gave a device work
(CPU ranks), a rank is a process with ranges, and where some have ranges of this project's runtime,
only those are. Ranks are numbered by their own word (`tpinfer.rank id=1`) where they give it, else
by device, then by process id; CPU ranks by process id, behind the one that says it handed out
tokens, which rank 0 does.
"""

import re
from dataclasses import dataclass

import numpy as np

from ..events import NONE, Kind
from .nsight_rows import Recording
from .nsight_tables import distinct_rows, distinct_values

LEAST_SHARE = 0.01
"""Of the device rows of the busiest, to count as a rank."""
_OWN_RANGE = "tpinfer."
_SAID_RANK = re.compile(r"tpinfer\.rank id=(\d+)")
_RANK_ZERO = ("tpinfer.token", "tpinfer.accept", "tpinfer.admit")


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank of a file."""

    process: int
    """globalPid."""
    device: int = NONE
    """The device it drives; NONE for CPU ranks."""
    is_alone: bool = True
    """The only rank of its process, which then takes all of its rows."""
    is_first: bool = True
    """Takes the threads of its process that launched nothing."""


def find_seats(recording: Recording, gpus: dict[tuple[int, int], int]) -> list[Seat]:
    """The ranks of a file, in order.

    Args: gpus: number of the card behind (pid, device) where the file tells; devices are numbered
    anew in each process that sees only some.
    """
    device = _device_column(recording)
    on_device = recording.rows.kind <= Kind.MEMSET
    if not on_device.any():
        return [Seat(process) for process in _processes_with_ranges(recording)]
    pairs, back = distinct_rows(recording.process[on_device], device[on_device])
    counts = np.bincount(back, minlength=len(pairs))
    most_of: dict[int, int] = {}
    for (process, _), count in zip(pairs, counts.tolist(), strict=True):
        most_of[process] = max(most_of.get(process, 0), count)
    busiest = max(most_of.values())
    kept = [
        (process, number)
        for (process, number), count in zip(pairs, counts.tolist(), strict=True)
        if count >= LEAST_SHARE * most_of[process] and most_of[process] >= LEAST_SHARE * busiest
    ]

    said = _said_ranks(recording, recording.strings.texts())

    def place(pair: tuple[int, int]) -> tuple[int, int, int]:
        pid = (pair[0] >> 24) & 0xFFFFFF
        return said.get(pair[0], 0), gpus.get((pid, pair[1]), pair[1]), pair[0]

    lowest = {process: min(d for p, d in kept if p == process) for process, _ in kept}
    num_devices = {process: sum(p == process for p, _ in kept) for process, _ in kept}
    return [
        Seat(process, number, num_devices[process] == 1, lowest[process] == number)
        for process, number in sorted(kept, key=place)
    ]


def rows_of(recording: Recording, seat: Seat) -> np.ndarray:
    """bool [rows]: the rows of one rank. `rows.launch` is filled already."""
    mine = recording.process == seat.process
    if seat.is_alone:
        return mine
    rows, device = recording.rows, _device_column(recording)
    on_lane = np.array([lane.is_device for lane in recording.lanes] or [False], bool)[rows.lane]
    issued = np.flatnonzero(mine & (rows.launch >= 0))
    users = rows.lane[rows.launch[issued]]
    here = users[device[issued] == seat.device]
    threads = np.isin(rows.lane, here)
    if seat.is_first:
        threads |= ~np.isin(rows.lane, users)
    return mine & np.where(on_lane, device == seat.device, threads)


def left_out(recording: Recording, seats: list[Seat]) -> list[int]:
    """Process ids that recorded ranges or calls and are no rank."""
    told = distinct_values(recording.process)[0].tolist()
    ranks = {seat.process for seat in seats}
    return [(one >> 24) & 0xFFFFFF for one in told if one >= 0 and one not in ranks]


def _device_column(recording: Recording) -> np.ndarray:
    devices = np.array([lane.device for lane in recording.lanes] or [NONE], np.int64)
    return devices[recording.rows.lane]


def _processes_with_ranges(recording: Recording) -> list[int]:
    rows, strings = recording.rows, recording.strings
    is_range = np.isin(rows.kind, [Kind.RANGE, Kind.OP])
    if not is_range.any():
        is_range = rows.kind == Kind.LAUNCH
    texts = strings.texts()
    own = np.array([*(text.startswith(_OWN_RANGE) for text in texts), False], bool)
    if (own[rows.name] & is_range).any():
        is_range &= own[rows.name]
    first = np.array([*(text.startswith(_RANK_ZERO) for text in texts), False], bool)
    zero = set(recording.process[is_range & first[rows.name]].tolist())
    said = _said_ranks(recording, texts)
    found = distinct_values(recording.process[is_range])[0].tolist()
    return sorted(found, key=lambda process: (said.get(process, 0), process not in zero, process))


def _said_ranks(recording: Recording, texts: list[str]) -> dict[int, int]:
    """Rank that a process of this project's runtime says it is."""
    numbers = {
        index: int(found.group(1))
        for index, text in enumerate(texts)
        if (found := _SAID_RANK.match(text))
    }
    rows = np.flatnonzero(np.isin(recording.rows.name, list(numbers)))
    return {
        int(recording.process[row]): numbers[int(recording.rows.name[row])] for row in rows.tolist()
    }
