"""A step's deadline, kept by a thread of its own: the one that runs steps may hang in native code,
waiting for a rank that hangs too."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOOK_S = 0.1


class StepWatch:
    """Calls `on_late`, once for each wait that takes too long."""

    def __init__(
        self, timeout_s: float, first_timeout_s: float, on_late: Callable[[float], None]
    ) -> None:
        """The first wait may take `first_timeout_s`: kernels are compiled in it. `on_late` is told
        how many seconds were allowed."""
        self._timeout_s = timeout_s
        self._allowed_s = first_timeout_s
        self._on_late = on_late
        self._until_s: float | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tpinfer-deadline", daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What runs inside is one wait for all ranks."""
        self._until_s = time.monotonic() + self._allowed_s
        try:
            yield
        finally:
            self._until_s = None
        self._allowed_s = self._timeout_s

    @property
    def is_waiting(self) -> bool:
        """Whether a wait has not come to its end."""
        return self._until_s is not None

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        told_s: float | None = None
        while not self._closing.wait(_LOOK_S):
            until_s = self._until_s
            if until_s is not None and until_s != told_s and time.monotonic() > until_s:
                told_s = until_s
                self._on_late(self._allowed_s)
