"""Host memory that outlives the process: files on ``/dev/shm``, each with one rank's part of a step.

::

    /dev/shm/outlast-UID-ckpt-HASH-RANDOM/  see :mod:`.folders`; mode 0700
      own/      ATTEMPT.rank_00001.0.data   slot 0 of rank 1: chunks with their CRC32C and documents, page by page
                ATTEMPT.rank_00001.0.json   what is in it: the rank's vote, and where each file begins; sealed
                ATTEMPT.SAVE.commit         the commit record of a save, which makes it count on this node
      partner/  ATTEMPT.rank_00000.0.data   a copy that a rank on another node sent here
                …

Only the attempt that made a slot writes to it again, and never while the slot has one of the newest committed steps,
so what a restore has mapped does not change. Nothing is fsynced: this memory survives the processes, not the machine.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from outlast.checkpoint.format.fields import MAX_DOCUMENT_BYTES
from outlast.checkpoint.format.names import MEMORY, PARTNER, encode_key, rank_name
from outlast.checkpoint.format.records import Commit, Fault, SlotIndex, seal, unseal_commit, unseal_placed
from outlast.checkpoint.memory.arena import Region, room
from outlast.checkpoint.memory.pages import map_all
from outlast.checkpoint.memory.pinning import pin, unpin
from outlast.checkpoint.storage.local import sync_removal
from outlast.checkpoint.storage.regular import check_regular, read_regular
from outlast.checkpoint.tiers.folders import OWN
from outlast.errors import CheckpointError

_SENT = 2
INDEX, DATA, _COMMIT = ".json", ".data", ".commit"


@dataclass
class Slot:
    """Memory for one rank's part of one step. Regions are taken from front to back, and given back as a whole."""

    data: Path
    memory: torch.Tensor
    """(nbytes,) uint8, shared."""
    pinned: bool = False
    used: int = 0
    step: int | None = None
    """The committed step in it; None: there is none."""
    save_id: int = 0
    """The save in it, once it is committed."""
    sent: bool = False
    """Whether it was sent to the partner, or is being sent."""
    readers: list[threading.Event] = field(default_factory=list)
    """One for each thread that reads from it, set when that thread has done so."""

    @property
    def index(self) -> Path:
        """The file of its index."""
        return self.data.with_suffix(INDEX)

    @property
    def busy(self) -> bool:
        """Whether a thread still reads from it."""
        self.readers = [reader for reader in self.readers if not reader.is_set()]
        return bool(self.readers)

    def take(self, nbytes: int) -> Region:
        """The next region for ``nbytes``; the slot must have been made large enough."""
        end = self.used + room(nbytes)
        region = Region(self.used, end - self.used, self.memory[self.used : end])
        if end > self.memory.numel():
            raise CheckpointError(f"{self.data}: {end} bytes do not fit into {self.memory.numel()}")
        self.used = end
        return region

    def give_back(self, region: Region) -> None:
        """Do nothing: the regions of a slot stay taken."""

    def wait(self, limit_s: float) -> None:
        """Do nothing: a slot has room for all its regions."""

    def pin(self) -> None:
        """Page-lock the memory, for copies from a device; once."""
        if not self.pinned:
            self.pinned = pin(self.memory)

    def unpin(self) -> None:
        """Before the memory goes."""
        if self.pinned:
            unpin(self.memory)
        self.pinned = False

    def publish(self, index: SlotIndex) -> None:
        """Write its index: a restore finds what is in it as soon as there is a commit record, too."""
        _put(self.index, seal(index))


class Slots:
    """The slots of one rank in one folder.

    Args:
        folder: of this node's own slots, or of a partner's.
        attempt_id: of the attempt.
        rank: whose parts they have.
        keep: number of newest committed steps that are not overwritten.
    """

    def __init__(self, folder: Path, attempt_id: str, rank: int, keep: int) -> None:
        self._stem = str(folder / f"{encode_key(attempt_id)}.{rank_name(rank)}.")
        self._keep = keep
        self._slots: list[Slot] = []

    def take(self, nbytes: int) -> Slot:
        """A slot of at least ``nbytes`` with nothing in it that is kept or being read; its memory is reserved.

        Raises:
            OSError: there is too little shared memory.
        """
        full = [slot for slot in self._slots if slot.step is not None]
        # If a node is lost, only the steps that were sent to partners are left of its ranks, so this rank keeps those,
        # too. Of the two newest that were sent, one may still be on its way from some rank.
        kept = {
            slot.step
            for some, count in ((full, self._keep), ([slot for slot in full if slot.sent], _SENT))
            for slot in sorted(some, key=lambda slot: slot.step or 0, reverse=True)[:count]
        }
        for slot in self._slots:
            if not slot.busy and slot.step not in kept:
                break
        else:
            slot = self._add()
        slot.index.unlink(missing_ok=True)
        slot.step, slot.used, slot.save_id, slot.sent = None, 0, 0, False
        if slot.memory.numel() < nbytes:
            self._allocate(slot, nbytes)
        return slot

    def prepare(self, nbytes: int, *, pinned: bool = False) -> None:
        """Add a slot of that size if one will be needed: what is done here delays no later :meth:`take`.

        Raises:
            OSError: there is too little shared memory.
        """
        if len(self._slots) <= self._keep:
            slot = self._add()
            self._allocate(slot, nbytes)
            if pinned:
                slot.pin()

    def _add(self) -> Slot:
        slot = Slot(Path(f"{self._stem}{len(self._slots)}{DATA}"), torch.empty(0, dtype=torch.uint8))
        self._slots.append(slot)
        return slot

    def _allocate(self, slot: Slot, nbytes: int) -> None:
        slot.unpin()
        slot.memory = torch.empty(0, dtype=torch.uint8)  # the old memory is freed before the new is reserved
        slot.data.unlink(missing_ok=True)
        slot.memory = _shared(slot.data, room(nbytes))

    @property
    def newest(self) -> int | None:
        """The newest committed step in them."""
        return max((slot.step for slot in self._slots if slot.step is not None), default=None)

    @property
    def save_ids(self) -> set[int]:
        """The committed saves in them."""
        return {slot.save_id for slot in self._slots if slot.step is not None}

    def remove(self) -> None:
        """Give the memory back."""
        for slot in self._slots:
            slot.unpin()
            slot.index.unlink(missing_ok=True)
            slot.data.unlink(missing_ok=True)
        self._slots = []


