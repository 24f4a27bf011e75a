"""The overlapped loop on a fake device: plans run ahead of results by the depth, tokens are those
of the plain loop, and nothing is left over."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tpinfer.config.engine import RecordingRequest
from tpinfer.engine.executor import Done, Executor, ThreadDevice
from tpinfer.engine.recording import Recording
from tpinfer.engine.step_loop import MayPlan, StepLoop
from tpinfer.scheduling.limits import SchedulerLimits
from tpinfer.scheduling.request import Sequence as Running
from tpinfer.scheduling.scheduler import Scheduler
from tpinfer.steps.interface import StepFailure
from tpinfer.steps.plan import Command, SequenceRecord, StepPlan, decode
from tpinfer.steps.shm_reader import ShmPlanReader
from tpinfer.steps.shm_writer import ShmPlanWriter
from tpinfer.worker.host_spans import HostSpans
from tpinfer.worker.worker import StepResult

STOP = 7


class FakeDevice:
    """Knows each row's tokens as ranks do, draws from them, and runs a step only when its result is
    asked for: what was submitted by then was planned without knowing it."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.num_submitted = 0
        self.ahead: list[int] = []
        """Steps submitted and not run, whenever one is about to run."""
        self.num_run = 0

    def submit(self, records: Sequence[SequenceRecord], plan: StepPlan) -> "FakeStep":
        self.num_submitted += 1
        return FakeStep(self, records, plan)

    def close(self) -> None:
        self.rows.clear()


class FakeStep:
    def __init__(
        self, device: FakeDevice, records: Sequence[SequenceRecord], plan: StepPlan
    ) -> None:
        self._device, self._records, self._plan = device, records, plan

    def result(self) -> StepResult:
        device = self._device
        device.ahead.append(device.num_submitted - device.num_run)
        device.num_run += 1
        for row in self._plan.released_rows:
            device.rows.pop(row, None)
        for record in self._records:
            device.rows[record.row] = list(record.token_ids)
            device.computed[record.row] = record.num_computed
        drawn = []
        for row, count, samples in self._plan.parts():
            device.computed[row] += count
            tokens = device.rows[row]
            if samples:
                assert device.computed[row] == len(tokens), "a draw stands on all tokens before it"
                drawn.append((31 * sum(tokens) + len(tokens)) % 50)
                tokens.append(drawn[-1])
        return Done(StepResult(drawn)).result()


class FakeWorker:
    spans = HostSpans()


def limits(num_blocks: int) -> SchedulerLimits:
    return SchedulerLimits(
        block_size=4, num_blocks=num_blocks, max_num_seqs=5, max_num_batched_tokens=16,
        max_model_len=100,
    )  # fmt: skip


def requests() -> list[Running]:
    """Twelve."""
    return [
        Running(
            index=i, prompt_token_ids=tuple(range(i, i + 3 + 5 * (i % 3))), max_tokens=4 + 3 * i,
            stop_token_ids=frozenset([STOP]), accepted_ns=i,
        )
        for i in range(12)
    ]  # fmt: skip


def run(
    depth: int, num_blocks: int, may_plan: MayPlan | None = None
) -> tuple[list[list[int]], FakeDevice]:
    """Tokens of twelve requests, and the device that drew them."""
    scheduler, device = Scheduler(limits(num_blocks)), FakeDevice()
    executor = Executor(FakeWorker(), device, None)  # pyright: ignore[reportArgumentType]
    loop = StepLoop(scheduler, executor, HostSpans(), depth)
    sequences = requests()
    for sequence in sequences:
        scheduler.add(sequence)
    while loop.has_work:
        assert loop.step(may_plan) is not None, "work that never moves"
    scheduler.check_idle()
    assert device.num_submitted == device.num_run == loop.num_sent
    return [sequence.token_ids for sequence in sequences], device


