"""Host memory that outlives the process: files on ``/dev/shm`` that hold one rank's part of a step each.

::

    /dev/shm/outlast-UID-ckpt-HASH/         HASH: of the URL of the checkpoints; mode 0700
      own/      ATTEMPT.rank_00001.0.data   slot 0 of rank 1: chunks with their CRC32C and documents, page by page
                ATTEMPT.rank_00001.0.json   what is in it: the rank's vote, and where each file lies; sealed
                ATTEMPT.SAVE.commit         the commit record of a save: it counts on this node too
      partner/  ATTEMPT.rank_00000.0.data   copies that another node's rank sent here
                …

A slot is written again only by the attempt that made it, and never while it holds one of the newest committed steps:
what a restore has mapped stays as it was. Nothing is fsynced: this memory survives the processes, not the machine.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from outlast.checkpoint.format.names import MEMORY, PARTNER, encode_key, rank_name
from outlast.checkpoint.format.records import Commit, Fault, SlotIndex, seal, unseal_commit, unseal_placed
from outlast.checkpoint.memory.arena import Region, room
from outlast.checkpoint.memory.pages import map_all
from outlast.checkpoint.storage.local import sync_dir
from outlast.errors import CheckpointError

SHM_ROOT = Path("/dev/shm")
OWN = "own"
"""Folder of what this node's ranks saved; a partner's copies lie in a folder of that tier's name."""
_SENT = 2
_CHOOSE = "choose a place of this node's own that can be written, or set checkpoint.local_every_steps = 0"
INDEX, DATA, _COMMIT = ".json", ".data", ".commit"


def memory_folder(url: str, root: Path = SHM_ROOT) -> Path:
    """The folder of this node's memory for the checkpoints at ``url``; made where it is missing.

    Raises:
        CheckpointError: there is no shared memory, or what has that name is a link, someone else's, or open to others.
    """
    fix = f"{root} must be a writable tmpfs (docker: --shm-size), or set checkpoint.memory_every_steps = 0"
    return _own_folder(memory_path(url, root), (OWN, PARTNER), "shared memory", fix)


def local_folder(url: str, root: Path) -> Path:
    """The folder of this node's disk for the checkpoints at ``url``, below ``root``; made where it is missing.

    Raises:
        CheckpointError: it cannot be made, or what has that name is a link, someone else's, or open to others.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint.local_dir {root} cannot be made: {error}", _CHOOSE) from error
    folder = _own_folder(memory_path(url, root), (OWN,), "the local disk's", _CHOOSE)
    for path in (folder, root, root.parent):
        sync_dir(str(path))
    return folder


def memory_path(url: str, root: Path = SHM_ROOT) -> Path:
    """Where such a folder is, or would be."""
    return root / f"outlast-{os.getuid()}-ckpt-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def _own_folder(folder: Path, below: Sequence[str], what: str, fix: str) -> Path:
    try:
        for path in (folder, *(folder / name for name in below)):
            path.mkdir(mode=0o700, exist_ok=True)
        check_ours(folder, what)
    except OSError as error:
        raise CheckpointError(f"{what} {folder} cannot be made: {error}", fix) from error
    return folder


def check_ours(folder: Path, what: str = "shared memory") -> None:
    """Raise :class:`CheckpointError` if it is a link, someone else's, or open to others."""
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise CheckpointError(
            f"{what} {folder} is not a folder of ours alone (mode {stat.S_IMODE(info.st_mode):04o}, "
            f"user {info.st_uid}); refused",
            "look at it, and remove it if it is a leftover",
        )


@dataclass
class Slot:
    """Memory for one rank's part of one step. It is taken from front to back, and given back as a whole."""

    data: Path
    memory: torch.Tensor
    """(nbytes,) uint8, shared."""
    used: int = 0
    step: int | None = None
    """The committed step in it; None while there is none."""
    save_id: int = 0
    """Of the save in it, once it is committed."""
    sent: bool = False
    """Whether it was sent to the partner, or is on its way."""
    readers: list[threading.Event] = field(default_factory=list)
    """Of those who read from it; each is set once its reader has done so."""

    @property
    def index(self) -> Path:
        """The file that says what is in it."""
        return self.data.with_suffix(INDEX)

    @property
    def busy(self) -> bool:
        """Whether somebody still reads from it."""
        self.readers = [reader for reader in self.readers if not reader.is_set()]
        return bool(self.readers)

    def take(self, nbytes: int) -> Region:
        """The next region for ``nbytes``; the slot must have been made large enough."""
        wanted = room(nbytes)
        region = Region(self.used, wanted, self.memory[self.used : self.used + wanted])
        if self.used + wanted > self.memory.numel():
            raise CheckpointError(f"{self.data}: {self.used + wanted} bytes do not fit into {self.memory.numel()}")
        self.used += wanted
        return region

    def give_back(self, region: Region) -> None:
        """Nothing: regions of a slot stay."""

    def wait(self, limit_s: float) -> None:
        """Never needed: a slot has room for all."""

    def publish(self, placed: SlotIndex) -> None:
        """Say what is in it; from here on a restore finds it, once there is a commit record."""
        _put(self.index, seal(placed))


