"""The engine's only view of the ranks: one ordered stream from rank 0, followed by everybody.

Rank 0 sends each message and then does it itself; the others do it as it arrives.
"""

from collections.abc import Callable

from tpinfer.steps.plan import Command, Message, SequenceRecord, StepPlan, decode, encode
from tpinfer.steps.wire import PlanReader, PlanWriter
from tpinfer.worker.worker import Worker

CommandCall = Callable[[Command], None]


class Executor:
    """Rank 0's side."""

    def __init__(self, worker: Worker, wire: PlanWriter | None) -> None:
        self._worker = worker
        self._wire = wire

    def admit(self, record: SequenceRecord) -> None:
        """Open a row on every rank."""
        self._send(record)
        self._worker.admit(record)

    def execute(self, plan: StepPlan) -> list[int]:
        """Run one step on every rank; returns the sampled tokens in plan order."""
        self._send(plan)
        return self._worker.execute(plan)

    def command(self, command: Command) -> None:
        """Tell the other ranks; the caller does rank 0's part itself."""
        self._send(command)

    def close(self) -> None:
        """Tell the other ranks to stop and let go of the wire."""
        if self._wire is not None:
            self._send(Command("close"))
            self._wire.close()

    def _send(self, message: Message) -> None:
        if self._wire is None:
            return
        with self._worker.spans.part("ipc"):
            self._wire.send(encode(message))


def follow(worker: Worker, wire: PlanReader, on_command: CommandCall) -> None:
    """The life of a rank other than 0: do what arrives until `close`."""
    while True:
        with worker.spans.part("plan_wait"):
            message = decode(wire.receive(None, None))
        if isinstance(message, StepPlan):
            worker.execute(message)
        elif isinstance(message, SequenceRecord):
            worker.admit(message)
        elif message.name == "close":
            wire.close()
            return
        else:
            on_command(message)
