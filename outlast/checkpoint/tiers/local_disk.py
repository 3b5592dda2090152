"""Copies of this rank's slots on its node's own disk, which outlive the machine's memory.

::

    LOCAL_DIR/outlast-UID-ckpt-HASH/       HASH: of the URL of the checkpoints; mode 0700
      own/  EPOCH.rank_00001.7.data        save 7 of rank 1, as it lay in its slot
            EPOCH.rank_00001.7.json        what is in it, and where; written, and synced, after the data
            EPOCH.7.commit                 the commit record of the save, after that

The copies need no votes: what they are of was committed before, in memory. A step that lies on disks counts where some
node has its commit record, and all ranks' parts are somewhere.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from outlast.checkpoint.format.names import LOCAL_DISK, encode_key, rank_name
from outlast.checkpoint.format.records import Commit, Fault, SlotIndex, check_file, seal
from outlast.checkpoint.storage.local import LocalStore
from outlast.checkpoint.tiers import slots
from outlast.checkpoint.tiers.replication import Replication
from outlast.checkpoint.tiers.slots import OWN, Slot
from outlast.errors import CheckpointError
from outlast.events import Event


class LocalDisk:
    """One rank's copies.

    Args:
        folder: from :func:`local_folder`.
        epoch: of the attempt.
        rank: whose part.
        keep: newest copies that stay.
        leads: whether this rank clears up on its node.

    Attributes:
        held: serials of the saves of this attempt that this rank has here, oldest first.
        everywhere: a save that all ranks have on their disks, as rank 0 told with the last commit; 0: none. It is not
            removed, however many newer ones this rank has.
    """

    def __init__(self, folder: Path, epoch: str, rank: int, keep: int, leads: bool) -> None:
        self.folder = folder
        self.held: tuple[int, ...] = ()
        self.everywhere = 0
        self.store = LocalStore(str(folder / OWN))
        self._epoch = epoch
        self._rank = rank
        self._keep = keep
        self._leads = leads

    def name(self, serial: int) -> str:
        """Of a copy's files, without their endings."""
        return f"{encode_key(self._epoch)}.{rank_name(self._rank)}.{serial}"

    def added(self, serial: int) -> None:
        """A copy counts; older ones that nobody needs go."""
        self.held = (*self.held, serial)
        self.prune()

    def prune(self) -> None:
        """Remove what nobody needs: of this attempt, and once it has a save on all disks, of those before."""
        # Some rank may still be writing the newest.
        for old in [old for old in self.held[: -max(2, self._keep)] if old != self.everywhere]:
            self._remove(old)
            if self._leads:
                slots.drop_commit(self.folder, self._epoch, old)
        if self._leads and self.everywhere:
            slots.clear(self.folder, self._keep, self._epoch)

    def remove(self) -> None:
        """All copies of this attempt."""
        for serial in self.held:
            self._remove(serial)

    def _remove(self, serial: int) -> None:
        self.held = tuple(other for other in self.held if other != serial)
        self.discard(serial)

    def discard(self, serial: int) -> None:
        """Remove the files of a copy, as far as there are any; what says what is in it first."""
        for ending in (slots.INDEX, slots.DATA):
            self.store.remove(f"{self.name(serial)}{ending}")


class DiskReplication(Replication):
    """See :class:`Replication`.

    Args:
        disk: where to.
        slot, placed, commit, emit: as there.
    """

    tier = LOCAL_DISK
    where = "the local disk"

    def __init__(
        self, disk: LocalDisk, slot: Slot, placed: SlotIndex, commit: Commit, emit: Callable[[Event], None]
    ) -> None:
        super().__init__(slot, placed, commit, emit)
        self._disk = disk

    def _copy(self) -> None:
        disk, serial = self._disk, self._commit.serial
        store, name, nbytes = disk.store, disk.name(serial), self._slot.used
        memory = self._slot.memory.numpy().data
        disk.prune()
        free_bytes = store.free_bytes()
        if free_bytes is not None and free_bytes < nbytes:
            raise OSError(errno.ENOSPC, f"No space left on device: {nbytes} bytes are needed, {free_bytes} are free")
        try:
            for entry in self._placed.vote.files:
                at = self._placed.places[entry.path]
                check_file(entry, memory[at : at + entry.size_bytes])
            store.put_block(f"{name}{slots.DATA}", memory[:nbytes], nbytes)
            store.sync_dirs([f"{name}{slots.DATA}"])
            store.put_atomic(f"{name}{slots.INDEX}", seal(self._placed))
            store.put_atomic(slots.commit_name(self._commit.epoch, serial), seal(self._commit))
        except Fault as fault:
            raise CheckpointError(f"damaged in memory: {fault}") from fault
        except OSError:
            with suppress(OSError):
                disk.discard(serial)
            raise
        disk.added(serial)
