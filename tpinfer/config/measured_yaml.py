"""The measured layer as YAML (`x.measured.yaml` beside `x.yaml`): its reader and its writer.

What is written reads back as the same numbers, to the last bit.

    version: 1
    topology: box
    date: 2026-11-25T19:00:00Z
    driver: "570.86.15"                     # left out without a GPU
    versions: {tpinfer: 0.1.0, torch: 2.11.0, nccl: 2.29.3}
    devices:
      - host: box
        ids: [0, 1]
        sharing: 1                          # ranks at it at once
        memory:
          - {level: L2, working_set: 8MB, rate: 4TB/s}
          - {level: HBM, working_set: 1GB, rate: 700GB/s, capacity: 46GB}
        gemm:
          - {dtype: bfloat16, rows: 16, columns: 4096, inner: 4096, rate: 12TFLOPS}
        ops:                                # in steps of the runtime
          - {kind: linear, dtype: bfloat16, floor: 5us, rates: {1: 2TFLOPS, 16: 30TFLOPS},
             error: 0.02}
          - {kind: attention, dtype: bfloat16, floor: 5us, row: 100ns, bytes: 2TB/s,
             flops: 200TFLOPS, error: 0.1}
        floors: {eager: 4us, graph: 1.5us}
        copies:
          host_to_device: {rate: 25GB/s, latency: 8us}
        clocks: {compute_mhz: 2370, memory_mhz: 9001, most_compute_mhz: 2520,
                 most_memory_mhz: 9001, throttled_by: [sw_power_cap]}
    groups:
      - ranks: [box/0, box/1]
        collectives:
          - {op: all_reduce, by: nccl, graph: false, a: 4us, b: 3us, B1: 9GB/s, c: 30us, d: 1us,
             B2: 13GB/s, smallest: 1KiB, largest: 64MiB, error: 0.08, points: {1KiB: 7us}}
        ops:                                # in steps of the runtime
          - {kind: reduce, dtype: bfloat16, floor: 9us, bytes: 9GB/s, error: 0.1}
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from tpinfer.config.catalogue import read_dtype
from tpinfer.config.measured import (
    COLLECTIVES,
    OP_KINDS,
    Clocks,
    CollectiveFit,
    Copy,
    DeviceMeasurement,
    GemmRate,
    GroupMeasurement,
    HostTime,
    Measurement,
    MemoryRead,
    OpTime,
)
from tpinfer.config.strict_yaml import Entry, parse_yaml, quoted, read_text
from tpinfer.config.units import exact_flops, exact_rate, exact_size, exact_time

MEMORY_LEVELS = ("L1", "L2", "L3", "DRAM", "HBM")
_CLOCKS = ("compute_mhz", "memory_mhz", "most_compute_mhz", "most_memory_mhz")
_COPIES = ("host_to_device", "device_to_host", "device_to_device", "host_to_host")


def measured_path(topology_file: Path) -> Path:
    """`x.measured.yaml` beside `x.yaml`."""
    return topology_file.with_name(f"{topology_file.stem}.measured.yaml")


def read_measured(path: Path) -> Measurement:
    """The measurement in a file. Raises TopologyError naming file and line."""
    return parse_measured(parse_yaml(read_text(path), path.name))


def parse_measured(document: Entry) -> Measurement:
    """The measurement in a document. Raises TopologyError naming file and line."""
    fields = document.fields(
        "version", "topology", "date", "driver", "versions", "devices", "groups"
    )
    fields.need("version").choice("1")
    driver, versions, devices, groups = (
        fields.get(key) for key in ("driver", "versions", "devices", "groups")
    )
    return Measurement(
        topology=fields.need("topology").text(),
        date=fields.need("date").text(),
        driver=driver.text() if driver else None,
        versions={k.text(): v.text() for k, v in versions.pairs()} if versions else {},
        devices=tuple(_device(item) for item in devices.sequence()) if devices else (),
        groups=tuple(_group(item) for item in groups.sequence()) if groups else (),
    )


def write_measured(measurement: Measurement, path: Path) -> None:
    """Write `measurement` so that `read_measured` gives it back."""
    path.write_text(format_measured(measurement), encoding="utf-8")


def format_measured(measurement: Measurement) -> str:
    """The text of a measured layer."""
    lines = [
        "# Measured by `tpinfer topo probe`; goes before the topology file beside it.",
        "version: 1",
        f"topology: {quoted(measurement.topology)}",
        f"date: {quoted(measurement.date)}",
    ]
    if measurement.driver is not None:
        lines.append(f"driver: {quoted(measurement.driver)}")
    if measurement.versions:
        lines.append(
            f"versions: {_flow({quoted(k): quoted(v) for k, v in measurement.versions.items()})}"
        )
    if measurement.devices:
        lines += ["devices:", *(line for d in measurement.devices for line in _device_lines(d))]
    if measurement.groups:
        lines += ["groups:", *(line for g in measurement.groups for line in _group_lines(g))]
    return "\n".join(lines) + "\n"


def _device(entry: Entry) -> DeviceMeasurement:
    optional = ("sharing", "memory", "gemm", "ops", "floors", "copies", "clocks", "step")
    fields = entry.fields("host", "ids", *optional)
    sharing, memory, gemms, ops, floors, copies, clocks, step = map(fields.get, optional)
    floor = floors.fields("eager", "graph") if floors else None
    eager, graph = (floor.get("eager"), floor.get("graph")) if floor else (None, None)
    return DeviceMeasurement(
        host=fields.need("host").text(),
        devices=fields.need("ids").ids(),
        num_sharing=sharing.count() if sharing else 1,
        memory=tuple(_memory(item) for item in memory.sequence()) if memory else (),
        gemms=tuple(_gemm(item) for item in gemms.sequence()) if gemms else (),
        ops=tuple(_op(item) for item in ops.sequence()) if ops else (),
        eager_floor_s=eager.time() if eager else None,
        graph_floor_s=graph.time() if graph else None,
        copies=tuple(_copy(k, v) for k, v in copies.pairs()) if copies else (),
        clocks=_clocks(clocks) if clocks else None,
        host_time=_host_time(step) if step else None,
    )


def _host_time(entry: Entry) -> HostTime:
    fields = entry.fields("host", "row")
    return HostTime(*(fields.need(key).time(zero=True) for key in ("host", "row")))


def _memory(entry: Entry) -> MemoryRead:
    fields = entry.fields("level", "working_set", "rate", "capacity")
    capacity = fields.get("capacity")
    return MemoryRead(
        fields.need("level").choice(*MEMORY_LEVELS),
        fields.need("working_set").size(),
        fields.need("rate").rate(),
        capacity.size() if capacity else None,
    )


def _gemm(entry: Entry) -> GemmRate:
    fields = entry.fields("dtype", "rows", "columns", "inner", "rate")
    rows, columns, inner = (fields.need(key).count() for key in ("rows", "columns", "inner"))
    dtype = read_dtype(fields.need("dtype"))
    return GemmRate(dtype, rows, columns, inner, fields.need("rate").flops())


def _op(entry: Entry) -> OpTime:
    optional = ("floor", "row", "bytes", "flops", "rates", "error")
    fields = entry.fields("kind", "dtype", *optional)
    floor, row, num_bytes, flops, rates, error = (fields.get(key) for key in optional)
    return OpTime(
        fields.need("kind").choice(*OP_KINDS),
        read_dtype(fields.need("dtype")),
        floor_s=floor.time(zero=True) if floor else 0.0,
        row_s=row.time(zero=True) if row else 0.0,
        bytes_per_s=num_bytes.rate() if num_bytes else None,
        flops_per_s=flops.flops() if flops else None,
        rates={k.count(): v.flops() for k, v in rates.pairs()} if rates else {},
        error=error.ratio(zero=True) if error else 0.0,
    )


def _copy(key: Entry, entry: Entry) -> Copy:
    fields = entry.fields("rate", "latency")
    latency = fields.get("latency")
    return Copy(
        key.choice(*_COPIES), fields.need("rate").rate(), latency.time() if latency else None
    )


def _clocks(entry: Entry) -> Clocks:
    fields = entry.fields(*_CLOCKS, "throttled_by")
    reasons = fields.get("throttled_by")
    found = {key: fields.get(key) for key in _CLOCKS}
    return Clocks(
        **{key: value.count(least=0) if value else None for key, value in found.items()},
        throttled_by=tuple(reason.text() for reason in reasons.sequence()) if reasons else (),
    )


def _group(entry: Entry) -> GroupMeasurement:
    fields = entry.fields("ranks", "collectives", "ops")
    ranks = fields.need("ranks")
    places = []
    for name in ranks.ids():
        host, slash, device = name.partition("/")
        if not (host and slash and device):
            raise ranks.error(f"names {name!r}; write host/device, like h0/0..7")
        places.append((host, device))
    fits = tuple(_collective(item) for item in fields.need("collectives").sequence())
    ops = fields.get("ops")
    return GroupMeasurement(
        tuple(places), fits, tuple(_op(item) for item in ops.sequence()) if ops else ()
    )


def _collective(entry: Entry) -> CollectiveFit:
    keys = ("op", "by", "graph", "a", "b", "B1", "c", "d", "B2", "smallest", "largest", "error")
    fields = entry.fields(*keys, "points")
    points = fields.get("points")
    return CollectiveFit(
        op=fields.need("op").choice(*COLLECTIVES),
        by=fields.need("by").text(),
        graph=fields.need("graph").flag(),
        a_s=fields.need("a").time(zero=True),
        b_s=fields.need("b").time(zero=True),
        b1_bytes_per_s=fields.need("B1").rate(),
        c_s=fields.need("c").time(zero=True),
        d_s=fields.need("d").time(zero=True),
        b2_bytes_per_s=fields.need("B2").rate(),
        smallest_bytes=fields.need("smallest").size(),
        largest_bytes=fields.need("largest").size(),
        error=fields.need("error").ratio(zero=True),
        points={k.size(): v.time() for k, v in points.pairs()} if points else {},
    )


def _device_lines(found: DeviceMeasurement) -> Iterable[str]:
    yield f"  - host: {quoted(found.host)}"
    yield f"    ids: {_list(found.devices)}"
    yield f"    sharing: {found.num_sharing}"
    if found.memory:
        yield "    memory:"
    for read in found.memory:
        row = {
            "level": read.level,
            "working_set": exact_size(read.working_set_bytes),
            "rate": exact_rate(read.bytes_per_s),
        }
        if read.capacity_bytes is not None:
            row["capacity"] = exact_size(read.capacity_bytes)
        yield f"      - {_flow(row)}"
    if found.gemms:
        yield "    gemm:"
    for gemm in found.gemms:
        shape = {"rows": gemm.rows, "columns": gemm.columns, "inner": gemm.inner}
        row = {"dtype": gemm.dtype.value, **shape, "rate": exact_flops(gemm.flops_per_s)}
        yield f"      - {_flow(row)}"
    if found.ops:
        yield "    ops:"
    for op in found.ops:
        yield f"      - {_flow(_op_row(op))}"
    named = (("eager", found.eager_floor_s), ("graph", found.graph_floor_s))
    floors = {name: exact_time(value) for name, value in named if value is not None}
    if floors:
        yield f"    floors: {_flow(floors)}"
    if found.copies:
        yield "    copies:"
    for copy in found.copies:
        row = {"rate": exact_rate(copy.bytes_per_s)}
        if copy.latency_s is not None:
            row["latency"] = exact_time(copy.latency_s)
        yield f"      {copy.path}: {_flow(row)}"
    if found.clocks:
        yield f"    clocks: {_flow(_clock_row(found.clocks))}"
    if found.host_time:
        times = found.host_time
        yield f"    step: {{host: {exact_time(times.step_s)}, row: {exact_time(times.row_s)}}}"


def _op_row(op: OpTime) -> dict[str, object]:
    row: dict[str, object] = {"kind": op.kind, "dtype": op.dtype.value}
    row |= {k: exact_time(v) for k, v in (("floor", op.floor_s), ("row", op.row_s)) if v}
    if op.bytes_per_s is not None:
        row["bytes"] = exact_rate(op.bytes_per_s)
    if op.flops_per_s is not None:
        row["flops"] = exact_flops(op.flops_per_s)
    if op.rates:
        row["rates"] = _flow({str(rows): exact_flops(r) for rows, r in op.rates.items()})
    return {**row, "error": repr(float(op.error))}


def _clock_row(clocks: Clocks) -> dict[str, object]:
    named = ((name, getattr(clocks, name)) for name in _CLOCKS)
    row: dict[str, object] = {name: value for name, value in named if value is not None}
    return {**row, "throttled_by": _list(clocks.throttled_by)}


def _group_lines(found: GroupMeasurement) -> Iterable[str]:
    yield f"  - ranks: {_list('/'.join(place) for place in found.places)}"
    yield "    collectives:" if found.collectives else "    collectives: []"
    for fit in found.collectives:
        row = {
            "op": fit.op,
            "by": quoted(fit.by),
            "graph": str(fit.graph).lower(),
            "a": exact_time(fit.a_s),
            "b": exact_time(fit.b_s),
            "B1": exact_rate(fit.b1_bytes_per_s),
            "c": exact_time(fit.c_s),
            "d": exact_time(fit.d_s),
            "B2": exact_rate(fit.b2_bytes_per_s),
            "smallest": exact_size(fit.smallest_bytes),
            "largest": exact_size(fit.largest_bytes),
            "error": repr(float(fit.error)),
        }
        if fit.points:
            row["points"] = _flow({exact_size(k): exact_time(v) for k, v in fit.points.items()})
        yield f"      - {_flow(row)}"
    if found.ops:
        yield "    ops:"
    for op in found.ops:
        yield f"      - {_flow(_op_row(op))}"


def _flow(row: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in row.items()) + "}"


def _list(items: Iterable[str]) -> str:
    return "[" + ", ".join(quoted(item) for item in items) + "]"
