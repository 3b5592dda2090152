"""What saves in the background have in common: how they are confirmed, given up and reported."""

from __future__ import annotations

import threading

from outlast.checkpoint.save.background import Background, must_be_raised
from outlast.checkpoint.save.request import SaveContext, SaveRequest
from outlast.checkpoint.save.source import Source
from outlast.checkpoint.shortage import as_os_error
from outlast.errors import CheckpointError, SnapshotMutated


class SaveJob(Background):
    """One save of one rank into one tier, in a thread of its own. Public methods are for the training thread.

    Args:
        context: who saves.
        request: what to save.
        source: of the plan's parts.
        tier: where to.
        limit_s: see :class:`Background`.

    Attributes:
        eager_copied: set once no eager tensor is read any more.
        copied: set once no tensor is read any more, whether all were copied or the save was given up.
        done: set once the save is committed (coordinator), voted for (other ranks) or given up.
        error: what must be raised in the training thread: a mutated snapshot, or a bug. What the environment does (a
            full disk, a timeout, another rank's failure) is an event instead.
        blocked_s: seconds for which the save held the training thread; final before :meth:`confirm`.
        predicted_stall_s: seconds that the update was expected to wait, for the event; set before :meth:`start`.
    """

    def __init__(self, context: SaveContext, request: SaveRequest, source: Source, tier: str, limit_s: float) -> None:
        super().__init__(request.step, tier, context.on_event, name=f"outlast-save-{request.step}", limit_s=limit_s)
        self._context = context
        self.eager_copied, self.copied = source.eager_copied, source.copied
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

    @property
    def confirmed(self) -> bool:
        """Whether the training thread has said that no lazy tensor was changed, or the save was given up."""
        return self._confirmed.is_set()

    @property
    def copied_at(self) -> float | None:
        """When all tensors were copied, on the monotonic clock; None if they are not, or the save was given up."""
        return self._source.copied_at

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
        super().give_up(reason)

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

    def _report(self, reason: Exception) -> None:
        """Report that the save failed; if it is the program's fault, it is raised in the training thread, too."""
        if must_be_raised(reason):
            if reason is not self._stop:
                self.error = reason
        elif not isinstance(reason, CheckpointError):
            reason = as_os_error(reason) or reason
        super()._report(reason)
