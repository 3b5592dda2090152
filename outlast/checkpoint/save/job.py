"""What saves in the background have in common: how they are confirmed, given up and reported."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from outlast.checkpoint.format.names import STORAGE
from outlast.checkpoint.save.request import SaveRequest
from outlast.checkpoint.save.source import Source
from outlast.checkpoint.shortage import as_os_error, start
from outlast.errors import CheckpointError, PlaceInUse, SnapshotMutated, StateMismatch
from outlast.events import CheckpointFailed, Event

_log = logging.getLogger("outlast.checkpoint")


class SaveJob:
    """One save of one rank into one tier, in a thread of its own. Public methods are for the training thread.

    Args:
        request: what to save.
        source: of the plan's parts.

    Attributes:
        eager_copied: set once no eager tensor is read any more.
        copied: set once no tensor is read any more, whether all were copied or the save was given up.
        done: set once the save is committed (coordinator), voted for (other ranks) or given up.
        error: what must be raised in the training thread: a mutated snapshot, or a bug. What the environment does (a
            full disk, a timeout, another rank's failure) is an event instead.
        blocked_s: seconds for which the save held the training thread; final before :meth:`confirm`.
        predicted_stall_s: seconds that the update was expected to wait, for the event; set before :meth:`start`.
    """

    def __init__(self, request: SaveRequest, source: Source) -> None:
        self.step = request.step
        self.eager_copied, self.copied = source.eager_copied, source.copied
        self.done = threading.Event()
        self.error: Exception | None = None
        self.blocked_s = 0.0
        self.predicted_stall_s: float | None = None
        self.copied_bytes = sum(part.nbytes for part in request.plan.parts)
        """How much of the state this rank copies."""
        self._request = request.without_tensors()
        self._source = source
        self._snapshot = request.snapshot
        self._confirmed = threading.Event()
        if request.snapshot is None:
            self._confirmed.set()
        self._stop: Exception | None = None
        self._stop_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"outlast-save-{self.step}", daemon=True)

    @property
    def confirmed(self) -> bool:
        """Whether the training thread has said that no lazy tensor was changed, or the save was given up."""
        return self._confirmed.is_set()

    @property
    def copied_at(self) -> float | None:
        """When all tensors were copied, on the monotonic clock; None if they are not, or the save was given up."""
        return self._source.copied_at

    def start(self) -> None:
        """Start the thread; if there can be no more threads, the save has failed when this returns."""
        try:
            start(self._thread)
        except OSError as error:  # no more threads: what is left is to report it, which this one can do
            self.give_up(error)
            self._run()

    def confirm(self) -> None:
        """Check once more that no lazy tensor was changed; the rank votes only after that. Call after ``copied``.

        If one was changed, the save is given up, and ``error`` is set.
        """
        if self._confirmed.is_set():
            return
        assert self._snapshot is not None
        try:
            self._snapshot.check()
        except Exception as error:
            short = error if isinstance(error, SnapshotMutated) else as_os_error(error)
            if short is None:
                raise
            self.give_up(short)
            return
        self._snapshot.release()
        self._confirmed.set()

    def give_up(self, reason: Exception) -> None:
        """Have the save stop where it next checks for that, clean up, and be reported as failed."""
        with self._stop_lock:
            if self._stop is None:
                self._stop = reason
                if must_be_raised(reason):
                    self.error = reason
        self._confirmed.set()

    def join(self) -> None:
        """Wait until the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        raise NotImplementedError

    def _check_cancelled(self) -> None:
        """Raise if this save was given up."""
        if self._stop is not None:
            raise self._stop

    def _end(self) -> None:
        """Release the tensors, and everybody who waits for this save."""
        self.eager_copied.set()
        self.copied.set()
        self._confirmed.set()
        if self._snapshot is not None:
            self._snapshot.release()
        self._request.replicas.release()
        self.done.set()

    def _report(self, reason: Exception, tier: str, on_event: Callable[[Event], None]) -> None:
        """Report that the save failed; if it is the program's fault, it is raised in the training thread, too."""
        if must_be_raised(reason):
            if reason is not self._stop:
                self.error = reason
        elif not isinstance(reason, CheckpointError):
            reason = as_os_error(reason) or reason
        _log.warning("checkpoint of step %d failed%s: %s", self.step, "" if tier == STORAGE else f" in {tier}", reason)
        try:
            on_event(CheckpointFailed(step=self.step, reason=failure_text(reason), tier=tier))
        except Exception as error:
            # Events get lost, so the training thread must know.
            self.error = error


def failure_text(reason: Exception) -> str:
    """Why a save failed, for events and for other ranks."""
    return reason.what if isinstance(reason, CheckpointError) else f"{type(reason).__name__}: {reason}"


class Background(Protocol):
    """Work that runs beside training."""

    error: Exception | None
    """What must be raised in the training thread."""


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
