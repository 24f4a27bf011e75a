"""What the host does outside the ops, as spans on the monotonic clock, and for a recorder too where
one is on."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter_ns

from tpinfer.costs.step_record import HostSpan
from tpinfer.worker.annotations import Annotate


class HostSpans:
    """Spans of one rank until they are taken."""

    def __init__(self) -> None:
        self.spans: list[HostSpan] = []
        self.annotate: Annotate | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Everything in the block is `name`: one of `schedule`, `plan_wait`, `prepare`, ..."""
        began_ns = perf_counter_ns()
        with self.named(name):
            yield
        self.spans.append(HostSpan(name, began_ns, perf_counter_ns()))

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
