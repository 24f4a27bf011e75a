"""Kineto's JSON to a `Trace`: exact times, links, every spelling, and nothing lost unsaid."""

import json
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tpprof.events import NONE, Kind, Trace
from tpprof.readers.kineto import rank_in_header, read_kineto

from tests.pure.tpprof_recordings import (
    EPOCH_NS,
    SECRET,
    SHARED,
    all_said,
    check_promises,
    decode_step,
    document,
    event,
    row_named,
    write,
)

in_folder = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


def read(folder: Path, content: Any, packed: bool = False, **options: Any) -> Trace:
    trace = read_kineto(write(folder / "rank.json", content, packed), **options)
    check_promises(trace)
    return trace


def read_events(folder: Path, *events: dict[str, Any], **beside: Any) -> Trace:
    return read(folder, document(events, **beside))


class TestAStep:
    @pytest.fixture
    def trace(self, tmp_path: Path) -> Trace:
        return read(tmp_path, document(decode_step()))

    def test_says_whose_it_is(self, trace: Trace) -> None:
        assert (trace.rank, trace.world_size, trace.recorder) == (1, 2, "kineto")
        assert trace.devices[0].name == "NVIDIA H100" and trace.devices[0].num_sms == 132
        assert trace.warnings == () and trace.num_lost == 0
        assert len(trace) == 13, "arrows and names are no rows"

    def test_times_are_absolute_ns(self, trace: Trace) -> None:
        kernel = row_named(trace, "gemm")
        assert (kernel["start"] - EPOCH_NS, kernel["end"] - EPOCH_NS) == (130_001, 150_003)

    def test_kernels_know_launch_op_grid_and_stream(self, trace: Trace) -> None:
        kernel = row_named(trace, "gemm")
        assert kernel["launch"] == "cudaLaunchKernel" and kernel["op"] == "aten::mm"
        assert kernel["blocks"] == 40 and kernel["lane"] == (True, NONE, 3, 0)
        shapes = '[[[2,64],[64,8]],["c10::BFloat16","c10::BFloat16"]]'
        assert row_named(trace, "aten::mm")["shapes"] == shapes
        assert row_named(trace, "aten::empty")["shapes"] is None

    def test_kernels_of_one_replay_share_its_launch(self, trace: Trace) -> None:
        first, second = row_named(trace, "node a"), row_named(trace, "node b")
        assert first["launch"] == second["launch"] == "cudaGraphLaunch"
        assert (first["node"], second["node"]) == (71, 72)
        assert first["op"] is None, "they were issued for no operator of this moment"

    def test_copies_have_bytes(self, trace: Trace) -> None:
        copy = row_named(trace, "Memcpy DtoH (Device -> Pinned)")
        assert (copy["bytes"], copy["blocks"], copy["launch"]) == (4096, NONE, "cudaMemcpyAsync")

    def test_collectives_are_the_kernels(self, trace: Trace) -> None:
        kernel = row_named(trace, "ncclDevKernel_AllGather_RING_LL")
        assert kernel["collective"] == ("allgather", 4096, "3", 2, 41)
        assert len(trace.collectives.row) == 1, "the operator is not counted beside its kernel"
        assert trace.groups == {"3": (0, 1)}

    def test_annotations_are_ranges(self, trace: Trace) -> None:
        assert row_named(trace, "tpinfer.step id=4 phase=decode")["kind"] == "RANGE"


