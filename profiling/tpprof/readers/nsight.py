"""Nsight Systems' SQLite export to one `Trace` a rank; `nsight_split` says what a rank is.

Absolute time is the session's start (TARGET_INFO_SESSION_START_TIME.utcEpochNs) plus the event's
time, less `systemClockNs` where the export has it: there event times are of that clock. The
recording's own environment, logs and command lines are never read.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import TraceError
from ..events import NONE, Device, Kind, Trace, no_collectives
from .assembly import Facts, Rows, assemble, broken_times
from .links import enclosing_op, first_with
from .nsight_rows import Recording, read_rows
from .nsight_split import Seat, find_seats, left_out, rows_of
from .nsight_tables import Tables, distinct_values, open_tables

_GRAPH_REMEDY = "record with nsys profile --cuda-graph-trace=node to see their kernels"


def read_nsight(path: Path, rank: int | None = None) -> list[Trace]:
    """The ranks of one export, in order.

    Args:
        path: a file of `nsys export --type sqlite`.
        rank: of the first (often the only) one; None leaves NONE, for the caller to number.
    Raises TraceError for a file that is damaged, no export, or holds nothing of a rank.
    """
    with open_tables(path) as tables:
        if not any(tables.has(name) for name in ("NVTX_EVENTS", "StringIds", "META_DATA_EXPORT")):
            raise TraceError(
                f"{path} is SQLite, but no export of Nsight Systems: it has no table StringIds; "
                "give a file of nsys export --type sqlite"
            )
        recording = read_rows(tables)
        offset_ns, gpus, devices = _epoch(tables), _gpus_by_process(tables), _devices(tables)
        lost = _num_complaints(tables)
    shared = Facts(rank=NONE, source=str(path), recorder="nsight")
    backwards = recording.rows.end_ns < recording.rows.start_ns
    drop = broken_times(recording.rows, shared)
    damaged_in = recording.process[drop | backwards]
    shared.lose(lost, "Nsight Systems notes {n} times that it lost or dropped events")
    if drop.any():
        kept = np.flatnonzero(~drop)
        recording = replace(
            recording,
            rows=recording.rows.take(kept),
            process=recording.process[kept],
            correlation=recording.correlation[kept],
        )
    _link(recording)
    seats = find_seats(recording, gpus)
    if not seats:
        raise TraceError(
            f"{path} holds no kernels, no ranges and no API calls; record with nsys profile "
            "--trace=cuda,nvtx --cuda-graph-trace=node"
        )
    _tell(recording, seats, shared)
    recording.rows.start_ns += offset_ns
    recording.rows.end_ns += offset_ns
    traces = []
    for index, seat in enumerate(seats):
        facts = replace(
            shared,
            rank=NONE if rank is None else rank + index,
            num_lost=lost + int((damaged_in == seat.process).sum()),
        )
        facts.devices = _devices_of(seat, recording, gpus, devices)
        traces.append(_trace(recording, seat, facts))
    return traces


def _link(recording: Recording) -> None:
    """Launches by (process, correlation id), which repeats across processes; operators by time."""
    rows = recording.rows
    device = np.flatnonzero((rows.kind <= Kind.MEMSET) & (recording.correlation >= 0))
    launches = np.flatnonzero((rows.kind == Kind.LAUNCH) & (recording.correlation >= 0))
    number = distinct_values(np.where(recording.process >= 0, recording.process >> 24, NONE))[1]
    key = (number << 40) | np.maximum(recording.correlation, 0)
    order = launches[np.lexsort((rows.start_ns[launches], key[launches]))]
    rows.launch[device] = first_with(key[order], order, key[device])
    ops = np.flatnonzero(rows.kind == Kind.OP)
    rows.op[launches] = enclosing_op(rows, ops, launches)
    in_graph = recording.strings.holding("graphlaunch")[rows.name[rows.launch[device]]]
    told = (rows.launch[device] >= 0) & ~in_graph
    rows.op[device] = np.where(told, rows.op[rows.launch[device]], NONE)


def _tell(recording: Recording, seats: list[Seat], facts: Facts) -> None:
    source, rows = facts.source, recording.rows
    calls = recording.strings.holding("graphlaunch")[rows.name] & (rows.kind == Kind.LAUNCH)
    if recording.num_whole_graphs:
        facts.warnings.append(
            f"{source}: {recording.num_whole_graphs} CUDA graph replays were recorded as one row "
            f"each; {_GRAPH_REMEDY}"
        )
    elif calls.any() and not np.isin(np.flatnonzero(calls), rows.launch).any():
        facts.warnings.append(
            f"{source}: {int(calls.sum())} CUDA graph replays were recorded without their "
            f"kernels; {_GRAPH_REMEDY}"
        )
    if recording.num_open:
        facts.warnings.append(
            f"{source}: {recording.num_open} ranges were open when the recording ended; they "
            "end with it"
        )
    pids = left_out(recording, seats)
    if pids:
        listed = ", ".join(map(str, pids[:8])) + (", ..." if len(pids) > 8 else "")
        facts.warnings.append(
            f"{source}: processes that are no rank (no device work, or none of our ranges) were "
            f"left out: {listed}"
        )


def _trace(recording: Recording, seat: Seat, facts: Facts) -> Trace:
    mine = np.flatnonzero(rows_of(recording, seat))
    place = np.full(len(recording.rows), NONE, np.int64)
    place[mine] = np.arange(len(mine))
    rows: Rows = recording.rows.take(mine)
    rows.launch = np.where(rows.launch >= 0, place[rows.launch], NONE).astype(np.int32)
    rows.op = np.where(rows.op >= 0, place[rows.op], NONE).astype(np.int32)
    texts = recording.strings.texts()
    return assemble(rows, texts, recording.lanes, no_collectives(), facts)


def _epoch(tables: Tables) -> int:
    """What to add to the file's times; 0 where they are absolute already, or nobody knows."""
    settings = tables.settings("META_DATA_EXPORT")
    there = tables.columns("TARGET_INFO_SESSION_START_TIME")
    if settings.get("EXPORT_PARAM_TIME_NORMALIZE") == "true" or "utcEpochNs" not in there:
        return 0
    clock = "systemClockNs" if "systemClockNs" in there else "0"
    query = f"SELECT utcEpochNs, {clock} FROM TARGET_INFO_SESSION_START_TIME LIMIT 1"
    for epoch, zero in tables.rows(query):
        if isinstance(epoch, int) and 0 <= epoch < 4 * 10**18:
            return epoch - (zero if isinstance(zero, int) and 0 <= zero < 4 * 10**18 else 0)
    return 0


