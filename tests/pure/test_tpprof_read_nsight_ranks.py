"""Which rows of an Nsight Systems export are whose rank's."""

from pathlib import Path

import pytest
from tpprof.errors import TraceError
from tpprof.events import Trace
from tpprof.readers.nsight import read_nsight

from tests.pure.tpprof_recordings import Nsight, all_said, check_promises, row_named


@pytest.fixture
def export(tmp_path: Path) -> Nsight:
    return Nsight(tmp_path / "a.sqlite")


def read(export: Nsight, **options: int) -> list[Trace]:
    traces = read_nsight(export.save(), **options)
    for trace in traces:
        check_promises(trace)
    return traces


def test_processes_are_ranks_though_their_ids_collide(export: Nsight) -> None:
    for pid in (11, 12):
        export.call(pid, f"cudaLaunchKernel{pid}", 100, 110, correlationId=7)
        export.kernel(pid, f"k{pid}", 120, 150, deviceId=12 - pid, correlationId=7)
        export.range(pid, f"step{pid}", 90, 160)
    first, second = read(export)
    assert row_named(first, "k12")["launch"] == "cudaLaunchKernel12", "device 0 comes first"
    assert row_named(second, "k11")["launch"] == "cudaLaunchKernel11"
    assert {row["name"] for row in all_said(first)} == {"k12", "step12", "cudaLaunchKernel12"}


def test_the_same_device_number_in_all_processes(export: Nsight) -> None:
    """CUDA_VISIBLE_DEVICES: the cards behind the numbers order the ranks, else process ids."""
    for pid in (11, 12):
        export.kernel(pid, f"k{pid}", 120, 150)
    assert [trace.text(0) for trace in read(export)] == ["k11", "k12"]
    for pid, card in ((11, 5), (12, 4)):
        export.add("TARGET_INFO_CUDA_DEVICE", gpuId=card, cudaId=0, pid=pid)
        export.add("TARGET_INFO_GPU", id=card, name=f"card {card}", smCount=100 + card)
    again = Nsight(export.path)
    again._rows, again._strings = export._rows, {}
    traces = read_nsight(again.save())
    assert [trace.devices[0].num_sms for trace in traces] == [104, 105]


def test_threads_of_one_process_that_drive_a_device_each(export: Nsight) -> None:
    for device in (0, 1):
        thread = 50 + device
        export.call(11, "cudaLaunchKernel", 100, 110, tid=thread, correlationId=7 + device)
        export.kernel(11, f"k{device}", 120, 150, deviceId=device, correlationId=7 + device)
        export.range(11, f"worker {device}", 90, 160, tid=thread)
    export.range(11, "main", 80, 170, tid=11)
    first, second = read(export, rank=4)
    assert (first.rank, second.rank) == (4, 5)
    names = [{row["name"] for row in all_said(trace)} for trace in (first, second)]
    assert names[0] == {"main", "worker 0", "k0", "cudaLaunchKernel"}
    assert names[1] == {"worker 1", "k1", "cudaLaunchKernel"}


def test_one_thread_that_drives_two_devices(export: Nsight) -> None:
    for device in (0, 1):
        export.call(11, f"call {device}", 100 + device, 110, correlationId=7 + device)
        export.kernel(11, f"k{device}", 120, 150, deviceId=device, correlationId=7 + device)
    for device, trace in enumerate(read(export)):
        kinds = [row["name"] for row in all_said(trace) if row["kind"] == "KERNEL"]
        assert kinds == [f"k{device}"]
        assert row_named(trace, f"k{device}")["launch"] == f"call {device}"
        assert "call 0" in trace.strings and "call 1" in trace.strings


def test_a_stray_context_is_no_rank(export: Nsight) -> None:
    for number in range(200):
        export.kernel(11, "work", 10 * number, 10 * number + 5, deviceId=1)
    export.kernel(11, "stray", 1, 2, deviceId=0)
    export.range(99, "server", 1, 5)
    [trace] = read(export)
    assert "stray" in trace.strings, "nothing is lost"
    assert "server" not in trace.strings and "99" in trace.warnings[0]


def test_cpu_ranks_are_processes_with_ranges(export: Nsight) -> None:
    export.range(9, "torchrun", 1, 500)
    for pid in (30, 31):
        export.range(pid, f"tpinfer.step id={pid}", 10, 90, domainId=1)
    export.range(31, "tpinfer.token request=0 index=0", 91, 91, domainId=1)
    first, second = read(export)
    assert first.strings[0] == "tpinfer.step id=31", "tokens reach the host on rank 0"
    assert second.strings == ["tpinfer.step id=30"]
    assert "9" in first.warnings[0].split(": ")[-1]


def test_cpu_ranks_of_strangers(export: Nsight) -> None:
    export.range(9, "forward", 1, 500).range(8, "forward", 2, 400)
    assert [trace.start_ns.tolist() for trace in read(export)] == [[2], [1]]


def test_nothing_of_a_rank(export: Nsight) -> None:
    with pytest.raises(TraceError, match="no kernels, no ranges"):
        read(export)
