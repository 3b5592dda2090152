"""Work in a thread of its own, and how training waits for it: as long as it comes forward, and no longer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from outlast.checkpoint.format.names import STORAGE
from outlast.checkpoint.shortage import as_os_error, start
from outlast.errors import CheckpointError, PlaceInUse, SnapshotMutated, StateMismatch
from outlast.events import CheckpointFailed, Event

_log = logging.getLogger("outlast.checkpoint")
_LOOK_S = 1.0
_END_S = 30.0
"""How long the end of training waits for a thread that does not come forward."""


class Background:
    """Work in a daemon thread. What is not said otherwise is for the training thread.

    Args:
        step: that it is about.
        tier: where to, for events.
        name: of the thread.
        limit_s: training does not wait longer than this while nothing is done.

    Attributes:
        done: set once it has ended.
        error: what must be raised in the training thread: a bug, or an error of ``on_event``.
        lost: whether training has stopped waiting, because nothing was done within the limit.
    """

    def __init__(self, step: int, tier: str, on_event: Callable[[Event], None], *, name: str, limit_s: float) -> None:
        self.step = step
        self.done = threading.Event()
        self.error: Exception | None = None
        self.lost = False
        self._tier = tier
        self._on_event = on_event
        self._limit_s = limit_s
        self._reported = False
        """Whether its end is told."""
        self._report_lock = threading.Lock()
        self._signs = 0
        self._refused: OSError | None = None
        """Why there is no thread for it."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def hangs(self) -> bool:
        """Whether training has stopped waiting, and the thread still has not ended."""
        return self.lost and not self.done.is_set()

    def refuses(self, step: int) -> bool:
        """Whether a later step cannot be saved, because this one hangs; that is reported."""
        if not self.hangs:
            return False
        reason = f"the save of step {self.step} still hangs, because its storage does not answer"
        _log.warning("checkpoint of step %d failed%s: %s", step, _in(self._tier), reason)
        self._on_event(CheckpointFailed(step=step, reason=reason, tier=self._tier))
        return True

    def start(self) -> None:
        """Start the thread; if there can be no more threads, the work has failed when this returns."""
        try:
            start(self._thread)
        except OSError as error:  # no more threads: what is left is to report it, which this one can do
            self._refused = error
            self.give_up(error)
            self._run()

    def join(self) -> None:
        """Wait until the thread has ended, but not for one that hangs."""
        self.wait(self.done, min(self._limit_s, _END_S))
        if not self.hangs and self._thread.ident is not None:
            self._thread.join(_END_S)

    def wait(self, until: threading.Event, limit_s: float | None = None) -> None:
        """Wait for an event of the thread's.

        If nothing is done for the limit, the work is given up and reported as failed, and this returns: the thread
        hangs in a call that does not come back, as of a storage that does not answer. Time in which this process does
        not run does not count.
        """
        limit_s = self._limit_s if limit_s is None else limit_s
        look_s = min(_LOOK_S, limit_s / 4)
        signs, silent_s = self.signs(), 0.0
        while not self.lost and not until.wait(look_s):
            silent_s += look_s
            if self.signs() != signs:
                signs, silent_s = self.signs(), 0.0
            if silent_s >= limit_s:
                self.lost = True
                self.give_up(
                    CheckpointError(
                        f"nothing was done for {limit_s:g} s: the thread that saves step {self.step} hangs in "
                        f"{self._where()}, which does not answer",
                        "look whether that can be read and written; if it is only slow, raise "
                        "checkpoint.commit_timeout_s. Nothing is saved there until it answers",
                    )
                )

    def sign(self) -> None:
        """Something was done; from any thread."""
        self._signs += 1

    def signs(self) -> int:
        """A number that grows with all that is done."""
        return self._signs

    def give_up(self, reason: Exception) -> None:
        """Stop, if that is possible; what is lost is reported as failed with this reason."""
        if self.lost:
            self._report(reason)

    def _run(self) -> None:
        raise NotImplementedError

    def _where(self) -> str:
        """The place that is waited for."""
        raise NotImplementedError

    def _report(self, reason: Exception) -> None:
        """Report that it failed, unless its end is told."""
        if not self._ends():
            return
        _log.warning("checkpoint of step %d failed%s: %s", self.step, _in(self._tier), reason)
        try:
            self._on_event(CheckpointFailed(step=self.step, reason=failure_text(reason), tier=self._tier))
        except Exception as error:
            # Events get lost, so the training thread must know.
            self.error = error

    def _ends(self) -> bool:
        """Whether the end is still to be told; it is told once."""
        with self._report_lock:
            told, self._reported = self._reported, True
        return not told


def failure_text(reason: Exception) -> str:
    """Why a save failed, for events and for other ranks."""
    return reason.what if isinstance(reason, CheckpointError) else f"{type(reason).__name__}: {reason}"


def _in(tier: str) -> str:
    return "" if tier == STORAGE else f" in {tier}"


def raise_error(running: Background) -> None:
    """Raise the error that belongs to the training thread, once."""
    if running.error is not None:
        error, running.error = running.error, None
        raise error


def must_be_raised(error: Exception) -> bool:
    """Whether an error is the program's fault, or nothing can be saved any more because another job has the place.

    What else the environment does is reported, and training goes on.
    """
    if isinstance(error, CheckpointError):
        return isinstance(error, (SnapshotMutated, StateMismatch, PlaceInUse))
    return as_os_error(error) is None
