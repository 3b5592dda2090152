"""The threads that read and write files, and what a save that outlives the program meets there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from outlast.errors import CheckpointError

P = ParamSpec("P")
T = TypeVar("T")


class IoThreads(ThreadPoolExecutor):
    """A pool of threads whose refusal says that the process is ending.

    When the interpreter exits, :mod:`concurrent.futures` refuses work first, and only then are ``atexit`` callbacks
    called. A save in a daemon thread may meet either first, and reports the same of both: :func:`process_ended`.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As of the base class.

        Raises:
            CheckpointError: the interpreter is exiting, or the pool was shut down.
        """
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError as error:
            raise process_ended() from error

    @property
    def refuse(self) -> bool:
        """Whether no more work is taken."""
        try:
            self.submit(int)
        except CheckpointError:
            return True
        return False


def process_ended() -> CheckpointError:
    """Why a save fails that is under way when its process ends without closing the Checkpointer."""
    return CheckpointError(
        "the process ended before the checkpoint was committed",
        "call Checkpointer.close() at the end of training, or use the Checkpointer in a with statement",
    )
