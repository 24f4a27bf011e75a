"""Writes a simulated run as Kineto does: one JSON file a rank, times in us with three decimals."""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.traces.kernels import DeviceWork
from tests.traces.names import (
    call_name,
    kernel_name,
    moment_name,
    operator_name,
    range_name,
    step_name,
)
from tests.traces.scenario import NUM_SMS
from tests.traces.simulate import DeviceRow, HostCall, HostRange, RankRun, Run

SECRET = "sk-live-51H8xTopSecretValue"
"""Stands in places where recorders put the environment; must reach no output."""
EPOCH_NS = 1_775_078_550_000_000_000
RELATIVE_NS = 4_458_676_000_000_000
"""How far before the run the recorder's base lies: such are the times in real files."""
ENDLESS_NS = 9_000_000_000


@dataclass(frozen=True, slots=True)
class KinetoStyle:
    """What differs between files of one run."""

    engine: str = "vllm"
    has_shapes: bool = True
    collective_args: str = "seq"
    """`seq`, `plain` (older: no `Seq`), `none` (the engine calls NCCL itself)."""
    has_graph_ids: bool = False
    has_modules: bool = False
    has_coordinator: bool = False
    """vLLM's extra file of a process that is no rank."""
    is_detailed: bool = False
    """vLLM's long step annotation."""
    is_compressed: bool = True
    has_calls: bool = True
    """Without them nobody knows when anything was launched."""
    has_fractions: bool = True
    """Old recorders wrote absolute time in whole us."""
    shuffle_seed: int | None = None
    """Order of events in the file; None for recorders' own."""


def file_name(style: KinetoStyle, rank: int) -> str:
    """As the engine names a rank's file."""
    name = {
        "vllm": f"dp0_pp0_tp{rank}_dcp0_ep{rank}_rank{rank}.1775078550123456789.pt.trace.json",
        "sglang": f"1775078550.25-TP-{rank}-DP-0-PP-0-EP-0.trace.json",
        "tpinfer": f"rank{rank}.trace.json",
    }[style.engine]
    return name + (".gz" if style.is_compressed else "")


def write_kineto(
    run: Run,
    directory: Path,
    style: KinetoStyle | None = None,
    ranks: Sequence[int] | None = None,
) -> list[Path]:
    """Write the files of `ranks` (None: all) into `directory`, which is made; their paths."""
    style = style or KinetoStyle()
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for rank in range(run.scenario.num_ranks) if ranks is None else ranks:
        path = directory / file_name(style, rank)
        _write(path, _RankFile(run, run.ranks[rank], style).text())
        paths.append(path)
    if style.has_coordinator:
        name = "host-17.async_llm.1775078550123456789.pt.trace.json.gz"
        event = {"ph": "X", "cat": "cpu_op", "name": "aten::empty", "pid": 9, "tid": 9}
        body = {"schemaVersion": 1, "traceEvents": [{**event, "ts": 12.5, "dur": 3.25}]}
        _write(directory / name, json.dumps(body))
    return paths


def _write(path: Path, text: str) -> None:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), compresslevel=1))
    else:
        path.write_text(text)


def microseconds(ns: int) -> str:
    """ns as the us of a file, with all three decimals."""
    sign = "-" if ns < 0 else ""
    return f"{sign}{abs(ns) // 1000}.{abs(ns) % 1000:03d}"


