"""Copies of this rank's slots on its node's own disk, which outlive the machine's memory.

::

    LOCAL_DIR/outlast-UID-ckpt-HASH/         HASH: of the URL of the checkpoints; mode 0700
      own/  ATTEMPT.rank_00001.7.data        save 7 of rank 1, as it lay in its slot
            ATTEMPT.rank_00001.7.json        what is in it, and where; written, and synced, after the data
            ATTEMPT.7.commit                 the commit record of the save, after that

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
        attempt_id: of the attempt.
        rank: whose part.
        keep: newest copies that stay.
        is_node_leader: whether this rank clears up on its node.

    Attributes:
        held: serials of the saves of this attempt that this rank has here, oldest first.
        everywhere: a save that all ranks have on their disks, as rank 0 told with the last commit; 0: none. It is not
            removed, however many newer ones this rank has.
    """

    def __init__(self, folder: Path, attempt_id: str, rank: int, keep: int, is_node_leader: bool) -> None:
        self.folder = folder
        self.held: tuple[int, ...] = ()
        self.everywhere = 0
        self.store = LocalStore(str(folder / OWN))
        self._attempt_id = attempt_id
        self._rank = rank
        self._keep = keep
        self._is_node_leader = is_node_leader

    def name(self, save_id: int) -> str:
        """Of a copy's files, without their endings."""
        return f"{encode_key(self._attempt_id)}.{rank_name(self._rank)}.{save_id}"

    def added(self, save_id: int) -> None:
        """A copy counts; older ones that nobody needs go."""
        self.held = (*self.held, save_id)
        self.prune()

    def prune(self) -> None:
        """Remove what nobody needs: of this attempt, and once it has a save on all disks, of those before."""
        # Some rank may still be writing the newest.
        for old in [old for old in self.held[: -max(2, self._keep)] if old != self.everywhere]:
            self._remove(old)
            if self._is_node_leader:
                slots.drop_commit(self.folder, self._attempt_id, old)
        if self._is_node_leader and self.everywhere:
            slots.clear(self.folder, self._keep, self._attempt_id)

    def remove(self) -> None:
        """All copies of this attempt."""
        for save_id in self.held:
            self._remove(save_id)

    def _remove(self, save_id: int) -> None:
        self.held = tuple(other for other in self.held if other != save_id)
        self.discard(save_id)

    def discard(self, save_id: int) -> None:
        """Remove the files of a copy, as far as there are any; what says what is in it first."""
        for ending in (slots.INDEX, slots.DATA):
            self.store.remove(f"{self.name(save_id)}{ending}")


class DiskReplication(Replication):
    """See :class:`Replication`.

    Args:
        disk: where to.
        slot, placed, commit, on_event: as there.
    """

    tier = LOCAL_DISK
    where = "the local disk"

    def __init__(
        self, disk: LocalDisk, slot: Slot, placed: SlotIndex, commit: Commit, on_event: Callable[[Event], None]
    ) -> None:
        super().__init__(slot, placed, commit, on_event)
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
            for entry in self._placed.vote.files:
                at = self._placed.places[entry.path]
                check_file(entry, memory[at : at + entry.size_bytes])
            store.put_block(f"{name}{slots.DATA}", memory[:nbytes], nbytes)
            store.sync_dirs([f"{name}{slots.DATA}"])
            store.put_atomic(f"{name}{slots.INDEX}", seal(self._placed))
            store.put_atomic(slots.commit_name(self._commit.attempt_id, save_id), seal(self._commit))
        except Fault as fault:
            raise CheckpointError(f"damaged in memory: {fault}") from fault
        except OSError:
            with suppress(OSError):
                disk.discard(save_id)
            raise
        disk.added(save_id)
