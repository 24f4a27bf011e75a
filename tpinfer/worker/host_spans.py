"""What the host does outside the ops, as spans on the monotonic clock, and for a recorder too where
one is on."""

from contextlib import AbstractContextManager, nullcontext
from time import perf_counter_ns
from types import TracebackType

from tpinfer.costs.step_record import HostSpan
from tpinfer.worker.annotations import Annotate


class HostSpans:
    """Spans of one rank until they are taken."""

    def __init__(self) -> None:
        self.spans: list[HostSpan] = []
        self.annotate: Annotate | None = None

    def part(self, name: str) -> "Part":
        """Everything in the block is `name`: one of `schedule`, `plan_wait`, `prepare`, ..."""
        return Part(self, name)

    def named(self, name: str) -> AbstractContextManager[object]:
        """The block's name for the recorder alone; `add` gives its span later."""
        return nullcontext() if self.annotate is None else self.annotate(f"tpinfer.host {name}")

    def add(self, name: str, began_ns: int, ended_ns: int) -> None:
        """A span that has been timed already."""
        self.spans.append(HostSpan(name, began_ns, ended_ns))

    def mark(self, name: str) -> None:
        """A moment for the recorder; nothing without one."""
        if self.annotate is not None:
            with self.annotate(name):
                return

    def take(self) -> list[HostSpan]:
        """The spans since the last call."""
        taken, self.spans = self.spans, []
        return taken

    def forget_before(self, moment_ns: int) -> None:
        """Drop spans that ended by then."""
        self.spans = [span for span in self.spans if span.end_ns > moment_ns]


class Part:
    """One block of `HostSpans.part`; a class, since a generator's frame costs a step more."""

    __slots__ = ("_began_ns", "_name", "_range", "_spans")

    def __init__(self, spans: HostSpans, name: str) -> None:
        self._spans = spans
        self._name = name
        self._range: AbstractContextManager[object] | None = None
        self._began_ns = 0

    def __enter__(self) -> None:
        self._began_ns = perf_counter_ns()
        if self._spans.annotate is not None:
            self._range = self._spans.named(self._name)
            self._range.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._range is not None:
            self._range.__exit__(kind, error, trace)
        if kind is None:
            self._spans.add(self._name, self._began_ns, perf_counter_ns())