@pytest.mark.parametrize("num_blocks", [200, 14])
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_the_loop_plans_ahead_and_draws_the_same_tokens(depth: int, num_blocks: int) -> None:
    plain, inline = run(1, num_blocks)
    assert set(inline.ahead) == {1}
    tokens, device = run(depth, num_blocks)
    assert tokens == plain
    assert max(device.ahead) == depth, "no plan was made while others were under way"
    assert any(sequence[-1] == STOP for sequence in plain), "nobody met the stop token"


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_recording_turns_on_and_off_with_nothing_on_its_way_at_its_very_steps(
    depth: int, tmp_path: Path
) -> None:
    """In a cache so small that plans are asked for more often than steps are handed over."""
    asked: list[tuple[int, int]] = []
    seen: list[tuple[str, int, int]] = []

    class Told:
        def command(self, command: Command) -> None:
            seen.append((command.name, *asked[-1]))

    class Captured:
        def start(self) -> None:
            assert seen[-1][0] == "profile_start"

        def stop(self) -> None:
            assert seen[-1][0] == "profile_stop"

    request = RecordingRequest(tmp_path, num_steps=5, num_skipped=3)
    recording = Recording(request, Captured(), Told())  # pyright: ignore[reportArgumentType]
    recording.before_run(0)

    def may_plan(num_sent: int, num_in_flight: int) -> bool:
        asked.append((num_sent, num_in_flight))
        return recording.may_plan(num_sent, num_in_flight)

    tokens, device = run(depth, 14, may_plan)
    assert seen == [("profile_start", 3, 0), ("profile_stop", 8, 0)]
    assert max(device.ahead) == depth
    assert tokens == run(1, 14)[0]


def test_behind_a_step_that_broke_off_none_runs() -> None:
    """Its collectives would meet those that other ranks are still in."""
    ran: list[int] = []

    class Broken:
        def admit(self, record: SequenceRecord) -> None:
            raise AssertionError("no step has records")

        def execute(self, plan: StepPlan) -> StepResult:
            ran.append(plan.step_id)
            if plan.step_id == 1:
                raise MemoryError("step 1")
            return StepResult([plan.step_id])

    device = ThreadDevice(Broken())  # pyright: ignore[reportArgumentType]
    steps = [device.submit((), StepPlan(i, (), (), ())) for i in range(4)]
    assert steps[0].result().tokens == [0]
    for step in steps[1:]:
        with pytest.raises(MemoryError, match="step 1"):
            step.result()
    device.close()
    assert ran == [0, 1]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("late_by", [0, 1, 2])
def test_a_failure_that_is_told_late_ends_those_it_damaged(depth: int, late_by: int) -> None:
    """Another host's word may come behind the step's last collective: at step 6 or after it."""

    class Wire:
        def __init__(self) -> None:
            self.num_looked = 0

        def send(self, payload: bytes) -> None:
            assert payload

        def failed_steps(self) -> list[StepFailure]:
            self.num_looked += 1
            return [StepFailure(0, 6, 3, "no memory")] * (self.num_looked == 7 + late_by)

    scheduler, device = Scheduler(limits(200)), FakeDevice()
    executor = Executor(FakeWorker(), device, Wire())  # pyright: ignore[reportArgumentType]
    loop = StepLoop(scheduler, executor, HostSpans(), depth)
    sequences = requests()
    for sequence in sequences:
        scheduler.add(sequence)
    damaged, failed = [], []
    while loop.has_work:
        outcome = loop.step()
        assert outcome is not None
        if outcome.scheduled.plan.step_id == 6:
            damaged = list(outcome.scheduled.sequences)
        failed += outcome.failed
        assert (outcome.failure is not None) == (outcome.scheduled.plan.step_id == 6 + late_by)
        assert not {one.id for one in outcome.failed} & {one.id for one, _ in outcome.drawn}
    scheduler.check_idle()
    assert failed and {one.id for one in failed} <= {one.id for one in damaged}
    plain, _ = run(1, 200)
    for sequence, tokens in zip(sequences, plain, strict=True):
        is_failed = any(sequence is one for one in failed)
        assert (sequence.finish_reason == "error") == is_failed
        assert sequence.token_ids == tokens[: len(sequence.token_ids)]
        assert is_failed or sequence.token_ids == tokens
    assert not executor._failures


def test_a_rank_that_comes_late_to_the_wire_still_hears_of_the_close(run_name: str) -> None:
    """Else it would look for a segment that is gone, and be killed after a while."""
    writer = ShmPlanWriter(run_name, 1)
    executor = Executor(FakeWorker(), FakeDevice(), writer)  # pyright: ignore[reportArgumentType]
    with ThreadPoolExecutor(1) as thread:
        closed = thread.submit(executor.close)
        time.sleep(0.1)
        reader = ShmPlanReader(run_name, 0, 2.0)
        assert decode(reader.receive(2.0)) == Command("close")
        closed.result(2.0)
    reader.close()
