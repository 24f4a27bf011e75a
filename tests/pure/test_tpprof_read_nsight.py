"""Nsight Systems' SQLite to traces: who is a rank, links within a process, lazy tables, damage."""

import sqlite3
from contextlib import closing
from itertools import permutations
from pathlib import Path
from random import Random

import pytest
from tpprof.errors import TraceError
from tpprof.events import NONE, Kind, Trace
from tpprof.readers.kineto import read_kineto
from tpprof.readers.nsight import read_nsight
from tpprof.readers.read import read_traces

from tests.pure.tpprof_recordings import (
    EPOCH_NS,
    SHARED,
    Nsight,
    all_said,
    check_promises,
    decode_step,
    document,
    row_named,
    write,
)


@pytest.fixture
def export(tmp_path: Path) -> Nsight:
    return Nsight(tmp_path / "a.sqlite")


def read(export: Nsight, **options: int) -> list[Trace]:
    traces = read_nsight(export.save(), **options)
    for trace in traces:
        check_promises(trace)
    return traces


class TestRows:
    def test_a_kernel(self, export: Nsight) -> None:
        export.kernel(11, "void gemm<int>(float*)", 120, 150, graphNodeId=33)
        [trace] = read(export)
        assert all_said(trace) == [
            {
                "start": 120, "end": 150, "kind": "KERNEL", "name": "void gemm<int>(float*)",
                "lane": (True, 11, 7, 0), "launch": None, "op": None, "node": 33, "blocks": 6,
                "bytes": NONE, "shapes": None,
            }
        ]  # fmt: skip

    def test_copies_fills_and_waits_are_spelled_as_kineto_does(self, export: Nsight) -> None:
        place = {"deviceId": 0, "streamId": 7, "globalPid": export.process(11)}
        for number, (kind, source, target) in enumerate(
            [(1, 1, 2), (2, 2, 0), (8, 2, 2), (10, 9, 9)]
        ):
            export.add(
                "CUPTI_ACTIVITY_KIND_MEMCPY", start=number, end=9, bytes=64, copyKind=kind,
                srcKind=source, dstKind=target, **place,
            )  # fmt: skip
        export.add("CUPTI_ACTIVITY_KIND_MEMSET", start=20, end=22, bytes=5, memKind=2, **place)
        for kind in (1, 2, 3, 4):
            export.add(
                "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION", start=30 + kind, end=40, syncType=kind,
                **{**place, "streamId": None if kind == 4 else 7},
            )  # fmt: skip
        [trace] = read(export)
        assert [row["name"] for row in all_said(trace)] == [
            "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pageable)",
            "Memcpy DtoD (Device -> Device)", "Memcpy PtoP", "Memset (Device)",
            "Event Sync", "Stream Wait Event", "Stream Sync", "Context Sync",
        ]  # fmt: skip
        assert trace.num_bytes.tolist() == [64] * 4 + [5] + [NONE] * 4
        assert all_said(trace)[-1]["lane"] == (True, 11, NONE, 0)

    def test_waits_lie_on_the_device_their_process_uses(self, export: Nsight) -> None:
        export.kernel(11, "k", 1, 2, deviceId=1)
        export.add(
            "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION", start=3, end=4, syncType=2, deviceId=0,
            streamId=7, globalPid=export.process(11),
        )  # fmt: skip
        [trace] = read(export)
        assert trace.lanes == [trace.lanes[trace.lane[0]]] and trace.lanes[0].device == 1

    def test_calls_lose_their_version(self, export: Nsight) -> None:
        for number, name in enumerate(["cudaGraphLaunch_v10000", "cuMemcpyAsync_ptsz", "cuInit"]):
            export.call(11, name, number, 9, correlationId=number)
        export.call(11, "cudaLaunchKernel_v7000_ptsz", 3, 9, correlationId=4)
        [trace] = read(export)
        assert trace.strings == [
            "cuInit",
            "cuMemcpyAsync_ptsz",
            "cudaGraphLaunch",
            "cudaLaunchKernel",
        ]

    def test_replays_share_their_launch(self, export: Nsight) -> None:
        export.range(11, "aten::add, op_id = 4", 1, 50)
        export.call(11, "cudaGraphLaunch_v10000", 5, 9, correlationId=3)
        for node in (71, 72):
            export.kernel(11, f"n{node}", node, node + 1, correlationId=3, graphNodeId=node)
        [trace] = read(export)
        for node in (71, 72):
            row = row_named(trace, f"n{node}")
            assert (row["launch"], row["op"], row["node"]) == ("cudaGraphLaunch", None, node)
        assert trace.warnings == ()

    def test_ranges_of_every_kind(self, export: Nsight) -> None:
        registered = export.string("tpinfer.op layers.0.attn.qkv")
        export.range(11, None, 10, 20, textId=registered, domainId=1)
        export.range(11, "start and end", 12, 30, eventType=60)
        export.range(11, "mark", 15, None, eventType=34)
        export.range(11, "still open", 16, None)
        export.range(11, None, 17, 18)
        for number, kind in enumerate((33, 39, 75, 76)):
            export.range(11, "tpinfer", number, None, eventType=kind, domainId=1)
        [trace] = read(export)
        assert [(r["name"], r["start"], r["end"]) for r in all_said(trace)] == [
            ("tpinfer.op layers.0.attn.qkv", 10, 20), ("start and end", 12, 30), ("mark", 15, 15),
            ("still open", 16, 30), ("(no name)", 17, 18),
        ]  # fmt: skip
        assert "1 ranges were open" in trace.warnings[0]
        assert set(trace.kind.tolist()) == {Kind.RANGE}

    def test_event_types_are_numbered_by_the_file(self, export: Nsight) -> None:
        export.add("ENUM_NSYS_EVENT_TYPE", id=159, name="NvtxPushPopRange", label="x")
        export.range(11, "a", 1, 2, eventType=159).range(11, "b", 1, 2, eventType=59)
        [trace] = read(export)
        assert trace.strings == ["a"]

    @pytest.mark.parametrize(
        ("text", "kind", "name", "shapes"),
        [
            ("aten::view, op_id = 314290", "OP", "aten::view", None),
            ("aten::mm, seq = 4, op_id = 9, sizes = [[2, 3], []], input_op_ids = [(1,0)]", "OP",
             "aten::mm", "[[[2,3],[]],[]]"),
            ("detach_, op_id = 1", "OP", "detach_", None),
            ("step[DECODE bs=32], op_id = 7", "RANGE", "step[DECODE bs=32]", None),
            ("a, b", "RANGE", "a, b", None),
        ],
    )  # fmt: skip
    def test_operators_of_emit_nvtx(
        self, export: Nsight, text: str, kind: str, name: str, shapes: str | None
    ) -> None:
        export.range(11, text, 1, 100)
        export.call(11, "cudaLaunchKernel_v7000", 10, 20).kernel(11, "k", 30, 40)
        [trace] = read(export)
        row = row_named(trace, name)
        assert (row["kind"], row["shapes"]) == (kind, shapes)
        assert row_named(trace, "k")["op"] == (name if kind == "OP" else None)

    def test_overhead(self, export: Nsight) -> None:
        export.kernel(11, "k", 1, 2)
        export.add(
            "PROFILER_OVERHEAD", start=5, end=9, globalTid=export.process(11) + 4,
            nameId=export.string("Buffer flush"), overheadType=3,
        )  # fmt: skip
        [trace] = read(export)
        assert row_named(trace, "Buffer flush")["kind"] == "OVERHEAD"


