"""From a trace to its work, with the verdict on each piece."""

import re
from collections.abc import Sequence

import numpy as np

from tpinfer.config.ceilings import Ceilings
from tpprof.classify.executions import OP_PREFIX, executions
from tpprof.classify.manifest import COLLECTIVES, Manifest
from tpprof.classify.prices import (
    CostSource,
    Entries,
    Prices,
    price_by_manifest,
    price_by_roles,
    price_by_shapes,
)
from tpprof.classify.rules import Verdict, judge
from tpprof.classify.steps import Step, find_steps, step_at
from tpprof.classify.verdicts import judge_all
from tpprof.classify.work import Work, WorkKind
from tpprof.events import NONE, Kind, Trace
from tpprof.intervals import innermost
from tpprof.results import LEAVES

_LAYER = re.compile(r"(?:^|[._ ])(?:layers?|h|blocks?)[._](\d+)(?:\b|_)|DecoderLayer_(\d+)")
_ON_HOST = "tp"
"""Group of the collectives that our CPU ranks make."""


def classify_trace(
    trace: Trace, ceilings: Ceilings | None = None, costs: CostSource | None = None
) -> Work:
    """Judge all work of one rank. Without ceilings, those of the manifest are taken."""
    costs = costs or CostSource()
    manifest = costs.manifest
    rows, is_cpu = executions(trace)
    order = np.lexsort((-trace.end_ns[rows], trace.lane[rows], trace.start_ns[rows]))
    rows = rows[order]
    verdicts = _verdicts(trace, rows)
    steps = find_steps(trace)
    entries = _entries(trace, rows, is_cpu, steps)
    entries.kind = _kinds(trace, entries, verdicts, manifest, is_cpu)
    prices = Prices(len(rows))
    prices.key = _keys(trace, entries)
    prices.layer = _layers(trace, entries, prices.key)
    if manifest is not None:
        price_by_manifest(prices, entries, manifest, [step.sums for step in steps])
    price_by_shapes(prices, entries, trace)
    if costs.spec is not None:
        price_by_roles(prices, entries, trace.name[rows], verdicts, steps, costs)
    if ceilings is None and manifest is not None:
        ceilings = manifest.ceilings
    return _assemble(trace, entries, prices, verdicts, steps, ceilings, manifest, is_cpu)


def _verdicts(trace: Trace, rows: np.ndarray) -> list[Verdict]:
    names, which = np.unique(trace.name[rows], return_inverse=True)
    found = judge([trace.strings[name] for name in names.tolist()])
    return [found[i] for i in which.tolist()]


def _entries(trace: Trace, rows: np.ndarray, is_cpu: bool, steps: Sequence[Step]) -> Entries:
    start, end = trace.start_ns[rows], trace.end_ns[rows]
    launch = trace.launch[rows]
    host_lane = trace.lane[rows].astype(np.int64)
    moment = start.copy()
    if not is_cpu:
        has = launch >= 0
        moment[has] = trace.start_ns[launch[has]]
        host_lane[has] = trace.lane[launch[has]]
        op = trace.op[rows].astype(np.int64)
        borrowed = has & (op < 0)
        op[borrowed] = trace.op[launch[borrowed]]
        is_graph = _is_graph_launch(trace)
        op[has & is_graph[np.maximum(launch, 0)]] = NONE
    else:
        op = np.where(trace.kind[rows] == Kind.OP, rows, NONE)
    op_id, unit = _op_ids(trace, rows, is_cpu, host_lane, moment)
    kind = np.full(len(rows), WorkKind.COMPUTE, np.int8)
    place = step_at(list(steps), moment)
    return Entries(rows, start, end, kind, place, op, op_id, unit)


def _is_graph_launch(trace: Trace) -> np.ndarray:
    """bool [rows]."""
    names = np.array(["GraphLaunch" in text for text in trace.strings], bool)
    if not len(trace):
        return np.zeros(0, bool)
    return names[trace.name] & (trace.kind == Kind.LAUNCH)


