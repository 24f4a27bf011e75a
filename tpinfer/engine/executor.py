"""The engine's only view of the ranks: one ordered stream from rank 0, followed by everybody.

Rank 0 sends each message and then does it itself; the others do it as it arrives.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

import torch

from tpinfer.config.errors import RankError
from tpinfer.steps.interface import PROCESS_GONE, PlanReader, PlanWriter
from tpinfer.steps.plan import Command, Message, SequenceRecord, StepPlan, decode, encode
from tpinfer.worker.worker import Finish, StepResult, Worker

OUT_OF_MEMORY = 3
"""Code of a step that a rank had no memory for."""
OTHER_RANK = 4
"""Code of a rank that cannot go on because another one does not."""
EXPLAIN_S = 0.5
"""A broken collective may be noticed a little before the end of the rank that broke it."""
ATTACH_GRACE_S = 2.0
"""How long closing waits for a rank that has not opened its end of the wire yet: it comes within
milliseconds, unless it hangs."""
_LOOK_AGAIN_S = 0.01
CommandCall = Callable[[Command], None]


class Pending(Protocol):
    """A step on its way."""

    def result(self) -> StepResult:
        """Wait for it."""
        ...


class Device(Protocol):
    """What runs rank 0's own part, in the order it is handed over."""

    def submit(self, records: Sequence[SequenceRecord], plan: StepPlan) -> Pending:
        """Open rows for the records, then run the step. May return before it has run."""
        ...

    def close(self) -> None:
        """Let go; called with nothing in flight."""
        ...


class Done:
    """A step that has run."""

    __slots__ = ("_result",)

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        """At once."""
        return self._result


def run_step(worker: Worker, records: Sequence[SequenceRecord], plan: StepPlan) -> StepResult:
    """One step of one rank."""
    for record in records:
        worker.admit(record)
    return worker.execute(plan)


class InlineDevice:
    """Runs each step while its caller waits: the plain loop."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def submit(self, records: Sequence[SequenceRecord], plan: StepPlan) -> Pending:
        """Returns when the step has run."""
        return Done(run_step(self._worker, records, plan))

    def close(self) -> None:
        """Nothing was opened."""


class Issued:
    """A step that a device was given."""

    __slots__ = ("_finish",)

    def __init__(self, finish: Finish) -> None:
        self._finish = finish

    def result(self) -> StepResult:
        """Wait for its tokens."""
        return self._finish()


class StreamDevice:
    """Hands steps to a GPU, which runs them one behind the other while the host plans on."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def submit(self, records: Sequence[SequenceRecord], plan: StepPlan) -> Pending:
        """Returns when the step has been issued."""
        for record in records:
            self._worker.admit(record)
        return Issued(self._worker.issue(plan))

    def close(self) -> None:
        """Nothing was opened."""