class TestTime:
    @pytest.mark.parametrize(
        ("facts", "start"),
        [
            ({"utcEpochNs": EPOCH_NS}, EPOCH_NS + 120),
            ({"utcEpochNs": EPOCH_NS, "systemClockNs": 100}, EPOCH_NS + 20),
            ({"utcTime": "yesterday"}, 120),
            ({"utcEpochNs": "damaged"}, 120),
        ],
    )
    def test_absolute(self, export: Nsight, facts: dict[str, object], start: int) -> None:
        export.add("TARGET_INFO_SESSION_START_TIME", **facts)
        [trace] = read(export.kernel(11, "k", 120, 150))
        assert (trace.start_ns.tolist(), trace.end_ns.tolist()) == ([start], [start + 30])

    def test_exports_that_were_made_absolute(self, export: Nsight) -> None:
        export.add("META_DATA_EXPORT", name="EXPORT_PARAM_TIME_NORMALIZE", value="true")
        export.add("TARGET_INFO_SESSION_START_TIME", utcEpochNs=EPOCH_NS)
        [trace] = read(export.kernel(11, "k", EPOCH_NS + 5, EPOCH_NS + 6))
        assert trace.start_ns.tolist() == [EPOCH_NS + 5]

    def test_broken_rows(self, export: Nsight) -> None:
        export.kernel(11, "good", 100, 150).kernel(11, "unfilled", 0, 0)
        export.kernel(11, "backwards", 90, 80).kernel(11, "timeless", None, 80)  # type: ignore[arg-type]
        [trace] = read(export)
        assert [(r["name"], r["end"]) for r in all_said(trace)] == [
            ("backwards", 90),
            ("good", 150),
        ]
        assert trace.num_lost == 3 and len(trace.warnings) == 3