def _op_ids(
    trace: Trace, rows: np.ndarray, is_cpu: bool, lane: np.ndarray, moment: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """tpinfer op of each entry: itself, or the innermost range that its launch lies in."""
    named = np.array([text.startswith(OP_PREFIX) for text in trace.strings], bool)
    unit = -1 - np.arange(len(rows), dtype=np.int64)
    if not named.any():
        return [""] * len(rows), unit
    ranges = np.flatnonzero((trace.kind == Kind.RANGE) & named[trace.name])
    around = _around(trace, ranges, rows, is_cpu, lane, moment)
    unit = np.where(around >= 0, around, unit)
    cut = len(OP_PREFIX)
    texts = [
        trace.strings[trace.name[row]][cut:].strip() if row >= 0 else "" for row in around.tolist()
    ]
    return texts, unit


def _around(
    trace: Trace,
    ranges: np.ndarray,
    rows: np.ndarray,
    is_cpu: bool,
    lane: np.ndarray,
    moment: np.ndarray,
) -> np.ndarray:
    """int64 [n]: innermost of `ranges` on an entry's host lane at its moment; -1 for none."""
    found = np.full(len(rows), NONE, np.int64)
    if is_cpu:
        own = np.isin(rows, ranges)
        found[own] = rows[own]
        if own.all():
            return found
    for one in np.unique(trace.lane[ranges]).tolist():
        here = ranges[trace.lane[ranges] == one]
        mine = np.flatnonzero((lane == one) & (found < 0))
        if not len(mine):
            continue
        at = innermost(trace.start_ns[here], trace.end_ns[here], moment[mine])
        found[mine] = np.where(at >= 0, here[at], NONE)
    return found


def _kinds(
    trace: Trace,
    entries: Entries,
    verdicts: Sequence[Verdict],
    manifest: Manifest | None,
    is_cpu: bool,
) -> np.ndarray:
    kind = np.array([verdict.kind for verdict in verdicts], np.int8).reshape(len(entries))
    if is_cpu:
        kind[:] = WorkKind.COMPUTE  # operators' names follow other rules than kernels'
        if manifest is not None:
            waits = {op for op, i in manifest.place.items() if manifest.kinds[i] in COLLECTIVES}
            kind[[op in waits for op in entries.op_id]] = WorkKind.COMM
    copies = np.isin(trace.kind[entries.row], (Kind.COPY, Kind.MEMSET))
    kind[copies] = WorkKind.COPY
    known = np.isin(entries.row, trace.collectives.row)
    kind[known & (kind == WorkKind.COMPUTE)] = WorkKind.COMM
    return kind


def _keys(trace: Trace, entries: Entries) -> list[str]:
    """Op id, else the framework operator it was launched for."""
    return [
        op_id or (trace.strings[trace.name[op]] if op >= 0 else "")
        for op_id, op in zip(entries.op_id, entries.op.tolist(), strict=True)
    ]


def _layers(trace: Trace, entries: Entries, keys: Sequence[str]) -> np.ndarray:
    """Layer by op id, else by the innermost module or range whose name has one."""
    by_key = {key: _layer_in(key) for key in dict.fromkeys(keys)}
    layer = np.array([by_key[key] for key in keys], np.int32).reshape(len(keys))
    if (layer >= 0).all():
        return layer
    numbers = np.array([_layer_in(text) for text in trace.strings], np.int32)
    spans = (trace.kind == Kind.RANGE) | (trace.kind == Kind.PYTHON)
    ranges = np.flatnonzero(spans & (numbers[trace.name] >= 0) if len(trace) else [])
    if not len(ranges):
        return layer
    launch = trace.launch[entries.row]
    has = launch >= 0
    lane = np.where(has, trace.lane[launch], trace.lane[entries.row])
    moment = np.where(has, trace.start_ns[launch], entries.start_ns)
    around = _around(trace, ranges, entries.row, False, lane, moment)
    found = np.where(around >= 0, numbers[trace.name[around]], NONE)
    return np.where(layer >= 0, layer, found).astype(np.int32)


def _layer_in(text: str) -> int:
    found = _LAYER.search(text)
    return int(found.group(1) or found.group(2)) if found else NONE


def _assemble(
    trace: Trace,
    entries: Entries,
    prices: Prices,
    verdicts: Sequence[Verdict],
    steps: Sequence[Step],
    ceilings: Ceilings | None,
    manifest: Manifest | None,
    is_cpu: bool,
) -> Work:
    table = _Texts()
    kind = entries.kind
    comm = np.isin(kind, (WorkKind.COMM, WorkKind.FUSED_COMM))
    communication = _communication(trace, entries, verdicts, manifest, comm, table)
    _bytes_on_wire(prices, communication)
    found = judge_all(
        prices,
        entries.end_ns - entries.start_ns,
        comm,
        _has_small_grid(trace, entries),
        _working_sets(entries, steps, manifest),
        ceilings,
    )
    leaf = found.leaf
    leaf[kind == WorkKind.COPY] = LEAVES.index("copy")
    leaf[kind == WorkKind.COMM] = LEAVES.index("comm_unsplit")
    leaf[kind == WorkKind.FUSED_COMM] = LEAVES.index("comm_unsplit")
    numbers = np.array([step.number for step in steps] + [NONE], np.int64)
    key = np.array([table.number(text) if text else NONE for text in prices.key], np.int32)
    return Work(
        row=entries.row.astype(np.int64),
        start_ns=entries.start_ns,
        end_ns=entries.end_ns,
        lane=trace.lane[entries.row].astype(np.int32),
        kind=kind,
        leaf=leaf,
        balanced=found.balanced,
        floor_ns=found.floor_ns,
        flops=prices.flops,
        num_bytes=prices.num_bytes,
        key=key.reshape(len(entries)),
        layer=prices.layer,
        step=numbers[entries.step],
        keys=table.texts,
        comm_op=communication["op"],
        comm_bytes=communication["bytes"],
        comm_group=communication["group"],
        comm_size=communication["size"],
        comm_sequence=communication["sequence"],
        ceilings_ns=found.ceilings_ns,
        is_cpu=is_cpu,
        warnings=(*prices.warnings, *_warnings(trace, entries, prices, ceilings)),
    )


class _Texts:
    """Numbers for texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """Its index in `texts`."""
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]


def _communication(
    trace: Trace,
    entries: Entries,
    verdicts: Sequence[Verdict],
    manifest: Manifest | None,
    comm: np.ndarray,
    table: _Texts,
) -> dict[str, np.ndarray]:
    """Columns about collectives: from the recorder where it tells, else from names."""
    count = len(entries)
    columns = {
        "op": np.full(count, NONE, np.int32),
        "bytes": np.full(count, NONE, np.int64),
        "group": np.full(count, NONE, np.int32),
        "size": np.full(count, NONE, np.int32),
        "sequence": np.full(count, NONE, np.int64),
    }
    for i in np.flatnonzero(comm).tolist():
        columns["op"][i] = table.number(_op_of(entries, verdicts, manifest, i))
        if manifest is not None and entries.op_id[i] in manifest.place:
            columns["group"][i], columns["size"][i] = table.number(_ON_HOST), manifest.tp
    told = trace.collectives
    place = {row: i for i, row in enumerate(told.row.tolist())}
    for i, row in enumerate(entries.row.tolist()):
        at = place.get(row)
        if at is None or not comm[i]:
            continue
        columns["op"][i] = table.number(trace.strings[told.op[at]])
        columns["bytes"][i] = told.num_bytes[at]
        columns["size"][i] = told.group_size[at]
        columns["sequence"][i] = told.sequence[at]
        if told.group[at] >= 0:
            columns["group"][i] = table.number(trace.strings[told.group[at]])
    return columns


def _op_of(
    entries: Entries, verdicts: Sequence[Verdict], manifest: Manifest | None, entry: int
) -> str:
    if manifest is not None and (at := manifest.place.get(entries.op_id[entry])) is not None:
        return COLLECTIVES.get(manifest.kinds[at], "other")
    return verdicts[entry].op or "other"


def _bytes_on_wire(prices: Prices, communication: dict[str, np.ndarray]) -> None:
    """The message of an all-reduce from what its formula says is sent, and the other way round:
    sent = 2 (p - 1) / p of the message (Patarasuk and Yuan 2009)."""
    size = np.maximum(communication["size"], 2)
    share = 2 * (size - 1) / size
    message = communication["bytes"]
    from_price = (message < 0) & (prices.num_sent > 0) & (communication["op"] >= 0)
    message[from_price] = np.rint(prices.num_sent / share)[from_price]
    from_message = (prices.num_sent < 0) & (message >= 0)
    prices.num_sent[from_message] = np.rint(message * share)[from_message]


def _has_small_grid(trace: Trace, entries: Entries) -> np.ndarray:
    """bool [n]: fewer blocks than the device has processors."""
    blocks = trace.num_blocks[entries.row]
    processors = np.array(
        [trace.devices[lane.device].num_sms if lane.device in trace.devices else 0
         for lane in trace.lanes] or [0]
    )[trace.lane[entries.row] if len(entries) else []]  # fmt: skip
    return (blocks >= 0) & (blocks < processors)


def _working_sets(entries: Entries, steps: Sequence[Step], manifest: Manifest | None) -> np.ndarray:
    """int64 [n]; -1 without a manifest: foreign models are taken to exceed every cache."""
    if manifest is None or not steps:
        return np.full(len(entries), NONE, np.int64)
    sizes = [manifest.working_set_bytes(step.sums) for step in steps]
    return np.array([*sizes, NONE], np.int64)[entries.step]


def _warnings(
    trace: Trace, entries: Entries, prices: Prices, ceilings: Ceilings | None
) -> list[str]:
    if not len(entries):
        return []
    told = []
    if ceilings is None:
        told.append(
            "no ceilings are known, so no kernel is called compute- or memory-bound; pass "
            "--topology FILE or --device NAME"
        )
    length = entries.end_ns - entries.start_ns
    compute = entries.kind == WorkKind.COMPUTE
    dark = compute & (prices.flops < 0)
    share = length[dark].sum() / max(int(length[compute].sum()), 1)
    if share > 0.5:
        told.append(
            f"rank {trace.rank}: {100 * share:.0f} % of kernel time has no model of its cost; "
            "record shapes, or pass --model config.json --tp N"
        )
    return told
