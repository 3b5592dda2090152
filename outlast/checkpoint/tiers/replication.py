"""A copy of a slot on its way to another tier while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from outlast.checkpoint.format.records import Commit, SlotIndex
from outlast.checkpoint.save.background import Background
from outlast.checkpoint.shortage import as_os_error
from outlast.checkpoint.storage.io_threads import SILENT_S
from outlast.checkpoint.tiers.slots import Slot
from outlast.errors import CheckpointError
from outlast.events import CheckpointSaved, Event

_SLOWEST_BYTES_PER_S = 10e6
"""A slot is copied whole, without a sign in between; a target slower than this is taken for one that hangs."""


class Replication(Background):
    """One copy, in a thread of its own. A failure is an event; training goes on.

    Args:
        slot: what to copy; it must not be written before ``done``.
        index: what is in it.
        commit: of the save.
        on_event: takes events, from the copy's thread.
        silent_s: how long the target may not answer, besides the time that the copy itself may take.
    """

    tier: ClassVar[str]
    target: ClassVar[str]
    """In words, for the log."""

    def __init__(
        self,
        slot: Slot,
        index: SlotIndex,
        commit: Commit,
        on_event: Callable[[Event], None],
        silent_s: float = SILENT_S,
    ) -> None:
        limit_s = silent_s + slot.used / _SLOWEST_BYTES_PER_S
        super().__init__(index.vote.step, self.tier, on_event, name=f"outlast-{self.tier}", limit_s=limit_s)
        self._slot = slot
        self._index = index
        self._commit = commit

    def _where(self) -> str:
        return self.target

    def _copy(self) -> None:
        """Copy; raises OSError or CheckpointError."""
        raise NotImplementedError

    def _run(self) -> None:
        began = time.monotonic()
        vote = self._index.vote
        try:
            try:
                if self._refused is not None:
                    raise self._refused
                self._copy()
            except Exception as problem:
                error = problem if isinstance(problem, CheckpointError) else as_os_error(problem)
                if error is None:
                    raise
                self._report(error)
                return
            self._ends()
            self._on_event(
                CheckpointSaved(
                    step=vote.step,
                    committed=False,
                    tier=self.tier,
                    size_bytes=sum(entry.size_bytes for entry in vote.files),
                    blocked_s=0.0,
                    durable_s=time.monotonic() - began,
                )
            )
        except Exception as error:  # a bug, or an error of on_event: raised in the training thread
            self.error = error
        finally:
            self.done.set()