class TestGraphMode:
    def test_replays_of_one_row_are_told(self, export: Nsight) -> None:
        export.call(11, "cudaGraphLaunch_v10000", 5, 9, correlationId=3)
        export.add(
            "CUPTI_ACTIVITY_KIND_GRAPH_TRACE", start=20, end=70, deviceId=0, streamId=7,
            correlationId=3, globalPid=export.process(11), graphId=1, graphExecId=2,
        )  # fmt: skip
        [trace] = read(export)
        assert "--cuda-graph-trace=node" in trace.warnings[0]
        [row] = [row for row in all_said(trace) if row["kind"] == "KERNEL"]
        assert (row["start"], row["end"], row["launch"]) == (20, 70, "cudaGraphLaunch")

    def test_replays_without_any_row_are_told(self, export: Nsight) -> None:
        export.call(11, "cudaGraphLaunch_v10000", 5, 9, correlationId=3)
        export.kernel(11, "k", 20, 30, correlationId=99)
        [trace] = read(export)
        assert "1 CUDA graph replays were recorded without" in trace.warnings[0]
        assert "--cuda-graph-trace=node" in trace.warnings[0]


class TestSchema:
    def test_old_exports_lack_columns(self, export: Nsight) -> None:
        export.add(
            "CUPTI_ACTIVITY_KIND_KERNEL", start=1, end=2, deviceId=0, streamId=7, correlationId=4,
            globalPid=export.process(11), shortName=export.string("k"),
        )  # fmt: skip
        export.add("NVTX_EVENTS", start=0, end=3, eventType=59, text="r",
                   globalTid=export.process(11) + 11)  # fmt: skip
        [trace] = read(export)
        assert [(r["name"], r["blocks"], r["node"]) for r in all_said(trace)] == [
            ("r", NONE, NONE), ("k", NONE, NONE),
        ]  # fmt: skip

    def test_rows_in_any_order_give_one_trace(self, tmp_path: Path) -> None:
        def build(order: tuple[int, ...]) -> list[dict[str, object]]:
            export = Nsight(tmp_path / "a.sqlite")
            for number in order:
                at = 100 * (number % 2)
                export.call(11, f"call {number}", at, at + 9, correlationId=number)
                export.kernel(11, f"k{number}", at + 20, at + 30, correlationId=number)
                export.range(11, f"r{number}", at, at + 40)
            [trace] = read(export)
            return all_said(trace)

        first, *others = [build(order) for order in permutations(range(3))]
        assert others == [first] * 5

    def test_devices(self, export: Nsight) -> None:
        export.add(
            "TARGET_INFO_GPU", id=0, name="NVIDIA H100", smCount=132, totalMemory=85,
            memoryBandwidth=3_352_000_000_000, l2CacheSize=50,
        )  # fmt: skip
        [trace] = read(export.kernel(11, "k", 1, 2))
        card = trace.devices[0]
        assert (card.name, card.num_sms, card.memory_bytes, card.l2_bytes) == (
            "NVIDIA H100",
            132,
            85,
            50,
        )
        assert card.memory_bytes_per_s == 3.352e12

    def test_complaints_are_counted_and_not_quoted(self, export: Nsight) -> None:
        export.add("DIAGNOSTIC_EVENT", text="12 CUDA events were lost: sk-live-very-secret")
        export.add("DIAGNOSTIC_EVENT", text="all is well")
        [trace] = read(export.kernel(11, "k", 1, 2))
        assert trace.num_lost == 1 and "lost or dropped" in trace.warnings[0]


