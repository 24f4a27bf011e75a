"""The overlapped loop on a fake device: plans run ahead of results by the depth, tokens are those
of the plain loop, and nothing is left over."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tpinfer.engine.executor import Done, Executor
from tpinfer.engine.step_loop import StepLoop
from tpinfer.scheduling.limits import SchedulerLimits
from tpinfer.scheduling.request import Sequence as Running
from tpinfer.scheduling.scheduler import Scheduler
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


def run(depth: int, num_blocks: int) -> tuple[list[list[int]], FakeDevice]:
    """Tokens of twelve requests, and the device that drew them."""
    limits = SchedulerLimits(
        block_size=4, num_blocks=num_blocks, max_num_seqs=5, max_num_batched_tokens=16,
        max_model_len=100,
    )  # fmt: skip
    scheduler, device = Scheduler(limits), FakeDevice()
    executor = Executor(FakeWorker(), device, None)  # pyright: ignore[reportArgumentType]
    loop = StepLoop(scheduler, executor, HostSpans(), depth)
    sequences = [
        Running(
            index=i, prompt_token_ids=tuple(range(i, i + 3 + 5 * (i % 3))), max_tokens=4 + 3 * i,
            stop_token_ids=frozenset([STOP]), accepted_ns=i,
        )
        for i in range(12)
    ]  # fmt: skip
    for sequence in sequences:
        scheduler.add(sequence)
    while loop.has_work:
        assert loop.step() is not None, "work that never moves"
    scheduler.check_idle()
    assert device.num_submitted == device.num_run
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