class TestTimes:
    @given(st.lists(st.tuples(st.integers(1, 7_889_238 * 10**9), st.integers(0, 10**12))))
    @in_folder
    def test_ns_survive_as_microseconds_with_three_decimals(
        self, tmp_path: Path, times: list[tuple[int, int]]
    ) -> None:
        """Up to the 3 months that Kineto's base may lie back."""

        def spell(ns: int) -> str:
            return f"{ns // 1000}.{ns % 1000:03d}"

        events = ",".join(
            f'{{"ph":"X","cat":"cpu_op","name":"a","pid":1,"tid":1,"ts":{spell(start)},'
            f'"dur":{spell(length)},"args":{{}}}}'
            for start, length in times
        )
        text = f'{{"baseTimeNanoseconds": {EPOCH_NS}, "traceEvents": [{events}]}}'
        trace = read(tmp_path, text)
        expected = sorted((EPOCH_NS + s, -(EPOCH_NS + s + length)) for s, length in times)
        found = zip(trace.start_ns.tolist(), (-trace.end_ns).tolist(), strict=True)
        assert list(found) == expected

    @pytest.mark.parametrize(
        ("ts", "ns"),
        [
            ("1711964646123456", 1711964646123456000),
            ("1711964646123456.789", 1711964646123456789),
            ("4398046511104.001", 4398046511104001),
            ("4458676522690.655", 4458676522690655),
            ("0.001", 1),
            ("12.5e1", 125000),
        ],
    )
    def test_old_files_hold_absolute_microseconds(self, tmp_path: Path, ts: str, ns: int) -> None:
        text = f'{{"traceEvents":[{{"ph":"X","cat":"cpu_op","name":"a","ts":{ts},"dur":1}}]}}'
        trace = read(tmp_path, text)
        assert (trace.start_ns.tolist(), trace.end_ns.tolist()) == ([ns], [ns + 1000])

    def test_equal_times_are_ordered_by_what_encloses_what(self, tmp_path: Path) -> None:
        same = {"ts": 5, "dur": 2}
        events = [
            event("kernel", "kernel", **same),
            event("cuda_runtime", "call", **same),
            event("cpu_op", "inner", **same, args={"External id": 9}),
            event("cpu_op", "outer", **same, args={"External id": 8}),
            event("user_annotation", "range", **same),
            event("python_function", "frame", **same),
        ]
        trace = read_events(tmp_path, *events)
        assert [row["name"] for row in all_said(trace)] == [
            "frame", "range", "outer", "inner", "call", "kernel",
        ]  # fmt: skip


class TestLinks:
    def test_one_id_for_two_things_is_told_apart_by_time(self, tmp_path: Path) -> None:
        """Some versions put the correlation id where the operator's External id belongs."""
        trace = read_events(
            tmp_path,
            event("cpu_op", "early", 1, 2, args={"External id": 90}),
            event("cpu_op", "around", 10, 20, args={"External id": 7}),
            event("cuda_runtime", "cudaLaunchKernel", 12, 1,
                  args={"External id": 90, "correlation": 90}),
            event("kernel", "k", 15, 1, args={"correlation": 90, "External id": 90}),
        )  # fmt: skip
        assert row_named(trace, "cudaLaunchKernel")["op"] == "around"
        assert row_named(trace, "k")["op"] == "around"

    def test_a_launch_beats_another_call_with_its_id(self, tmp_path: Path) -> None:
        trace = read_events(
            tmp_path,
            event("cuda_driver", "cuCtxGetCurrent", 1, 1, args={"correlation": 4}),
            event("cuda_driver", "cuLaunchKernelEx", 2, 1, args={"correlation": 4}),
            event("kernel", "triton_poi", 5, 1, args={"correlation": 4}),
        )
        assert row_named(trace, "triton_poi")["launch"] == "cuLaunchKernelEx"

    def test_zero_is_no_id(self, tmp_path: Path) -> None:
        trace = read_events(
            tmp_path,
            event("cuda_runtime", "cudaLaunchKernel", 1, 1, args={"correlation": 0}),
            event("cuda_runtime", "cudaMemsetAsync", 2, 1, args={"correlation": 0}),
            event("kernel", "k", 5, 1, args={"correlation": 0}),
        )
        assert row_named(trace, "k")["launch"] is None

    @pytest.mark.parametrize("call", ["cudaGraphLaunch", "hipGraphLaunch", "cuGraphLaunch"])
    def test_a_replay_takes_no_operator_even_inside_one(self, tmp_path: Path, call: str) -> None:
        trace = read_events(
            tmp_path,
            event("cpu_op", "aten::add", 1, 50, args={"External id": 3}),
            event("cuda_runtime", call, 2, 9, args={"correlation": 8, "External id": 3}),
            event("kernel", "k", 20, 1, args={"correlation": 8, "External id": 3}),
        )
        assert (row_named(trace, "k")["launch"], row_named(trace, "k")["op"]) == (call, None)
        assert row_named(trace, call)["op"] == "aten::add"

    def test_kernels_take_the_grid_of_their_launch_on_rocm(self, tmp_path: Path) -> None:
        trace = read_events(
            tmp_path,
            event("cuda_runtime", "hipLaunchKernel", 1, 1,
                  args={"correlation": 8, "grid": [6, 2, 1], "block": [64, 1, 1]}),
            event("kernel", "k", 5, 1, pid=9, tid=1, args={"correlation": 8, "device": 9}),
        )  # fmt: skip
        assert row_named(trace, "k")["blocks"] == 12
        assert row_named(trace, "hipLaunchKernel")["blocks"] == NONE
        assert trace.devices[9] == trace.devices[0], "one card, whatever its number"


