"""The threads that read and write files, and what a save that outlives the program meets there."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from outlast.errors import CheckpointError

P = ParamSpec("P")
T = TypeVar("T")

SILENT_S = 300.0
"""A storage that has not answered for this long is not waited for, where no setting says otherwise."""
_LOOK_S = 1.0
_END_S = 30.0
"""How long the end waits for threads that are still inside the storage."""
_log = logging.getLogger("outlast.checkpoint")
_Task = tuple[Future[Any], Callable[[], Any]]


class IoThreads(Executor):
    """A pool of threads of which nobody waits for one that hangs: in a storage that does not answer, a call may never
    come back.

    :class:`~concurrent.futures.ThreadPoolExecutor` has the interpreter wait for its threads at exit, without a bound,
    and refuses work from the end of the main thread on, although other threads may still train. These are daemons.
    Where no thread can be had, because a limit is reached, whoever asks does the work.

    Args:
        threads: how many at most.
        limit_s: how long :meth:`map` waits for a result while none arrives.

    Attributes:
        answers: how many tasks have ended.
    """

    def __init__(self, threads: int, limit_s: float = SILENT_S) -> None:
        self.answers = 0
        self._limit_s = limit_s
        self._most = threads
        self._threads: list[threading.Thread] = []
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As of the base class; the work may be done when this returns.

        Raises:
            CheckpointError: the pool was shut down.
        """
        future: Future[T] = Future()
        task = future, partial(fn, *args, **kwargs)
        with self._lock:
            if self._closed:
                raise CheckpointError("the threads of this Checkpointer have ended, since it was closed")
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._most:
                thread = threading.Thread(target=self._work, name="outlast-checkpoint", daemon=True)
                with suppress(RuntimeError):  # no more threads
                    thread.start()
                    self._threads.append(thread)
            if self._threads:
                self._tasks.put(task)
                return future
        self._do(task)
        return future

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """As of the base class; without a ``timeout``, each result has ``limit_s`` after the one before.

        Raises:
            ConnectionError: (while iterating) no task has ended within the limit: the storage does not answer.
        """
        limit_s = self._limit_s if timeout is None else timeout
        futures = deque(self.submit(fn, *arguments) for arguments in zip(*iterables, strict=False))

        def results() -> Iterator[T]:
            try:
                while futures:
                    self._await(futures[0], limit_s)
                    yield futures.popleft().result(timeout=0)
            finally:
                for future in futures:
                    future.cancel()

        return results()

    def _await(self, future: Future[Any], limit_s: float) -> None:
        answers, silent_s = self.answers, 0.0
        while not wait([future], timeout=min(_LOOK_S, limit_s)).done:
            silent_s += min(_LOOK_S, limit_s)
            if self.answers != answers:
                answers, silent_s = self.answers, 0.0
            if silent_s >= limit_s:
                raise ConnectionError(f"the storage has not answered for {limit_s:g} s")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As of the base class, but work that was taken is always done, and threads that hang are waited for no longer
        than ``limit_s``, and 30 s."""
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._tasks.put(None)
        if not wait:
            return
        deadline = time.monotonic() + min(self._limit_s, _END_S)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        hanging = sum(thread.is_alive() for thread in self._threads)
        if hanging:
            _log.warning("%d threads still wait for the storage; they are not waited for", hanging)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._do(task)
            del task
            self._idle.release()

    def _do(self, task: _Task) -> None:
        future, do = task
        if future.set_running_or_notify_cancel():
            try:
                result = do()
            except BaseException as error:  # raised where the result is read
                future.set_exception(error)
            else:
                future.set_result(result)
        self.answers += 1


def process_ended(how: str = "") -> CheckpointError:
    """Why a save fails that is under way when its process ends without closing the Checkpointer."""
    return CheckpointError(
        f"the process ended before the checkpoint was committed{how}",
        "call Checkpointer.close() at the end of training, or use the Checkpointer in a with statement",
    )
