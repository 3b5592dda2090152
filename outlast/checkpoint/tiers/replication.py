"""A copy of a slot on its way to another tier while training goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import ClassVar

from outlast.checkpoint.format.records import Commit, SlotIndex
from outlast.checkpoint.shortage import as_os_error, start
from outlast.checkpoint.tiers.slots import Slot
from outlast.errors import CheckpointError
from outlast.events import CheckpointFailed, CheckpointSaved, Event

_log = logging.getLogger("outlast.checkpoint")


class Replication:
    """One copy, in a thread of its own. A failure is an event; training goes on.

    Args:
        slot: what to copy; it must not be written before ``done``.
        index: what is in it.
        commit: of the save.
        on_event: takes events, from the copy's thread.

    Attributes:
        done: set once the copy counts, or has failed.
        error: what must be raised in the training thread: a bug, or an error of ``on_event``.
    """

    tier: ClassVar[str]
    target: ClassVar[str]
    """In words, for the log."""

    def __init__(self, slot: Slot, index: SlotIndex, commit: Commit, on_event: Callable[[Event], None]) -> None:
        self.done = threading.Event()
        self.error: Exception | None = None
        self._slot = slot
        self._index = index
        self._commit = commit
        self._on_event = on_event
        self._refused: OSError | None = None
        """Why there is no thread for it."""
        self._thread = threading.Thread(target=self._run, name=f"outlast-{self.tier}", daemon=True)

    def start(self) -> None:
        """Start the thread; if there can be no more threads, the copy has failed when this returns."""
        try:
            start(self._thread)
        except OSError as error:
            self._refused = error
            self._run()

    def join(self) -> None:
        """Wait until the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join()

    def _copy(self) -> None:
        """Copy; raises OSError or CheckpointError."""
        raise NotImplementedError

    def _run(self) -> None:
        began = time.monotonic()
        vote = self._index.vote
        try:
            event: Event
            try:
                if self._refused is not None:
                    raise self._refused
                self._copy()
                event = CheckpointSaved(
                    step=vote.step,
                    committed=False,
                    tier=self.tier,
                    size_bytes=sum(entry.size_bytes for entry in vote.files),
                    blocked_s=0.0,
                    durable_s=time.monotonic() - began,
                )
            except Exception as problem:
                error = problem if isinstance(problem, CheckpointError) else as_os_error(problem)
                if error is None:
                    raise
                _log.warning("step %d could not be copied to %s: %s", vote.step, self.target, error)
                event = CheckpointFailed(step=vote.step, reason=f"{type(error).__name__}: {error}", tier=self.tier)
            self._on_event(event)
        except Exception as error:  # a bug, or an error of on_event: raised in the training thread
            self.error = error
        finally:
            self.done.set()