class TestSpellings:
    def test_the_first_years(self, tmp_path: Path) -> None:
        trace = read_events(
            tmp_path,
            event("Operator", "aten::mm", 1600000000000000, 30, args={"external id": 4}),
            event("Runtime", "cudaLaunchKernel", 1600000000000002, 3,
                  args={"external id": 4, "correlation": 7}),
            event("Kernel", "k", 1600000000000010, 5, tid="stream 7",
                  args={"external id": 4, "correlation": 7, "stream": 7, "device": 1}),
            event("Memcpy", "Memcpy HtoD", 1600000000000020, 5, tid="stream 8",
                  args={"device": 1, "stream": 8, "bytes": 12}),
            event("Memset", "Memset", 1600000000000026, 1, pid=1, tid="stream 9"),
            baseTimeNanoseconds=None, distributedInfo=None, deviceProperties=None,
        )  # fmt: skip
        kernel = row_named(trace, "k")
        assert kernel["op"] == "aten::mm" and kernel["lane"] == (True, NONE, 7, 1)
        assert kernel["start"] == 1600000000000010000
        assert row_named(trace, "Memset")["lane"] == (True, NONE, 9, 1)
        assert row_named(trace, "Memcpy HtoD")["bytes"] == 12
        assert (trace.rank, trace.world_size, dict(trace.devices)) == (NONE, NONE, {})

    def test_thread_ids_of_either_sign_are_one_thread(self, tmp_path: Path) -> None:
        trace = read_events(
            tmp_path, event("cpu_op", "a", 1, 1, tid=-549452224),
            event("cpu_op", "b", 3, 1, tid=549452224),
        )  # fmt: skip
        assert len(trace.lanes) == 1 and trace.lanes[0].tid == 549452224

    def test_our_own_ranges_recorded_as_operators(self, tmp_path: Path) -> None:
        trace = read_events(tmp_path, event("cpu_op", "tpinfer.op layers.0.attn.qkv", 1, 1))
        assert row_named(trace, "tpinfer.op layers.0.attn.qkv")["kind"] == "RANGE"

    def test_ranks_as_text(self, tmp_path: Path) -> None:
        groups = [
            {"pg_name": "0", "ranks": "[0, 1, 2]"}, {"pg_name": "1", "ranks": [1, 2]},
            {"pg_name": "2", "ranks": "[0, 1, ..."}, {"pg_name": "3", "ranks": ["0"]}, 7,
        ]  # fmt: skip
        place = {"rank": "1", "world_size": 3, "pg_config": groups, "nccl_version": "unknown"}
        trace = read_events(tmp_path, *decode_step(), distributedInfo=place)
        assert trace.groups == {"0": (0, 1, 2), "1": (1, 2), "3": (0, 1)}, "3: from the collective"
        assert (trace.rank, trace.world_size) == (1, 3)

    @pytest.mark.parametrize(
        ("spelled", "dtype", "name", "num_bytes"),
        [
            ("allreduce", "Float", "allreduce", 400),
            ("all_reduce", "c10::Half", "allreduce", 200),
            ("_reduce_scatter_base", "BFloat16", "reduce_scatter", 200),
            ("nccl:all_gather", "Double", "allgather", 800),
            ("all_to_allv", "Float8_e4m3fn", "alltoall", 100),
            ("broadcast", "Byte", "broadcast", 100),
            ("send", "Long", "send", 800),
            ("brand_new", "Unheard", "brand_new", NONE),
        ],
    )
    def test_collectives(
        self, tmp_path: Path, spelled: str, dtype: str, name: str, num_bytes: int
    ) -> None:
        args = {"Collective name": spelled, "dtype": dtype, "In msg nelems": 100}
        trace = read_events(tmp_path, event("kernel", "ncclDevKernel", 1, 1, args=args))
        assert row_named(trace, "ncclDevKernel")["collective"] == (name, num_bytes, None, -1, -1)

    def test_a_kernel_takes_what_only_its_operator_says(self, tmp_path: Path) -> None:
        args = {"Collective name": "allreduce", "dtype": "Int", "In msg nelems": 2}
        trace = read_events(
            tmp_path,
            event("cpu_op", "record_param_comms", 1, 9, args={"External id": 2, **args}),
            event("kernel", "ncclKernel_AllReduce", 20, 5, args={"External id": 2}),
            event("kernel", "elementwise", 30, 5, args={"External id": 2}),
        )
        assert row_named(trace, "ncclKernel_AllReduce")["collective"][:2] == ("allreduce", 8)
        assert len(trace.collectives.row) == 1

    def test_collectives_of_cpu_ranks_are_operators(self, tmp_path: Path) -> None:
        def comm(name: str, ts: int) -> dict[str, Any]:
            args = {"Collective name": name, "dtype": "Float", "Out msg nelems": 8, "Seq": ts}
            return event("cpu_op", "record_param_comms", ts, 2, args=args)

        trace = read_events(tmp_path, comm("allreduce", 5), comm("wait", 9), comm("init", 1))
        assert len(trace.collectives.row) == 1, "waiting and opening move nothing"
        assert trace.collectives.num_bytes.tolist() == [32]
        assert trace.start_ns[trace.collectives.row[0]] == EPOCH_NS + 5000

    def test_waits_and_overhead(self, tmp_path: Path) -> None:
        trace = read_events(
            tmp_path,
            event("cuda_sync", "Stream Wait Event", 1, 2,
                  args={"stream": 5, "device": 0, "correlation": 3}),
            event("overhead", "CUPTI Buffer Flush", 1, 2, pid=-1, tid=0),
            event("gpu_user_annotation", "step", 1, 2),
        )  # fmt: skip
        assert row_named(trace, "Stream Wait Event")["lane"] == (True, NONE, 5, 0)
        assert row_named(trace, "CUPTI Buffer Flush")["kind"] == "OVERHEAD"
        assert row_named(trace, "step")["kind"] == "DEVICE_RANGE"


