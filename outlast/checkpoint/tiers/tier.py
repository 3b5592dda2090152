"""The interface of the tiers that memory feeds: storage, the partner's memory, and the node's own disk."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import ClassVar

from outlast.checkpoint.format.records import Commit, SlotIndex
from outlast.checkpoint.save.background import Background, raise_error
from outlast.checkpoint.save.request import SaveContext, SaveRequest
from outlast.checkpoint.save.source import Copied
from outlast.checkpoint.tiers.slots import Slot

_log = logging.getLogger("outlast.checkpoint")
_BEHIND_S = 0.1


@dataclass(frozen=True)
class StagedSave:
    """This rank's part of a save, whole in its slot of shared memory."""

    request: SaveRequest
    """Without the tensors."""
    slot: Slot
    parts: tuple[Copied, ...]
    """The chunks, in the slot."""
    index: SlotIndex
    commit: Commit | None
    """None: the save does not count in memory, since some rank has failed there."""


class Tier:
    """A tier that memory feeds.

    One copy is on its way at a time. Methods are for the training thread; :meth:`start` and :meth:`cancel` are called
    by the thread of a save into memory, before that save is done.

    Args:
        context: who saves.
    """

    name: ClassVar[str]
    """As in events."""

    def __init__(self, context: SaveContext) -> None:
        self._context = context
        self._newest: Background | None = None

    def due(self, request: SaveRequest) -> bool:
        """Whether a save goes to this tier, too; the same on all ranks."""
        raise NotImplementedError

    def start(self, staged: StagedSave) -> None:
        """Begin to copy a save from memory. The slot is not written again before the copy is done."""
        raise NotImplementedError

    def cancel(self, request: SaveRequest, reason: Exception) -> None:
        """Called instead of :meth:`start` if a save did not reach memory. By default nothing is to be done."""

    def wait(self, step: int) -> float:
        """Wait until the copy before has ended, so that the one of ``step`` can begin; or hangs: see :meth:`refuses`.

        Returns:
            Seconds this call blocked; it is logged if training noticed.

        Raises:
            Exception: a bug that ended that copy, or an error of ``on_event``.
        """
        began = time.monotonic()
        self.finish()
        waited_s = time.monotonic() - began
        if waited_s > _BEHIND_S and not (self._newest is not None and self._newest.hangs):
            _log.warning(
                "step %d: training waited %.1f s for the copy before to reach %s; lengthen that tier's interval",
                step,
                waited_s,
                self.name,
            )
        return waited_s

    def refuses(self, step: int) -> bool:
        """Whether a save cannot go to this tier, because the one before hangs; that is reported."""
        return self._newest is not None and self._newest.refuses(step)

    def finish(self) -> None:
        """Wait until the copy on its way has ended; raises as :meth:`wait` does."""
        if self._newest is not None:
            self._newest.wait(self._newest.done)
            raise_error(self._newest)

    def ends_within(self, limit_s: float) -> bool:
        """Wait for the copy on its way, for so long at most; whether it has ended."""
        return self._newest is None or self._newest.done.wait(max(limit_s, 0.0))

    def raise_error(self) -> None:
        """Raise the error of a copy that has ended, without waiting for one that has not."""
        if self._newest is not None and self._newest.done.is_set():
            raise_error(self._newest)

    def abort(self, reason: Exception) -> None:
        """Give up the copy on its way, if the tier can; by default the copy runs to its end."""

    def close(self) -> None:
        """Wait for the thread of the copy on its way."""
        if self._newest is not None:
            self._newest.join()

    def _begin(self, copy: Background, slot: Slot | None) -> None:
        self._newest = copy
        if slot is not None:
            slot.readers.append(copy.done)
        copy.start()
