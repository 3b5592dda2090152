"""What every save that runs in the background has in common: how it is confirmed, given up, and reported."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from outlast.checkpoint.format.names import STORAGE
from outlast.checkpoint.save.snapshot import Snapshot
from outlast.checkpoint.save.source import Source
from outlast.errors import CheckpointError, SnapshotMutated, StateMismatch
from outlast.events import CheckpointFailed, Event

_log = logging.getLogger("outlast.checkpoint")


class SaveJob:
    """A save in a thread of its own. Public methods are for the training thread.

    Attributes:
        eager_copied: set once no eager tensor is read any more.
        copied: set once no tensor is read any more, whether all were copied or the save was given up.
        done: set once the save is committed (coordinator), voted for (other ranks) or given up.
        error: what must be raised in the training thread: a mutated snapshot, or a bug. Not what the environment did.
        blocked_s: how long the training thread was held; final before :meth:`confirm`.
        predicted_stall_s: how long the update was expected to wait, for the event; set before :meth:`start`.
    """

    def __init__(self, step: int, source: Source, snapshot: Snapshot | None) -> None:
        self.step = step
        self.eager_copied, self.copied = source.eager_copied, source.copied
        self.done = threading.Event()
        self.error: Exception | None = None
        self.blocked_s = 0.0
        self.predicted_stall_s: float | None = None
        self._source = source
        self._snapshot = snapshot
        self._confirmed = threading.Event()
        if snapshot is None:
            self._confirmed.set()
        self._stop: Exception | None = None
        self._stop_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"outlast-save-{step}", daemon=True)

    @property
    def confirmed(self) -> bool:
        """Whether the training thread has said that no lazy tensor was changed, or the save was given up."""
        return self._confirmed.is_set()

    @property
    def copied_at(self) -> float | None:
        """When all tensors were copied, on the monotonic clock; None if they are not, or the save was given up."""
        return self._source.copied_at

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def confirm(self) -> None:
        """Check once more that no lazy tensor was changed; only then the rank may vote. Call after ``copied``.

        If one was, the save is given up, and ``error`` is set.
        """
        if self._confirmed.is_set():
            return
        assert self._snapshot is not None
        try:
            self._snapshot.check()
        except SnapshotMutated as error:
            self.give_up(error)
            return
        self._snapshot.release()
        self._confirmed.set()

    def give_up(self, reason: Exception) -> None:
        """Have the save stop, clean up and be reported as failed, at its next look."""
        with self._stop_lock:
            if self._stop is None:
                self._stop = reason
                if must_be_raised(reason):
                    self.error = reason
        self._confirmed.set()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        raise NotImplementedError

    def _check_cancelled(self) -> None:
        """Raise if this save was given up."""
        if self._stop is not None:
            raise self._stop

    def _end(self) -> None:
        """Let everybody go who waits for this save."""
        self.eager_copied.set()
        self.copied.set()
        self._confirmed.set()
        if self._snapshot is not None:
            self._snapshot.release()
        self.done.set()

    def _report(self, reason: Exception, tier: str, on_event: Callable[[Event], None]) -> None:
        """Say that the save failed, or have the reason raised in the training thread."""
        if must_be_raised(reason) and reason is not self._stop:
            self.error = reason
        _log.warning("checkpoint of step %d failed%s: %s", self.step, "" if tier == STORAGE else f" in {tier}", reason)
        try:
            on_event(CheckpointFailed(step=self.step, reason=in_words(reason), tier=tier))
        except Exception as error:
            # The event sink is broken, so the training thread must hear of it.
            self.error = error


def in_words(reason: Exception) -> str:
    """Why a save failed, for events and other ranks."""
    return reason.what if isinstance(reason, CheckpointError) else f"{type(reason).__name__}: {reason}"


class Background(Protocol):
    """Something that runs beside training."""

    error: Exception | None
    """What must be raised in the training thread."""


def raise_error(running: Background) -> None:
    """Raise what must be raised, once."""
    if running.error is not None:
        error, running.error = running.error, None
        raise error


def must_be_raised(error: Exception) -> bool:
    """A full disk, a timeout, another rank's failure are reported, and training goes on. The rest must be raised."""
    return not isinstance(error, (OSError, CheckpointError)) or isinstance(error, (SnapshotMutated, StateMismatch))