def _shared(path: Path, nbytes: int) -> torch.Tensor:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        # Reserve it now: a write into a full tmpfs would end the process with SIGBUS.
        os.posix_fallocate(fd, 0, nbytes)
        memory = mmap.mmap(fd, nbytes)
        map_all(memory)
        return torch.frombuffer(memory, dtype=torch.uint8)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def put_commit(folder: Path, commit: Commit, record: bytes) -> None:
    """Write a commit record: from here on the save counts on this node."""
    _put(_commit_path(folder, commit.attempt_id, commit.save_id), record)


def drop_commit(folder: Path, attempt_id: str, save_id: int) -> None:
    """Remove the commit record of a save of which no slot has anything any more."""
    _commit_path(folder, attempt_id, save_id).unlink(missing_ok=True)


def remove_records(folder: Path, attempt_id: str) -> None:
    """Remove all commit records of an attempt of which no slot has anything any more, and empty folders."""
    for path in (folder / OWN).glob(f"{encode_key(attempt_id)}.*{_COMMIT}"):
        path.unlink(missing_ok=True)
    for path in (folder / OWN, folder / PARTNER, folder):
        with suppress(OSError):  # not empty: another rank's part, or another attempt's
            path.rmdir()


def _commit_path(folder: Path, attempt_id: str, save_id: int) -> Path:
    return folder / OWN / commit_name(attempt_id, save_id)


def commit_name(attempt_id: str, save_id: int) -> str:
    """The file name of a commit record."""
    return f"{encode_key(attempt_id)}.{save_id}{_COMMIT}"


@dataclass(frozen=True)
class SlotContents:
    """One rank's part of one save, in this node's memory or on its disk."""

    placed: SlotIndex
    data: Path
    tier: str
    """Where it is; a partner's copy in this node's memory belongs to the partner's tier."""

    @property
    def index(self) -> Path:
        """The file of its index."""
        return self.data.with_suffix(INDEX)

    def remove(self) -> None:
        """Remove its files, and so give its memory back."""
        self.index.unlink(missing_ok=True)
        self.data.unlink(missing_ok=True)

    def quarantine(self) -> None:
        """Rename its index, so that it is never used again."""
        with suppress(FileNotFoundError):  # another rank has done so
            os.replace(self.index, self.index.with_suffix(".bad"))
        sync_removal(str(self.index.parent))


def holdings(folder: Path, own: str = MEMORY) -> Iterator[SlotContents]:
    """What is in a folder, committed or not; files that cannot be read are skipped.

    Args:
        folder: of this node's memory, or of its disk.
        own: the tier of what this node's ranks saved.
    """
    for inner in (OWN, PARTNER):
        for path in sorted((folder / inner).glob(f"*{INDEX}")):
            data = path.with_suffix(DATA)
            try:
                placed = unseal_placed(read_regular(path, MAX_DOCUMENT_BYTES), path.name)
                if data.exists() or data.is_symlink():  # one that is gone or cut is told when it is read
                    check_regular(data.lstat(), data)
            except (Fault, OSError):
                continue  # torn, of another version, no file, or just removed: not a copy
            yield SlotContents(placed, data, PARTNER if inner == PARTNER else own)


def commits(folder: Path) -> dict[Path, Commit]:
    """The commit records in a folder, by path; files that cannot be read are skipped."""
    records = {}
    for path in sorted((folder / OWN).glob(f"*{_COMMIT}")):
        try:
            records[path] = unseal_commit(read_regular(path, MAX_DOCUMENT_BYTES))
        except (Fault, OSError):
            continue
    return records


def clear(folder: Path, keep: int, attempt_id: str) -> None:
    """Remove what attempts before ``attempt_id`` left, but for the ``keep`` newest committed steps.

    One rank of a node calls it, after a commit.
    """
    records = commits(folder)
    newest = sorted(records.values(), key=lambda commit: (commit.step, commit.saved_at), reverse=True)
    kept = {(commit.attempt_id, commit.save_id) for commit in newest[:keep]}
    in_use, known = set(kept), set()
    for holding in list(holdings(folder)):
        vote = holding.placed.vote
        if vote.attempt_id == attempt_id or (vote.attempt_id, vote.save_id) in kept:
            in_use.add((vote.attempt_id, vote.save_id))
            known.add(holding.data)
        else:
            holding.remove()
    for path, commit in records.items():
        if (commit.attempt_id, commit.save_id) not in in_use:
            path.unlink(missing_ok=True)
    for path in folder.glob(f"*/*{DATA}"):
        if path not in known and not path.name.startswith(f"{encode_key(attempt_id)}."):
            path.unlink(missing_ok=True)  # data without an index, of an earlier attempt
    sync_removal(str(folder / OWN))  # on a disk, so that removed files do not come back


def _put(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