def _gpus_by_process(tables: Tables) -> dict[tuple[int, int], int]:
    """(pid, device number in it) -> card."""
    if not {"gpuId", "cudaId", "pid"} <= tables.columns("TARGET_INFO_CUDA_DEVICE"):
        return {}
    found = tables.rows("SELECT pid, cudaId, gpuId FROM TARGET_INFO_CUDA_DEVICE")
    return {
        (pid, device): card
        for pid, device, card in found
        if isinstance(pid, int) and isinstance(device, int) and isinstance(card, int)
    }


def _devices(tables: Tables) -> dict[int, Device]:
    """By card."""
    there = tables.columns("TARGET_INFO_GPU")
    if "id" not in there:
        return {}
    wanted = ["name", "smCount", "totalMemory", "memoryBandwidth", "l2CacheSize"]
    listed = ", ".join(name if name in there else "NULL" for name in wanted)
    devices = {}
    for card, name, *numbers in tables.rows(f"SELECT id, {listed} FROM TARGET_INFO_GPU"):
        sizes = [n if isinstance(n, int | float) and 0 < n < 2**62 else 0 for n in numbers]
        if isinstance(card, int):
            devices[card] = Device(
                name=str(name or ""),
                num_sms=int(sizes[0]),
                memory_bytes=int(sizes[1]),
                memory_bytes_per_s=float(sizes[2]),
                l2_bytes=int(sizes[3]),
            )
    return devices


def _devices_of(
    seat: Seat,
    recording: Recording,
    gpus: dict[tuple[int, int], int],
    devices: dict[int, Device],
) -> dict[int, Device]:
    """Cards by the numbers that this rank's rows give them; of one kind of card, any will do."""
    pid = (seat.process >> 24) & 0xFFFFFF
    used = {lane.device for lane in recording.lanes if lane.is_device and lane.pid == pid}
    kinds = set(devices.values())
    found = dict(devices)
    for number in used:
        card = gpus.get((pid, number), number)
        if card in devices:
            found[number] = devices[card]
        elif len(kinds) == 1:
            found[number] = next(iter(kinds))
    return found


def _num_complaints(tables: Tables) -> int:
    """Diagnostics that speak of lost events. Their text is not shown: it may quote anything."""
    if "text" not in tables.columns("DIAGNOSTIC_EVENT"):
        return 0
    query = (
        "SELECT COUNT(*) FROM DIAGNOSTIC_EVENT WHERE text LIKE '%lost%' OR text LIKE '%dropped%' "
        "OR text LIKE '%not all%'"
    )
    for (count,) in tables.rows(query):
        return int(count)
    return 0