class ThreadDevice:
    """Runs steps on a thread of its own, so that the next one is planned meanwhile: torch lets go
    of the interpreter inside its kernels."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        threads = torch.get_num_threads()  # a thread's pool of its own would take the default size
        self._thread = ThreadPoolExecutor(
            1, "tpinfer-device", initializer=torch.set_num_threads, initargs=(threads,)
        )
        self._error: BaseException | None = None

    def submit(self, records: Sequence[SequenceRecord], plan: StepPlan) -> Pending:
        """Returns at once."""
        return self._thread.submit(self._run, records, plan)

    def _run(self, records: Sequence[SequenceRecord], plan: StepPlan) -> StepResult:
        """Behind a step that broke off none runs: its collectives would meet those that the other
        ranks are still in."""
        if self._error is not None:
            raise self._error
        try:
            return run_step(self._worker, records, plan)
        except BaseException as error:
            self._error = error
            raise

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


class Executor:
    """Rank 0's side."""

    def __init__(self, worker: Worker, device: Device, wire: PlanWriter | None) -> None:
        self._worker = worker
        self._device = device
        self._wire = wire
        self._failures: dict[int, str] = {}  # by step

    def submit(self, records: Sequence[SequenceRecord], plan: StepPlan) -> Pending:
        """Hand one step to every rank."""
        if self._wire is not None:
            with self._worker.spans.part("ipc"):
                for record in records:
                    self._wire.send(encode(record))
                self._wire.send(encode(plan))
        return self._device.submit(records, plan)

    def failure(self, plan: StepPlan, result: StepResult) -> str | None:
        """Why some rank could not do a step that has run; None where all did.

        A rank says so before it joins the step's last collective: what is not known once this
        rank's result is there did not happen.
        """
        if self._wire is not None:
            for failed in self._wire.failed_steps():
                self._failures[failed.step_id] = f"rank {failed.rank}: {failed.message}"
        told = self._failures.pop(plan.step_id, None)
        return result.failure or told

    def late_failures(self, before: int) -> dict[int, str]:
        """Step id -> why some rank could not do it, of steps earlier than `before` that `failure`
        knew nothing of: another host's word may come a moment behind the step's last collective."""
        late = {step_id: why for step_id, why in self._failures.items() if step_id < before}
        for step_id in late:
            del self._failures[step_id]
        return late

    def explain(self, error: RankError) -> RankError:
        """`error` as this rank met it, or what is known of a rank that has ended since."""
        until_s = time.monotonic() + EXPLAIN_S
        while self._wire is not None:
            causes = [one for one in self._wire.failed_readers() if one.code != OTHER_RANK]
            if causes:
                first = causes[0]
                verb = "is gone" if first.code == PROCESS_GONE else "failed"
                return RankError(f"rank {first.rank} {verb}: {first.message}")
            if time.monotonic() > until_s:
                break
            time.sleep(_LOOK_AGAIN_S)
        return error

    def command(self, command: Command) -> None:
        """Tell the other ranks; the caller does rank 0's part itself. Nothing may be in flight."""
        self._send(command)

    def close(self) -> None:
        """Tell the other ranks to stop and let go of the wire."""
        self._device.close()
        if self._wire is not None:
            self._send(Command("close"))
            with suppress(RankError):  # one that is gone needs no word
                # The name goes with the wire: who has not opened it yet would look for it for long.
                self._wire.wait_attached(ATTACH_GRACE_S)
            self._wire.close()

    def _send(self, message: Message) -> None:
        if self._wire is None:
            return
        with self._worker.spans.part("ipc"):
            self._wire.send(encode(message))


def follow(worker: Worker, wire: PlanReader, on_command: CommandCall, generation: int = 0) -> bool:
    """The life of a rank other than 0: do what arrives until `close` or `return`. True when rank 0
    goes on later. What ends it otherwise is told to rank 0."""
    worker.tell_failure = lambda step_id, text: wire.fail_step(step_id, OUT_OF_MEMORY, text)
    try:
        return _follow(worker, wire, on_command, generation)
    except RankError as error:
        wire.fail(str(error), OTHER_RANK)
        raise
    except Exception as error:
        wire.fail(f"{type(error).__name__}: {error}")
        raise


def _follow(worker: Worker, wire: PlanReader, on_command: CommandCall, generation: int) -> bool:
    ahead: Finish | None = None  # a step that a GPU still runs while the next is issued to it
    while True:
        with worker.spans.part("plan_wait"):
            message = decode(wire.receive(None, None))
        if isinstance(message, StepPlan):
            before, ahead = ahead, worker.issue(message)
            wire.report(generation, message.step_id)
            if before is not None:
                before()
            if not worker.issues_ahead:
                ahead()  # it has run
                ahead = None
            continue
        if ahead is not None and not isinstance(message, SequenceRecord):
            ahead()
            ahead = None
        if isinstance(message, SequenceRecord):
            worker.admit(message)
        elif message.name == "close":
            wire.close()
            return False
        elif message.name == "return":
            return True
        else:
            on_command(message)
