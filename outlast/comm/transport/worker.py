"""One thread that runs jobs in the order in which they were handed in."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from outlast.errors import CommError

T = TypeVar("T")


class OrderedWorker:
    """Runs jobs one at a time, first in, first out, in a daemon thread of its own.

    After a job has raised, the jobs behind it do not run; their futures get the same error. So no collective is issued
    after the order is broken.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Callable[[BaseException], None]] | None]
        self._jobs = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Queue ``job``; the future gets its result or error.

        Raises:
            CommError: the worker was closed.
        """
        if self._closed:
            raise CommError(f"{self._thread.name}: used after close()")
        future: Future[T] = Future()
        self._jobs.put((lambda: future.set_result(job()), future.set_exception))
        return future

    def close(self, timeout_s: float) -> bool:
        """Let the queued jobs finish, and end the thread; returns whether it ended within ``timeout_s`` seconds."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        failure: BaseException | None = None
        while (item := self._jobs.get()) is not None:
            run, fail = item
            if failure is None:
                try:
                    run()
                except BaseException as error:
                    failure = error
            if failure is not None:
                fail(failure)
            del item, run, fail  # keeps no job's tensors alive while it waits for the next
