"""One thread for all steps of an engine, so that a signal's exception, which the interpreter raises
in the main thread wherever that is, never tears a step apart; and callers from several threads
take turns."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import torch

from tpinfer.config.errors import RankError

T = TypeVar("T")
_Job = Callable[[], None]


class OwnThread:
    """Runs calls in the order they come. A daemon: a program that never closes it can end."""

    def __init__(self, name: str) -> None:
        threads = torch.get_num_threads()  # a thread's pool of its own would take the default size
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # nothing is put in behind the end
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, args=(threads,), name=name, daemon=True)
        self._thread.start()

    def run(self, call: Callable[[], T], leave: Callable[[], None]) -> T:
        """What `call` returns or raises. When a signal's exception ends the wait, `leave` asks the
        call to end soon, and the exception goes on once it has; a second one goes on at once.
        Raises RankError after `close`.
        """
        future: Future[T] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)

        with self._lock:
            if self._is_closed:
                raise RankError("the engine was closed; start a new one")
            self._jobs.put(job)
        try:
            return future.result()
        except BaseException:
            if not future.done() and not future.cancel():
                leave()
                wait([future])
            raise

    def post(self, call: Callable[[], None]) -> None:
        """Have `call` run behind those that wait, with nobody waiting for it; nothing after
        `close`. It must not raise."""
        with self._lock:
            if not self._is_closed:
                self._jobs.put(call)

    def close(self, timeout_s: float) -> bool:
        """Take no more calls; whether what was there has come to its end in time."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._jobs.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        while (job := self._jobs.get()) is not None:
            job()