class TestDamage:
    @pytest.fixture
    def raw(self, export: Nsight) -> bytes:
        for pid in (11, 12):
            export.call(pid, "cudaLaunchKernel_v7000", 100, 110).kernel(pid, "k", 120, 150)
            export.range(pid, "aten::mm, op_id = 9, sizes = [[2, 3]]", 90, 400)
        return export.save().read_bytes()

    def test_every_truncation_is_refused(self, raw: bytes, tmp_path: Path) -> None:
        path = tmp_path / "cut.sqlite"
        for size in range(0, len(raw), 97):
            path.write_bytes(raw[:size])
            with pytest.raises(TraceError, match=r"cut\.sqlite"):
                read_nsight(path)

    def test_random_damage_never_escapes(self, raw: bytes, tmp_path: Path) -> None:
        path, random = tmp_path / "bad.sqlite", Random(3)
        filled = [place for place, byte in enumerate(raw) if byte]
        for _ in range(300):
            spoiled = bytearray(raw)
            spoiled[random.choice(filled)] = random.randrange(256)
            path.write_bytes(bytes(spoiled))
            try:
                for trace in read_nsight(path):
                    check_promises(trace)
            except TraceError as error:
                assert "bad.sqlite" in str(error)

    def test_text_where_numbers_belong(self, export: Nsight) -> None:
        export.kernel(11, "k", 1, 2, gridX="sk-live-very-secret")
        with pytest.raises(TraceError, match="text where numbers belong") as raised:
            read_nsight(export.save())
        assert "secret" not in str(raised.value)

    def test_another_database(self, tmp_path: Path) -> None:
        path = tmp_path / "x.sqlite"
        with closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE cookies (a, b)")
        with pytest.raises(TraceError, match="no export of Nsight Systems"):
            read_nsight(path)

    def test_nothing_is_written_beside_it(self, export: Nsight) -> None:
        path = export.kernel(11, "k", 1, 2).save()
        path.parent.chmod(0o500)
        read_nsight(path)
        path.parent.chmod(0o700)
        assert [file.name for file in path.parent.iterdir()] == ["a.sqlite"]


def test_our_own_export_reads_back(tmp_path: Path) -> None:
    from tpprof.report.nsight_sqlite import write_nsight

    origin = read_kineto(write(tmp_path / "rank1.json", document(decode_step())))
    path = tmp_path / "rank1.sqlite"
    write_nsight(path, [origin])
    [trace] = read_traces([path])
    assert trace.rank == 1
    same = ("start", "end", "kind", "name", "launch", "op", "node", "bytes")
    left, right = (
        [{key: row[key] for key in same} for row in all_said(one)] for one in (origin, trace)
    )
    for one in (*left, *right):
        one["name"] = str(one["name"]).partition(" (")[0]  # the export knows no kinds of memory
    assert right == left


def test_a_real_recording_matches_plain_sql() -> None:
    path = SHARED / "nsys_h100_2gpu.sqlite"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    traces = read_traces([path])
    assert [trace.rank for trace in traces] == [0, 1] and traces[0].warnings == ()
    with closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as database:
        epoch, zero = database.execute(
            "SELECT utcEpochNs, systemClockNs FROM TARGET_INFO_SESSION_START_TIME"
        ).fetchone()
        for trace in traces:
            check_promises(trace)
            process = (trace.lanes[0].pid << 24) | (1 << 48)
            for kind, table, key in (
                (Kind.KERNEL, "KERNEL", "globalPid"), (Kind.COPY, "MEMCPY", "globalPid"),
                (Kind.MEMSET, "MEMSET", "globalPid"), (Kind.SYNC, "SYNCHRONIZATION", "globalPid"),
                (Kind.LAUNCH, "RUNTIME", "globalTid & ~0xFFFFFF"),
                (Kind.OVERHEAD, "OVERHEAD", "globalTid & ~0xFFFFFF"),
            ):  # fmt: skip
                expected = database.execute(
                    f"SELECT start + ? - ?, end + ? - ? FROM CUPTI_ACTIVITY_KIND_{table} "
                    f"WHERE {key} = ? ORDER BY 1, -end",
                    (epoch, zero, epoch, zero, process),
                ).fetchall()
                rows = trace.rows_of(kind)
                found = zip(trace.start_ns[rows].tolist(), trace.end_ns[rows].tolist(), strict=True)
                assert list(found) == expected, table
            [(linked, blocks)] = database.execute(
                "SELECT COUNT(*), SUM(gridX * gridY * gridZ) FROM CUPTI_ACTIVITY_KIND_KERNEL k "
                "JOIN CUPTI_ACTIVITY_KIND_RUNTIME r ON k.correlationId = r.correlationId AND "
                "k.globalPid = r.globalTid & ~0xFFFFFF WHERE k.globalPid = ?",
                (process,),
            )
            kernels = trace.rows_of(Kind.KERNEL)
            launched = kernels[trace.launch[kernels] >= 0]
            assert len(launched) == linked > 0
            assert int(trace.num_blocks[launched].sum()) == blocks
            [(ranges,)] = database.execute(
                "SELECT COUNT(*) FROM NVTX_EVENTS WHERE eventType IN (59, 60, 34) AND "
                "globalTid & ~0xFFFFFF = ?",
                (process,),
            )
            assert len(trace.rows_of(Kind.RANGE, Kind.OP)) == ranges
