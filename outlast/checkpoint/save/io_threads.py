"""The threads that read and write files, and what a save that outlives the program meets there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, ParamSpec, TypeVar

from outlast.errors import CheckpointError

P = ParamSpec("P")
T = TypeVar("T")


class IoThreads(ThreadPoolExecutor):
    """A pool of threads that works without threads, too: where none can be had, whoever asks does the work.

    That is so when a limit of threads is reached, and from the end of the main thread on, when the interpreter gives no
    pool any more work although other threads still train.
    """

    _closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As of the base class; the work may be done when this returns.

        Raises:
            CheckpointError: the pool was shut down.
        """
        if self._closed:
            raise CheckpointError("the threads of this Checkpointer have ended, since it was closed")
        work = _Once(partial(fn, *args, **kwargs))
        try:
            super().submit(work)
        except RuntimeError:
            work()  # it may be in the pool's queue all the same
        return work.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As of the base class; but work that was taken is always done."""
        self._closed = True
        super().shutdown(wait)


class _Once(Generic[T]):
    """A piece of work for whichever thread comes first."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.future: Future[T] = Future()
        self._work = work
        self._taken = threading.Lock()

    def __call__(self) -> None:
        if not self._taken.acquire(blocking=False):
            return
        try:
            self.future.set_result(self._work())
        except BaseException as error:  # raised where the result is read
            self.future.set_exception(error)


def process_ended(how: str = "") -> CheckpointError:
    """Why a save fails that is under way when its process ends without closing the Checkpointer."""
    return CheckpointError(
        f"the process ended before the checkpoint was committed{how}",
        "call Checkpointer.close() at the end of training, or use the Checkpointer in a with statement",
    )