class Slots:
    """The slots of one rank in one folder.

    Args:
        folder: of own slots, or of a partner's.
        attempt_id: of the attempt.
        rank: whose part.
        keep: newest committed steps that are not overwritten.
    """

    def __init__(self, folder: Path, attempt_id: str, rank: int, keep: int) -> None:
        self._stem = str(folder / f"{encode_key(attempt_id)}.{rank_name(rank)}.")
        self._keep = keep
        self._slots: list[Slot] = []

    def take(self, nbytes: int) -> Slot:
        """A slot of at least ``nbytes`` that holds nothing that is kept or read; its memory is reserved.

        Raises:
            OSError: there is not that much shared memory.
        """
        full = [slot for slot in self._slots if slot.step is not None]
        # What the partner has of this rank is worth as much as what this rank has beside it: of the two newest steps
        # that were sent, one may still be on its way from some rank.
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

    def prepare(self, nbytes: int) -> None:
        """Add a slot of that size, if there will be need of one; what can be done before :meth:`take` holds nobody up.

        Raises:
            OSError: there is not that much shared memory.
        """
        if len(self._slots) <= self._keep:
            self._allocate(self._add(), nbytes)

    def _add(self) -> Slot:
        slot = Slot(Path(f"{self._stem}{len(self._slots)}{DATA}"), torch.empty(0, dtype=torch.uint8))
        self._slots.append(slot)
        return slot

    def _allocate(self, slot: Slot, nbytes: int) -> None:
        slot.memory = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
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
            slot.index.unlink(missing_ok=True)
            slot.data.unlink(missing_ok=True)
        self._slots = []


def _shared(path: Path, nbytes: int) -> torch.Tensor:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        # Reserved now: a write into a full tmpfs would end the process with SIGBUS.
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
    """Have a save count on this node."""
    _put(_commit_path(folder, commit.attempt_id, commit.save_id), record)


def drop_commit(folder: Path, attempt_id: str, save_id: int) -> None:
    """Remove a commit record of which no slot has anything any more."""
    _commit_path(folder, attempt_id, save_id).unlink(missing_ok=True)


def remove_records(folder: Path, attempt_id: str) -> None:
    """Remove all commit records of an attempt, of which no slot has anything any more, and folders that are empty."""
    for path in (folder / OWN).glob(f"{encode_key(attempt_id)}.*{_COMMIT}"):
        path.unlink(missing_ok=True)
    for path in (folder / OWN, folder / PARTNER, folder):
        with suppress(OSError):  # another rank's part, or another attempt's, lies there
            path.rmdir()


def _commit_path(folder: Path, attempt_id: str, save_id: int) -> Path:
    return folder / OWN / commit_name(attempt_id, save_id)


def commit_name(attempt_id: str, save_id: int) -> str:
    """The file of a commit record."""
    return f"{encode_key(attempt_id)}.{save_id}{_COMMIT}"


@dataclass(frozen=True)
class SlotContents:
    """One rank's part of one save, as it lies in this node's memory, or on its disk."""

    placed: SlotIndex
    data: Path
    tier: str
    """In which it lies; a partner's copy in this node's memory is in that tier."""

    @property
    def index(self) -> Path:
        """The file that says what is in it."""
        return self.data.with_suffix(INDEX)

    def remove(self) -> None:
        """Give its memory back."""
        self.index.unlink(missing_ok=True)
        self.data.unlink(missing_ok=True)

    def quarantine(self) -> None:
        """See that it is never taken again."""
        with suppress(FileNotFoundError):  # another rank has seen to it
            os.replace(self.index, self.index.with_suffix(".bad"))
        sync_dir(str(self.index.parent))


def holdings(folder: Path, own: str = MEMORY) -> Iterator[SlotContents]:
    """What lies in a folder, whether it is committed or not; what cannot be read is passed over.

    Args:
        folder: of this node's memory, or of its disk.
        own: the tier of what this node's ranks saved.
    """
    for lies in (OWN, PARTNER):
        for path in sorted((folder / lies).glob(f"*{INDEX}")):
            try:
                placed = unseal_placed(path.read_bytes(), path.name)
                yield SlotContents(placed, path.with_suffix(DATA), PARTNER if lies == PARTNER else own)
            except (Fault, FileNotFoundError):
                continue  # torn, of another version, or removed meanwhile: it is no copy


def commits(folder: Path) -> dict[Path, Commit]:
    """The commit records in a folder."""
    found = {}
    for path in sorted((folder / OWN).glob(f"*{_COMMIT}")):
        try:
            found[path] = unseal_commit(path.read_bytes())
        except (Fault, FileNotFoundError):
            continue
    return found


def clear(folder: Path, keep: int, attempt_id: str) -> None:
    """Remove what attempts before ``attempt_id`` left, unless it belongs to one of the ``keep`` newest committed steps.

    For one rank of a node, after a commit.
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
            path.unlink(missing_ok=True)  # data without an index, of an attempt that is over
    sync_dir(str(folder / OWN))  # on a disk, what was removed is not to come back


def _put(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