class TestLayout:
    @given(st.randoms(use_true_random=False), st.sampled_from([None, 1, "\t"]), st.booleans())
    @in_folder
    def test_order_and_white_space_do_not_matter(
        self, tmp_path: Path, random: Random, indent: int | str | None, packed: bool
    ) -> None:
        plain = read(tmp_path, document(decode_step()))
        events = decode_step()
        random.shuffle(events)
        items = list(document(events).items())
        random.shuffle(items)
        shuffled = [(key, _shuffled(value, random)) for key, value in items]
        text = json.dumps(dict(shuffled), indent=indent)
        trace = read(tmp_path, text, packed, block_bytes=random.choice([50, 700, 1 << 20]))
        assert all_said(trace) == all_said(plain)
        assert trace.strings == plain.strings and trace.lanes == plain.lanes
        for name in ("start_ns", "end_ns", "name", "lane", "launch", "op"):
            assert np.array_equal(getattr(trace, name), getattr(plain, name)), name

    @pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64, 1000])
    def test_cuts_may_fall_anywhere(self, tmp_path: Path, block_bytes: int) -> None:
        """Also where text looks like the border of two events."""
        decoy = '"}, {"ph": "X", "cat": "cpu_op"}], [{"name": "x"'
        events = [*decode_step(), event("kernel", decoy, 5, 1, args={"grid": [2, 1, 1]})]
        events.append(event("cpu_op", "nested", 6, 1, args={"x": [{"a": [1]}, {"name": "b"}]}))
        trace = read(tmp_path, document(events), block_bytes=block_bytes)
        assert len(trace) == 15 and trace.warnings == ()
        assert row_named(trace, decoy)["blocks"] == 2

    def test_a_bare_array_and_a_byte_order_mark(self, tmp_path: Path) -> None:
        raw = "\ufeff" + json.dumps(decode_step())
        trace = read(tmp_path, raw.encode())
        assert len(trace) == 13 and trace.warnings == ()
        assert row_named(trace, "gemm")["start"] == 130_001

    def test_members_of_an_archive_follow_each_other(self, tmp_path: Path) -> None:
        import gzip

        raw = json.dumps(document(decode_step())).encode()
        packed = gzip.compress(raw[:700]) + gzip.compress(raw[700:]) + b"\0" * 8
        assert all_said(read(tmp_path, packed)) == all_said(read(tmp_path, raw))

    def test_the_environment_is_nowhere(self, tmp_path: Path) -> None:
        text = json.dumps(document(decode_step()))
        assert text.count(SECRET) == 2
        trace = read(tmp_path, text)
        assert SECRET not in repr([getattr(trace, name) for name in vars(trace)])

    def test_the_rank_without_the_events(self, tmp_path: Path) -> None:
        assert rank_in_header(write(tmp_path / "a.json", document([]))) == 1
        assert rank_in_header(write(tmp_path / "b.json", [])) is None
        bad = document([], distributedInfo={"rank": -4})
        assert rank_in_header(write(tmp_path / "c.json", bad)) is None


