"""The step-plan wire: order and content kept, waits bounded, dead ends noticed, nothing left
behind.
"""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tpinfer.config.errors import RankError
from tpinfer.steps import segment as segment_module
from tpinfer.steps.interface import PROCESS_GONE
from tpinfer.steps.segment import SHM_DIRECTORY, find_segment, segment_path
from tpinfer.steps.shm_reader import ShmPlanReader
from tpinfer.steps.shm_writer import ShmPlanWriter

ECHO = """
import sys
from tpinfer.steps.shm_reader import ShmPlanReader
from tpinfer.steps.shm_writer import ShmPlanWriter
there, back = sys.argv[1:]
reader = ShmPlanReader(there, 0, 10)
writer = ShmPlanWriter(back, 1)
while (frame := reader.receive(10)) != b"end":
    writer.send(frame)
"""


@pytest.fixture(params=[True, False], ids=["ordered", "locked"])
def store_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of ordering memory: as on x86, and as on machines that need a lock."""
    monkeypatch.setattr(segment_module, "KEEPS_STORE_ORDER", request.param)
    return request.param


@pytest.fixture
def pair(run_name: str, store_order: bool) -> Iterator[tuple[ShmPlanWriter, ShmPlanReader]]:
    writer = ShmPlanWriter(run_name, 1, capacity_bytes=256, timeout_s=0.3)
    reader = ShmPlanReader(run_name, 0, 1.0)
    yield writer, reader
    reader.close()
    writer.close()


def child(python_path: str, code: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env={"PYTHONPATH": python_path}, stdin=subprocess.DEVNULL)


def test_frames_arrive_in_order_around_the_end_of_the_ring(
    pair: tuple[ShmPlanWriter, ShmPlanReader],
) -> None:
    writer, reader = pair
    chooser = random.Random(1)
    for _ in range(300):
        frames = [chooser.randbytes(chooser.randrange(0, 60)) for _ in range(3)]
        for frame in frames:
            writer.send(frame)
        assert [reader.receive(1.0) for _ in frames] == frames


def test_every_reader_gets_every_frame(run_name: str) -> None:
    writer = ShmPlanWriter(run_name, 3)
    readers = [ShmPlanReader(run_name, index, 1.0) for index in range(3)]
    for number in range(50):
        writer.send(str(number).encode())
    for reader in readers:
        assert [int(reader.receive(1.0)) for _ in range(50)] == list(range(50))
        reader.close()
    writer.close()


def test_a_payload_larger_than_the_ring_goes_through_in_parts(
    pair: tuple[ShmPlanWriter, ShmPlanReader],
) -> None:
    writer, reader = pair
    payloads = [random.Random(2).randbytes(size) for size in (5000, 120, 121, 0, 257)]
    sender = threading.Thread(target=lambda: [writer.send(payload) for payload in payloads])
    sender.start()
    assert [reader.receive(2.0) for _ in payloads] == payloads
    sender.join()


def test_a_slow_reader_holds_the_writer_back(pair: tuple[ShmPlanWriter, ShmPlanReader]) -> None:
    writer, reader = pair
    for number in range(8):
        writer.send(bytes([number]) * 20)
    with pytest.raises(RankError, match=r"read its step plans took longer than 0.3 s"):
        writer.send(b"x" * 20)
    assert reader.receive(0.1) == bytes(20)
    writer.send(b"y" * 20)
    assert [reader.receive(0.1)[:1] for _ in range(8)] == [bytes([n]) for n in range(1, 8)] + [b"y"]


def test_waiting_is_bounded_polls_and_says_what_for(
    pair: tuple[ShmPlanWriter, ShmPlanReader],
) -> None:
    polls = []
    with pytest.raises(RankError, match=r"next step plan took longer than 0.05 s"):
        pair[1].receive(0.05, lambda: polls.append(1))
    assert polls


def test_close_lets_readers_finish_and_then_tells_them(run_name: str) -> None:
    writer = ShmPlanWriter(run_name, 1)
    reader = ShmPlanReader(run_name, 0, 1.0)
    writer.send(b"last")
    writer.close()
    writer.close()
    assert reader.receive(1.0) == b"last"
    with pytest.raises(RankError, match="closed"):
        reader.receive(1.0)
    with pytest.raises(RankError, match="closed on this rank"):
        writer.send(b"")
    reader.close()


def test_the_name_goes_once_all_have_attached(run_name: str) -> None:
    writer = ShmPlanWriter(run_name, 2)
    first = ShmPlanReader(run_name, 0, 1.0)
    assert find_segment(run_name) == segment_path(run_name)
    second = ShmPlanReader(run_name, 1, 1.0)
    assert find_segment(run_name) is None
    writer.wait_attached(1.0)
    for end in (first, second, writer):
        end.close()


def test_segments_of_dead_makers_are_not_taken(run_name: str) -> None:
    stale = SHM_DIRECTORY / f"tpinfer-{2**22 + 1}-{run_name}"
    stale.touch()
    try:
        with pytest.raises(RankError, match="waiting for rank 0 to make the segment"):
            ShmPlanReader(run_name, 0, 0.05)
    finally:
        stale.unlink()


def test_refusals(run_name: str) -> None:
    with pytest.raises(ValueError, match="num_readers=0"):
        ShmPlanWriter(run_name, 0)
    with pytest.raises(ValueError, match="capacity_bytes=8"):
        ShmPlanWriter(run_name, 1, 8)
    writer = ShmPlanWriter(run_name, 2)
    with pytest.raises(ValueError, match=r"index=2 must be in 0\.\.1"):
        ShmPlanReader(run_name, 2, 1.0)
    reader = ShmPlanReader(run_name, 1, 1.0)
    with pytest.raises(ValueError, match="is taken"):
        ShmPlanReader(run_name, 1, 1.0)
    reader.close()
    writer.close()


def test_a_reader_reports_its_step_and_its_failure(
    pair: tuple[ShmPlanWriter, ShmPlanReader],
) -> None:
    writer, reader = pair
    reader.report(generation=1, step=41)
    assert writer.reader_progress() == [(1, 41)]
    assert writer.failed_readers() == []
    reader.fail("CUDA out of memory: größer als gedacht " + "x" * 300, code=7)
    [failure] = writer.failed_readers()
    assert failure.code == 7
    assert failure.message.startswith("CUDA out of memory: größer als gedacht x")
    assert len(failure.message.encode()) == 192
    with pytest.raises(ValueError, match="must be positive"):
        reader.fail("", 0)


def test_a_failed_step_is_told_once_and_nothing_else_ends(
    pair: tuple[ShmPlanWriter, ShmPlanReader],
) -> None:
    writer, reader = pair
    assert writer.failed_steps() == []
    reader.fail_step(5, 3, "NaN in row 7")
    reader.fail_step(6, 4, "größer " * 30)
    first, second = writer.failed_steps()
    assert (first.rank, first.step_id, first.code, first.message) == (1, 5, 3, "NaN in row 7")
    assert (second.step_id, second.code) == (6, 4)
    assert second.message == ("größer " * 30).encode()[:96].decode(errors="ignore")
    assert writer.failed_steps() == [] and writer.failed_readers() == []
    with pytest.raises(ValueError, match="must be positive"):
        reader.fail_step(7, 0, "")


def test_failed_steps_of_a_group_that_is_gone_are_not_told(
    pair: tuple[ShmPlanWriter, ShmPlanReader],
) -> None:
    writer, reader = pair
    reader.fail_step(5, 3, "old")
    reader.report(generation=1, step=0)
    reader.fail_step(1, 3, "new")
    assert [failure.message for failure in writer.failed_steps()] == ["new"]


def test_of_many_failed_steps_the_latest_are_told(
    pair: tuple[ShmPlanWriter, ShmPlanReader],
) -> None:
    writer, reader = pair
    for step in range(9):
        reader.fail_step(step, 1, str(step))
    assert [failure.message for failure in writer.failed_steps()] == ["6", "7", "8"]
    reader.fail_step(9, 1, "9")
    assert [failure.step_id for failure in writer.failed_steps()] == [9]


def test_a_segment_of_another_format_is_refused_by_name(
    run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpinfer.steps.shm_writer.FORMAT_VERSION", 99)
    writer = ShmPlanWriter(run_name, 1)
    with pytest.raises(RankError, match="format 99 and this rank reads format 2"):
        ShmPlanReader(run_name, 0, 1.0)
    writer.close()


def test_a_dead_reader_is_named_before_the_time_out(run_name: str, python_path: str) -> None:
    writer = ShmPlanWriter(run_name, 1, capacity_bytes=256, timeout_s=20.0)
    code = "import sys; from tpinfer.steps.shm_reader import *; ShmPlanReader(sys.argv[1], 0, 5)"
    reader = child(python_path, code, run_name)
    writer.wait_attached(10.0)
    reader.wait()
    [failure] = writer.failed_readers(check_processes=True)
    assert (failure.pid, failure.code) == (reader.pid, PROCESS_GONE)
    began_s = time.monotonic()
    with pytest.raises(RankError, match="has ended"):
        for _ in range(20):
            writer.send(b"x" * 40)
    assert time.monotonic() - began_s < 2.0
    writer.close()


def test_a_dead_writer_is_named_after_its_last_frame(run_name: str, python_path: str) -> None:
    code = (
        "import sys, os; from tpinfer.steps.shm_writer import *; w = ShmPlanWriter(sys.argv[1], 1);"
        "w.wait_attached(10); w.send(b'last'); os._exit(0)"
    )
    writer = child(python_path, code, run_name)
    reader = ShmPlanReader(run_name, 0, 10.0)
    writer.wait()
    assert reader.receive(1.0) == b"last"
    with pytest.raises(RankError, match=rf"rank 0 \(process {writer.pid}\) has ended"):
        reader.receive(10.0)
    reader.close()


@pytest.mark.ranks
def test_frames_go_there_and_back_between_processes(run_name: str, python_path: str) -> None:
    there, back = f"{run_name}-there", f"{run_name}-back"
    echo = child(python_path, ECHO, there, back)
    writer = ShmPlanWriter(there, 1)
    reader = ShmPlanReader(back, 0, 10.0)
    for number in range(300):
        frame = bytes([number % 256]) * (number + 1)
        writer.send(frame)
        assert reader.receive(10.0) == frame
    writer.send(b"end")
    assert echo.wait(10) == 0
    reader.close()
    writer.close()
