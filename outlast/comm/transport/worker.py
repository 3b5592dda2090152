"""One thread that runs jobs in the order in which they were handed in, and a wait for them that has an end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from outlast.errors import CommError

T = TypeVar("T")

MARGIN_S = 10.0
"""What a wait allows beyond the limit of the collective that it waits for, which should have ended by itself."""


class OrderedWorker:
    """Runs jobs one at a time, first in, first out, in a daemon thread of its own.

    After a job has raised, or after :meth:`abort`, the jobs behind it do not run; their futures get the same error. So
    no collective is issued after the order is broken.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Callable[[BaseException], None]] | None]
        self._jobs = queue.SimpleQueue()
        self._closed = False
        self._failure: BaseException | None = None
        self.progress = 0
        """Counts what has ended: jobs, and parts of jobs that say so. It stands still where a thread is stuck."""
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

    def abort(self, error: BaseException) -> None:
        """Have no job begin any more: those that wait get ``error``. One that runs goes on. Returns at once."""
        self._failure = self._failure or error

    def close(self, timeout_s: float) -> bool:
        """Let the queued jobs finish, and end the thread; returns whether it ended within ``timeout_s`` seconds."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            run, fail = item
            if self._failure is None:
                try:
                    run()
                except BaseException as error:
                    self._failure = self._failure or error
                    fail(error)
            else:
                fail(self._failure)
            self.progress += 1
            del item, run, fail  # keeps no job's tensors alive while it waits for the next


def outcome(future: Future[T], workers: Sequence[OrderedWorker], limit_s: float, what: str) -> T:
    """The result of a job, or of a chain of jobs, in ``workers``; raises what they raised.

    Every collective has a limit of its own, so this waits as long as something moves.

    Args:
        future: of the last job.
        workers: those that work on it.
        limit_s: how long none of them may get anything done.
        what: what is waited for, for the error.

    Raises:
        CommError: nothing got done for ``limit_s`` seconds.
    """
    seen = -1
    while True:
        try:
            return future.result(timeout=limit_s)
        except TimeoutError:
            if future.done():
                raise  # it is what the job raised
            now = sum(worker.progress for worker in workers)
            if now == seen:
                raise CommError(
                    f"{what}: nothing has moved for {limit_s:g} s, though a collective ends within its limit",
                    "a thread of this process or its device is stuck: look at its stacks (py-spy dump)",
                ) from None
            seen = now
