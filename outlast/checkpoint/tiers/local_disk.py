"""Copies of this rank's slots on its node's own disk, which outlive the machine's memory.

::

    LOCAL_DIR/outlast-UID-ckpt-HASH-RANDOM/  see :mod:`.folders`; mode 0700
      own/  ATTEMPT.rank_00001.7.data        save 7 of rank 1, as it was in its slot
            ATTEMPT.rank_00001.7.json        what is in it, and where; written, and synced, after the data
            ATTEMPT.7.commit                 the commit record of the save, after that

The copies need no votes: the saves were committed before, in memory. A step on the disks counts where some node has its
commit record, and all ranks' parts are on some node.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from outlast.checkpoint.format.names import LOCAL_DISK, encode_key, rank_name
from outlast.checkpoint.format.records import Commit, Fault, SlotIndex, check_file, seal
from outlast.checkpoint.save.request import SaveContext, SaveRequest
from outlast.checkpoint.storage.local import LocalStore
from outlast.checkpoint.tiers import slots
from outlast.checkpoint.tiers.folders import OWN
from outlast.checkpoint.tiers.replication import Replication
from outlast.checkpoint.tiers.slots import Slot
from outlast.checkpoint.tiers.tier import StagedSave, Tier
from outlast.errors import CheckpointError
from outlast.events import Event


class LocalDisk:
    """One rank's copies.

    Args:
        folder: from :func:`~outlast.checkpoint.tiers.folders.local_folder`.
        context: whose copies.
        is_node_leader: whether this rank removes what attempts before left on its node.

    Attributes:
        save_ids: the saves of this attempt that this rank has here, oldest first.
        complete_id: the newest save that all ranks have on their disks, as rank 0 found at the last commit; 0: none. It
            is kept, however many newer ones this rank has.
    """

    def __init__(self, folder: Path, context: SaveContext, is_node_leader: bool) -> None:
        self.folder = folder
        self.save_ids: tuple[int, ...] = ()
        self.complete_id = 0
        self.store = LocalStore(str(folder / OWN))
        self._attempt_id = context.attempt_id
        self._rank = context.rank
        self._keep = context.config.local_keep_last
        self._is_node_leader = is_node_leader

    def name(self, save_id: int) -> str:
        """The names of a copy's files, without their suffixes."""
        return f"{encode_key(self._attempt_id)}.{rank_name(self._rank)}.{save_id}"

    def added(self, save_id: int) -> None:
        """Count a copy, and remove older ones that nobody needs."""
        self.save_ids = (*self.save_ids, save_id)
        self.prune()

    def prune(self) -> None:
        """Remove old copies of this attempt; once all disks have one of it, also those of the attempts before."""
        # Some rank may still be writing the newest.
        for old in [old for old in self.save_ids[: -max(2, self._keep)] if old != self.complete_id]:
            self._remove(old)
            if self._is_node_leader:
                slots.drop_commit(self.folder, self._attempt_id, old)
        if self._is_node_leader and self.complete_id:
            slots.clear(self.folder, self._keep, self._attempt_id)

    def remove(self) -> None:
        """Remove all copies of this attempt."""
        for save_id in self.save_ids:
            self._remove(save_id)

    def _remove(self, save_id: int) -> None:
        self.save_ids = tuple(other for other in self.save_ids if other != save_id)
        self.discard(save_id)

    def discard(self, save_id: int) -> None:
        """Remove the files of a copy, as far as there are any; its index first."""
        for suffix in (slots.INDEX, slots.DATA):
            self.store.remove(f"{self.name(save_id)}{suffix}")


class DiskTier(Tier):
    """See :class:`Tier`.

    Args:
        context: who saves.
        disk: where to.
    """

    name = LOCAL_DISK

    def __init__(self, context: SaveContext, disk: LocalDisk) -> None:
        super().__init__(context)
        self._disk = disk

    def due(self, request: SaveRequest) -> bool:
        """See :class:`Tier`."""
        return request.step % self._context.config.local_every_steps == 0

    def start(self, staged: StagedSave) -> None:
        """See :class:`Tier`; a save that does not count in memory is not copied."""
        if staged.commit is not None:
            on_event, silent_s = self._context.on_event, self._context.config.commit_timeout_s
            self._begin(
                DiskReplication(self._disk, staged.slot, staged.index, staged.commit, on_event, silent_s), staged.slot
            )


class DiskReplication(Replication):
    """See :class:`Replication`.

    Args:
        disk: where to.
        slot, index, commit, on_event, silent_s: see :class:`Replication`.
    """

    tier = LOCAL_DISK
    target = "the local disk"

    def __init__(
        self,
        disk: LocalDisk,
        slot: Slot,
        index: SlotIndex,
        commit: Commit,
        on_event: Callable[[Event], None],
        silent_s: float,
    ) -> None:
        super().__init__(slot, index, commit, on_event, silent_s)
        self._disk = disk

    def _copy(self) -> None:
        disk, save_id = self._disk, self._commit.save_id
        store, name, nbytes = disk.store, disk.name(save_id), self._slot.used
        memory = self._slot.memory.numpy().data
        disk.prune()
        free_bytes = store.free_bytes()
        if free_bytes is not None and free_bytes < nbytes:
            raise OSError(errno.ENOSPC, f"No space left on device: {nbytes} bytes are needed, {free_bytes} are free")
        try:
            for entry in self._index.vote.files:
                at = self._index.places[entry.path]
                check_file(entry, memory[at : at + entry.size_bytes])
            store.put_block(f"{name}{slots.DATA}", memory[:nbytes], nbytes)
            store.sync_dirs([f"{name}{slots.DATA}"])
            store.put_atomic(f"{name}{slots.INDEX}", seal(self._index))
            store.put_atomic(slots.commit_name(self._commit.attempt_id, save_id), seal(self._commit))
        except Fault as fault:
            raise CheckpointError(f"damaged in memory: {fault}") from fault
        except OSError:
            with suppress(OSError):
                disk.discard(save_id)
            raise
        disk.added(save_id)
