"""How a Checkpointer that is not closed ends: what is complete and unchanged is committed, in bounded time."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from outlast.checkpoint import process_exit
from outlast.checkpoint.durability import Durability
from outlast.checkpoint.save.background import raise_error
from outlast.checkpoint.save.job import SaveJob
from outlast.checkpoint.storage.io_threads import process_ended
from outlast.checkpoint.tiers.manager import Tiers
from outlast.errors import CheckpointError, NotDurable

_log = logging.getLogger("outlast.checkpoint")
_AFTER_ERROR_S = 10.0
"""How long a process that an exception ends waits at most: its peers, and whoever restarts it, wait for its end."""


class Ending:
    """The end of one rank that does not close its Checkpointer.

    Args:
        exit_wait_s: see :class:`CheckpointConfig`.
        error: that ends training; None: the process ends.
        failing: whether the process ends with an error.
        exiting: whether the interpreter exits; the time is then one for all Checkpointers of the process.
    """

    def __init__(
        self, exit_wait_s: float, error: BaseException | None = None, *, failing: bool = True, exiting: bool = False
    ) -> None:
        self._error = error
        self._failing = failing
        self._limit_s = min(_AFTER_ERROR_S, exit_wait_s) if failing else exit_wait_s
        left_s = process_exit.left_s(self._limit_s) if exiting else self._limit_s
        self._deadline = time.monotonic() + left_s

    def carry_out(self, saving: SaveJob | None, tiers: Tiers | None, next_save_id: int) -> None:
        """Commit what can be within the time, and give up the rest; what a save has run into is logged.

        A tensor that is unchanged by now stays so, since nobody trains any more. A rank that has saved nothing
        waits for no other: none sends to it.

        Args:
            saving: the running save, or the last.
            tiers: None: there is none but storage.
            next_save_id: of no save; equal on all ranks.
        """
        try:
            if saving is not None:
                self._finish(saving)
            if tiers is not None:
                tiers.end_within(self._left_s, self._reason(late=True))
                if saving is not None and not self._failing:
                    tiers.finish(next_save_id, self._check)
        except Exception as problem:  # of a save that has ended; there is nobody to raise it to
            if not isinstance(problem, CheckpointError):  # those are reported
                _log.error("at the end of training: %s: %s", type(problem).__name__, problem)
        except BaseException:  # a second Ctrl-C: nothing is waited for any more
            give_up(saving, tiers, self._reason())
            raise

    def _finish(self, saving: SaveJob) -> None:
        if saving.copied.wait(self._left_s):
            saving.confirm()
        else:
            saving.give_up(self._reason(late=True))
        if not saving.done.wait(self._left_s):
            saving.give_up(self._reason(late=True))
        saving.join()
        raise_error(saving)

    @property
    def _left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _check(self) -> None:
        if not self._left_s:
            raise CheckpointError(f"the process ends, and {self._limit_s:g} s are over")

    def _reason(self, *, late: bool = False) -> CheckpointError:
        within = f" within {self._limit_s:g} s" if late else ""
        return process_ended(within) if self._error is None else ended_by(self._error, within)


def ended_by(error: BaseException, within: str = "") -> CheckpointError:
    """Why a save is given up that is under way when an exception ends training."""
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return CheckpointError(f"training ended with {what}, and the checkpoint was not committed{within}")


def give_up(saving: SaveJob | None, tiers: Tiers | None, reason: Exception) -> None:
    """Have whatever is on its way stop where it next checks for that, clean up, and be reported as failed."""
    if saving is not None:
        saving.give_up(reason)
    if tiers is not None:
        tiers.abort(reason)


class AtExit:
    """What is done if the interpreter exits and nobody has closed the Checkpointer; see :mod:`process_exit`.

    Args:
        leave: ends the Checkpointer so.
        durability: of what was saved.
        exit_wait_s: see :class:`CheckpointConfig`.
    """

    def __init__(self, leave: Callable[[Ending], None], durability: Durability, exit_wait_s: float) -> None:
        self.user: threading.Thread | None = None
        """The thread that saves."""
        self.pid = os.getpid()
        self._leave = leave
        self._durability = durability
        self._exit_wait_s = exit_wait_s
        process_exit.add(self)

    @property
    def in_use(self) -> bool:
        """Whether the thread that saves goes on after the main thread has ended."""
        user = self.user
        return user is not None and user is not threading.current_thread() and user.is_alive() and not user.daemon

    def end_at_exit(self) -> None:
        """Commit what is complete and unchanged; if the last save is not durable, say so, also by the exit status."""
        self._leave(Ending(self._exit_wait_s, failing=process_exit.by_exception(), exiting=True))
        try:
            self._durability.check()
        except NotDurable as error:
            _log.error("%s", error)
            process_exit.end_with_failure()

    def cancel(self) -> None:
        """There is nothing to do any more."""
        process_exit.remove(self)