class _RankFile:
    """Builds one rank's file."""

    def __init__(self, run: Run, rank: RankRun, style: KinetoStyle) -> None:
        self.run, self.rank, self.style = run, rank, style
        self.pid = 4000 + 17 * rank.rank
        # Every process takes its own base; only base + ts means anything.
        self.base_ns = EPOCH_NS - RELATIVE_NS - 1_000_000_000 * rank.rank
        self.local = rank.clock.local
        self._external = {id(one): 70 + 3 * i for i, one in enumerate(rank.ranges)}
        self._operators = {id(o.call): o for o in rank.ranges if o.kind == "operator"}

    def text(self) -> str:
        """The whole file."""
        calls = self._calls() if self.style.has_calls else ()
        events = [*self._host(), *calls, *self._device(), *self._device_ranges()]
        if self.style.shuffle_seed is not None:
            Random(self.style.shuffle_seed).shuffle(events)
        head = json.dumps(self._head(), indent=1)[:-2]
        base = f'"baseTimeNanoseconds": {self.base_ns}, ' if self.style.has_fractions else ""
        tail = f'{base}"traceName": "{self.rank.rank}"'
        return f'{head},\n"traceEvents": [\n' + ",\n".join(events) + f"\n], {tail}\n}}\n"

    def _head(self) -> dict[str, object]:
        scenario = self.run.scenario
        ranks = list(range(scenario.num_ranks))
        place: dict[str, object] = {
            "backend": "nccl",
            "rank": self.rank.rank,
            "world_size": len(ranks),
        }
        if self.style.engine != "tpinfer":
            mine = scenario.group(self.rank.rank)
            groups = [
                {
                    "pg_name": name,
                    "pg_desc": description,
                    "backend_config": "cuda:nccl",
                    "pg_size": len(members),
                    "ranks": str(members) if self.rank.rank % 2 else members,
                }
                for name, description, members in (
                    ("0", "default_pg", ranks),
                    (self._group_name(), "tp", mine),
                )
            ]
            if len(mine) == len(ranks):
                groups.pop()
            place |= {"pg_count": len(groups), "pg_config": groups, "nccl_version": "unknown"}
        device = {"id": self.rank.rank, "name": "NVIDIA H100 80GB HBM3", "numSms": NUM_SMS}
        return {
            "schemaVersion": 1,
            "deviceProperties": [{**device, "totalGlobalMem": 85_029_158_912}],
            "cupti_version": 28,
            "cuda_runtime_version": 12090,
            "distributedInfo": place,
            "env": {"HF_TOKEN": SECRET, "PATH": f"/usr/bin:/home/{SECRET}"},
            "record_shapes": int(self.style.has_shapes),
            "trace_id": "A1B2",
            "displayTimeUnit": "ms",
        }

    def _event(self, category: str, name: str, pid: int, tid: int, times: tuple[int, int]) -> str:
        """The opening of a complete event; arguments and the brace are the caller's."""
        begin, end = (EPOCH_NS + self.local(at) for at in times)
        at, ns = self._ts(begin), microseconds(end - begin)
        if not self.style.has_fractions:
            ns = str(end // 1000 - begin // 1000)
        return (
            f'{{"ph": "X", "cat": "{category}", "name": {json.dumps(name)}, "pid": {pid}, '
            f'"tid": {tid}, "ts": {at}, "dur": {ns}'
        )

    def _ts(self, absolute_ns: int) -> str:
        if not self.style.has_fractions:
            return str(absolute_ns // 1000)
        return microseconds(absolute_ns - self.base_ns)

    def _on_thread(
        self, category: str, name: str, times: tuple[int, int], args: Mapping[str, object]
    ) -> str:
        begun = self._event(category, name, self.pid, self.pid, times)
        return f'{begun}, "args": {json.dumps(args)}}}'

    def _host(self) -> Iterator[str]:
        process = {"name": f"VLLM::Worker_TP{self.rank.rank}"}
        yield json.dumps(
            {"ph": "M", "name": "process_name", "pid": self.pid, "tid": 0, "ts": 0, "args": process}
        )
        for one in self.rank.ranges:
            yield from self._range(one)
        for moment in self.rank.moments:
            name = moment_name(self.style.engine, moment.kind, moment.index)
            if name:
                times = (moment.at_ns, moment.at_ns)
                yield self._on_thread("user_annotation", name, times, {"Ev Idx": moment.index})

    def _range(self, one: HostRange) -> Iterator[str]:
        times, number = (one.start_ns, one.end_ns), self._external[id(one)]
        args: dict[str, object] = {"External id": number, "Record function id": 0}
        engine = self.style.engine
        if one.kind == "step":
            name = step_name(engine, self.run.scenario, one, self.style.is_detailed)
            yield self._on_thread("user_annotation", name, times, args)
        elif one.kind == "layer" and self.style.has_modules:
            name = f"nn.Module: LlamaDecoderLayer_{one.label}"
            ids = {"Python id": number, "Python parent id": 1, "Python module id": number}
            yield self._on_thread("python_function", name, times, ids)
        elif one.kind == "operator" and one.work is not None:
            yield from self._operator(one, one.work, args)
        elif range_name(engine, one):
            yield self._on_thread("user_annotation", range_name(engine, one), times, args)

    def _operator(self, one: HostRange, work: DeviceWork, args: dict[str, object]) -> Iterator[str]:
        """The operator that launches, and for products the one that calls it."""
        times = (one.start_ns + 50, one.end_ns - 50)
        if work.product:
            m, k, n = work.product
            dims = {"aten::linear": [[m, k], [n, k], []], "aten::mm": [[m, k], [k, n]]}
            outer: dict[str, object] = {"External id": self._external[id(one)] + 1}
            if self.style.has_shapes:
                kinds = ["c10::BFloat16", "c10::BFloat16"]
                outer |= {"Input Dims": dims["aten::linear"], "Input type": [*kinds, ""]}
                args |= {"Input Dims": dims["aten::mm"], "Input type": kinds}
                args |= {"Input Strides": [[k, 1], [1, k]], "Concrete Inputs": ["", ""]}
            yield self._on_thread("cpu_op", "aten::linear", (one.start_ns, one.end_ns), outer)
        name = operator_name(self.style.engine, work)
        if name == "record_param_comms":
            if self.style.collective_args == "none":
                name = f"{self.style.engine}::{work.role}"
            else:
                args |= self._collective_args(self._row_of(one))
        yield self._on_thread("cpu_op", name, times, args)

    def _row_of(self, operator: HostRange) -> DeviceRow:
        return next(row for row in self.rank.rows if row.call is operator.call)

    def _group_name(self) -> str:
        """Of the group that collectives run in: the default one, or one of several."""
        scenario = self.run.scenario
        first = scenario.group(self.rank.rank)[0]
        return str(3 + first // scenario.tp) if scenario.group_size else "0"

    def _collective_args(self, row: DeviceRow) -> dict[str, object]:
        members = self.run.scenario.group(row.rank)
        elements = row.work.num_bytes // 2
        gathers = row.work.collective == "allgather"
        args: dict[str, object] = {
            "Collective name": "_allgather_base" if gathers else row.work.collective,
            "In msg nelems": elements // len(members) if gathers else elements,
            "Out msg nelems": elements,
            "Group size": len(members),
            "dtype": "BFloat16",
            "In split size": "[]",
            "Out split size": "[]",
            "Process Group Name": self._group_name(),
            "Process Group Description": "tp" if self.run.scenario.group_size else "default_pg",
            "Process Group Ranks": str(members),
        }
        if self.style.collective_args == "seq":
            args["Seq"] = 900 + row.meeting
        return args

    def _calls(self) -> Iterator[str]:
        for call in self.rank.calls:
            operator = self._operators.get(id(call))
            args: dict[str, object] = {"cbid": 211, "correlation": call.correlation}
            if operator is not None:
                args["External id"] = self._external[id(operator)]
            times = (call.start_ns, call.end_ns)
            yield self._on_thread("cuda_runtime", call_name(call.kind), times, args)
            if call.kind in ("wait", "synchronize"):
                yield self._sync(call)

    def _sync(self, call: HostCall) -> str:
        """Kineto draws what the host asked of a stream on the stream's own line."""
        kind = "Stream Wait Event" if call.kind == "wait" else "Stream Synchronize"
        args = {
            "cuda_sync_kind": kind,
            "stream": call.stream,
            "correlation": call.correlation,
            "device": self.rank.rank,
            "context": 1,
        }
        if call.kind == "wait":
            record = next(c for c in self.rank.calls if c.event == call.event)
            args |= {"wait_on_stream": record.stream, "wait_on_cuda_event_id": call.event}
            args["wait_on_cuda_event_record_corr_id"] = record.correlation
        times = (call.start_ns + 100, call.end_ns - 100)
        begun = self._event("cuda_sync", kind, self.rank.rank, call.stream, times)
        return f'{begun}, "args": {json.dumps(args)}}}'

    def _device(self) -> Iterator[str]:
        seen: set[int] = set()
        for row in self.rank.rows:
            if row.damage is not None and row.damage.kind == "lost":
                continue
            times = (row.start_ns, row.end_ns)
            if row.damage is not None and row.damage.kind == "backwards":
                times = (row.end_ns, row.start_ns)
            if row.damage is not None and row.damage.kind == "endless":
                times = (row.start_ns, row.start_ns + ENDLESS_NS)
            category = "gpu_memcpy" if row.work.is_copy else "kernel"
            name = kernel_name(self.style.engine, row.work)
            begun = self._event(category, name, self.rank.rank, row.work.stream, times)
            if row.damage is not None and row.damage.kind == "zero":
                begun = begun.partition(', "ts"')[0] + ', "ts": 0, "dur": 0'
            yield f'{begun}, "args": {json.dumps(self._row_args(row))}}}'
            if self.style.has_calls and id(row.call) not in seen:
                seen.add(id(row.call))
                yield from self._arrow(row)

    def _arrow(self, row: DeviceRow) -> Iterator[str]:
        """From the call to its first row."""
        ends = [("s", self.pid, self.pid, row.call.start_ns)]
        ends.append(("f", self.rank.rank, row.work.stream, row.start_ns))
        for phase, pid, tid, at in ends:
            ts = self._ts(EPOCH_NS + self.local(at))
            bind = ', "bp": "e"' if phase == "f" else ""
            yield (
                f'{{"ph": "{phase}", "id": {row.call.correlation}, "pid": {pid}, "tid": {tid}, '
                f'"ts": {ts}, "cat": "ac2g", "name": "ac2g"{bind}}}'
            )

    def _row_args(self, row: DeviceRow) -> dict[str, object]:
        work, operator = row.work, self._operators.get(id(row.call))
        args: dict[str, object] = {
            "queued": 0,
            "device": self.rank.rank,
            "context": 1,
            "stream": work.stream,
            "correlation": row.call.correlation,
        }
        if row.node < 0:
            args["External id"] = self._external[id(operator)] if operator else 0
        if work.is_copy:
            return args | {"bytes": work.num_bytes, "memory bandwidth (GB/s)": 0.5}
        args |= {"grid": [work.num_blocks, 1, 1], "block": [256, 1, 1], "warps per SM": "inf"}
        args |= {"registers per thread": 168, "shared memory": 0, "blocks per SM": 1.5}
        if row.node >= 0 and self.style.has_graph_ids:
            args |= {"graph id": 3, "graph node id": 100 + row.node}
        is_described = (
            operator is not None
            and self.style.collective_args != "none"
            and operator_name(self.style.engine, work) == "record_param_comms"
        )
        if is_described:
            args |= self._collective_args(row)
        return args

    def _device_ranges(self) -> Iterator[str]:
        """Projections of steps on streams: from the first to the last row launched in them."""
        for step in self.rank.steps():
            name = step_name(self.style.engine, self.run.scenario, step, self.style.is_detailed)
            number = int(step.label.split()[0])
            for stream in sorted({row.work.stream for row in self.rank.rows}):
                inside = [
                    row
                    for row in self.rank.rows
                    if row.step == number and row.work.stream == stream and row.damage is None
                ]
                if not inside:
                    continue
                times = (min(r.start_ns for r in inside), max(r.end_ns for r in inside))
                begun = self._event("gpu_user_annotation", name, self.rank.rank, stream, times)
                yield f'{begun}, "args": {{"External id": {self._external[id(step)]}}}}}'