def _shuffled(value: Any, random: Random) -> Any:
    """Keys of events in any order, which JSON leaves open."""
    if isinstance(value, dict):
        items = list(value.items())
        random.shuffle(items)
        return {key: _shuffled(inner, random) for key, inner in items}
    return [_shuffled(inner, random) for inner in value] if isinstance(value, list) else value


KINDS = {
    "cpu_op": Kind.OP, "user_annotation": Kind.RANGE, "kernel": Kind.KERNEL,
    "gpu_memcpy": Kind.COPY, "gpu_memset": Kind.MEMSET, "cuda_runtime": Kind.LAUNCH,
    "python_function": Kind.PYTHON, "gpu_user_annotation": Kind.DEVICE_RANGE,
}  # fmt: skip
REAL = [
    "hta_a100_nccl_args.json.gz",
    "sglang_decode_mi300.json.gz",
    "sglang_decode_mi300_capture.json.gz",
]


@pytest.mark.parametrize("name", REAL)
def test_real_recordings_match_an_independent_reading(name: str) -> None:
    import gzip

    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    trace = read_kineto(path)
    check_promises(trace)
    # Fractions of the decimals as they stand: no float comes near a time.
    whole = json.loads(gzip.decompress(path.read_bytes()), parse_float=Fraction)
    rows = [one for one in whole["traceEvents"] if one.get("cat") in KINDS and one["ph"] == "X"]
    expected = sorted(
        (
            whole["baseTimeNanoseconds"] + int(one["ts"] * 1000), int(one["dur"] * 1000),
            int(KINDS[one["cat"]]), one["name"],
        )
        for one in rows
    )  # fmt: skip
    columns = (trace.start_ns, trace.end_ns - trace.start_ns, trace.kind)
    names = [trace.text(row) for row in range(len(trace))]
    found = sorted(zip(*(c.tolist() for c in columns), names, strict=True))
    assert found == expected
    calls = {o["args"]["correlation"] for o in rows if o["cat"] == "cuda_runtime"}
    device = [o for o in rows if o["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    linked = sum(o["args"]["correlation"] in calls for o in device)
    assert int((trace.launch >= 0).sum()) == linked > 0
    comm = [o for o in device if "Collective name" in o["args"]]
    assert len(trace.collectives.row) == len(comm)
    total = sum(
        max(o["args"]["In msg nelems"], o["args"]["Out msg nelems"])
        * {"Float": 4, "Int": 4, "Long": 8, "Byte": 1, "Char": 1}[o["args"]["dtype"]]
        for o in comm
    )
    assert int(trace.collectives.num_bytes.sum()) == total
    assert trace.warnings == () and trace.num_lost == 0
