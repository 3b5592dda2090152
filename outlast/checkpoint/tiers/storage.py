"""Shared storage, fed from memory."""

from __future__ import annotations

from outlast.checkpoint.format.names import STORAGE
from outlast.checkpoint.save.request import SaveContext, SaveRequest
from outlast.checkpoint.save.source import HeldSource
from outlast.checkpoint.save.storage_save import StorageSave
from outlast.checkpoint.tiers.tier import StagedSave, Tier


class StorageTier(Tier):
    """See :class:`Tier`. A save counts in storage by votes of its own, whether it does in memory or not."""

    name = STORAGE

    def __init__(self, context: SaveContext) -> None:
        super().__init__(context)
        self._save: StorageSave | None = None
        self._waited_s = 0.0

    @property
    def running(self) -> bool:
        """Whether a save is on its way from memory to storage."""
        return self._save is not None and not self._save.done.is_set()

    def has(self, step: int | None) -> bool:
        """Whether ``step`` was the last to go to storage, and counts there as far as this rank knows."""
        return self._save is not None and self._save.committed and self._save.step == step

    def due(self, request: SaveRequest) -> bool:
        """See :class:`Tier`."""
        return request.durable

    def wait(self, step: int) -> float:
        """See :class:`Tier`; the time counts as ``blocked_s`` of the next save."""
        self._waited_s = super().wait(step)
        return self._waited_s

    def start(self, staged: StagedSave) -> None:
        """See :class:`Tier`."""
        self._save = StorageSave(self._context, staged.request, HeldSource(staged.parts))
        self._save.blocked_s = self._waited_s
        self._begin(self._save, staged.slot)

    def cancel(self, request: SaveRequest, reason: Exception) -> None:
        """See :class:`Tier`. The other ranks wait for this one's vote, so it tells them that there is none."""
        self._save = StorageSave(self._context, request, HeldSource(()))
        self._save.blocked_s = self._waited_s
        self._save.give_up(reason)
        self._begin(self._save, None)

    def abort(self, reason: Exception) -> None:
        """See :class:`Tier`."""
        if self._save is not None:
            self._save.give_up(reason)
