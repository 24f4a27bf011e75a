"""The two ends of the step-plan wire, whatever carries it: shared memory, TCP, or both at once.

Readers are numbered from 0 and stand for the ranks behind rank 0: reader i is rank i + 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tpinfer.config.errors import RankError
from tpinfer.steps.plan import FORMAT_VERSION

PROCESS_GONE = 1
"""Code of a failure nobody reported: the reader's process or its connection has ended."""
LARGEST_MESSAGE_BYTES = 192
"""Of what a reader says when it cannot go on."""
LARGEST_STEP_MESSAGE_BYTES = 96
"""Of what it says of a single step."""


@dataclass(frozen=True, slots=True)
class ReaderFailure:
    """A reader that reported an error, or whose process is gone."""

    index: int
    """Slot of the reader."""
    pid: int
    """Process of the reader, on its own host."""
    code: int
    """What the reader passed to `fail`, or PROCESS_GONE."""
    message: str
    """The reader's own words, cut to 192 bytes."""

    @property
    def rank(self) -> int:
        """Rank of the reader."""
        return self.index + 1


@dataclass(frozen=True, slots=True)
class StepFailure:
    """A step that a reader could not do. The reader itself lives on."""

    index: int
    """Slot of the reader."""
    step_id: int
    code: int
    """What the reader passed to `fail_step`."""
    message: str
    """The reader's own words, cut to 96 bytes."""

    @property
    def rank(self) -> int:
        """Rank of the reader."""
        return self.index + 1


class PlanWriter(ABC):
    """Rank 0's end."""

    @abstractmethod
    def send(self, payload: bytes) -> None:
        """Hand one frame to every reader, in order; waits while one leaves no room. Raises
        RankError when a reader fails meanwhile, or the wire's time-out passes."""

    @abstractmethod
    def wait_attached(self, timeout_s: float) -> None:
        """Return once every reader is there. Raises RankError on time-out."""

    @abstractmethod
    def failed_readers(self, check_processes: bool | None = None) -> list[ReaderFailure]:
        """Readers that cannot go on, and readers that are gone. Cheap enough for every step."""

    @abstractmethod
    def failed_steps(self) -> list[StepFailure]:
        """Steps that readers could not do and that no earlier call has told. Cheap enough for
        every step."""

    @abstractmethod
    def reader_progress(self) -> list[tuple[int, int]]:
        """Last `(generation, step)` that each reader reported; (0, 0) before."""

    def local_pids(self, ranks: Sequence[int]) -> Sequence[int]:
        """Processes of those of `ranks` that run on this host, as far as the wire knows them."""
        return ()

    @abstractmethod
    def close(self) -> None:
        """Tell readers that nothing follows and let go of everything. May be called twice."""


class PlanReader(ABC):
    """The end of any other rank."""

    @abstractmethod
    def receive(
        self, timeout_s: float | None = None, poll: Callable[[], None] | None = None
    ) -> bytes:
        """The next frame, in order. `poll` runs every ms of waiting and may raise. Raises RankError
        on time-out, and when rank 0 has closed or is gone and all was read."""

    @abstractmethod
    def report(self, generation: int, step: int) -> None:
        """Say which step this rank has finished. A later generation takes back what `fail_step`
        said and rank 0 has not heard yet: it was about a group that is gone."""

    @abstractmethod
    def fail_step(self, step_id: int, code: int, message: str) -> None:
        """Say that this rank could not do a step but lives on.

        Call it before the step's last collective: on one host, rank 0 has only to look once it is
        through that; from another host the word may come a moment later. `code` must be positive.
        """

    @abstractmethod
    def fail(self, message: str, code: int = 2) -> None:
        """Say that this rank cannot go on. `code` must be positive."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. May be called twice."""


def check_code(code: int) -> None:
    """Raise ValueError for a code that would say nothing is wrong."""
    if not 0 < code < 1 << 32:
        raise ValueError(f"code={code} must be positive and below 2**32; 0 means no error")


def check_format_version(theirs: int, who: str, ours: int = FORMAT_VERSION) -> None:
    """Raise RankError unless the other end writes its records as this one does."""
    if theirs != ours:
        raise RankError(
            f"{who} writes step plans of format {theirs} and this rank reads format {ours}; "
            "install the same version of tpinfer on every host"
        )


def cut(message: str, largest_bytes: int) -> bytes:
    """`message` as UTF-8 of at most so many bytes, no character broken."""
    return message.encode()[:largest_bytes].decode(errors="ignore").encode()


def closed_here() -> RankError:
    """The error of any call on an end that was closed."""
    return RankError("the step-plan wire was closed on this rank; open a new engine")
