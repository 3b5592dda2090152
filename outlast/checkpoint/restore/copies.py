"""What a restore finds in the memory of the nodes and on their disks, and how it is handed out."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from outlast.checkpoint.format.names import LOCAL_DISK, MEMORY, PARTNER, parse_local, parse_pack
from outlast.checkpoint.format.records import Commit, Fault, FileEntry, RunningChecksum, check_file, check_pieces
from outlast.checkpoint.memory.pages import Buffer
from outlast.checkpoint.restore.slot_files import SlotFiles
from outlast.errors import CorruptCheckpoint, IncompleteCheckpoint

_log = logging.getLogger("outlast.checkpoint")


@dataclass(frozen=True)
class SurveyedSave:
    """One committed save, as far as some node has parts of it; equal on all ranks."""

    commit: Commit
    holders: dict[int, tuple[str, ...]]
    """By rank that saved: the nodes that have its part."""
    in_memory: dict[int, tuple[str, ...]]
    """The same, of those that have it in memory."""

    @property
    def key(self) -> tuple[str, int]:
        """Which save of which attempt."""
        return self.commit.attempt_id, self.commit.save_id

    @property
    def missing(self) -> list[int]:
        """Ranks whose parts no node has."""
        return [rank for rank in range(self.commit.world_size) if rank not in self.holders]


@dataclass
class BytesByTier:
    """How many bytes came from which tier; may be added to from several threads."""

    counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, tier: str, nbytes: int) -> None:
        """Count."""
        with self._lock:
            self.counts[tier] += nbytes


@dataclass(frozen=True)
class AvailableCopies:
    """What one rank has at hand of a save that lies in the nodes' memory, or on their disks."""

    lying: SlotFiles
    """On this node."""
    good: set[str]
    """What of it is not known to be damaged."""
    verified: bool
    """Whether that was looked at; else reading it is what finds damage, and raises :class:`Fault`."""
    sent: dict[str, Buffer]
    """From other nodes, not yet verified."""
    damaged: dict[tuple[str, str, str], str]
    """By node, file and tier: what is wrong with it; equal on all ranks."""
    taken: BytesByTier
    given: set[str] = field(default_factory=set)
    """Files of which tensors were made: what is read again gets memory of its own."""

    def __call__(self, entry: FileEntry) -> Buffer | None:
        """A file's verified bytes, or None if memory has none."""
        again = entry.path in self.given
        view = None
        if entry.path in self.good:
            view = self.lying.view(entry.path)
            if not self.verified:
                check_file(entry, view.data)
            self.taken.add(self.lying.tier(entry.path), entry.size_bytes)
        elif entry.path in self.sent:
            view = self.sent[entry.path]
            try:
                check_file(entry, view.data)
            except Fault as fault:
                _log.warning("%s was damaged on its way from another node's memory: %s", entry.path, fault.reason)
                return None
            self.taken.add(PARTNER, entry.size_bytes)
            if parse_local(entry.path) is None and parse_pack(entry.path) is None:
                del self.sent[entry.path]  # read once, into its tensor
        if view is None:
            return None
        self.given.add(entry.path)
        return view.copy() if again else view

    def fill(self, entry: FileEntry, out: Buffer) -> bool:
        """Have a chunk's elements where they belong, verified; False if memory has none."""
        if entry.path not in self.good:
            found = self(entry)
            if found is not None:
                np.copyto(out, found[: len(out)])
            return found is not None
        seen = RunningChecksum()
        try:
            check_pieces(entry, seen, self.lying.read_into(entry.path, out.data, seen))
        except Fault as fault:
            if not self.verified:
                raise
            _log.warning("%s was whole in this node's memory a moment ago: %s", entry.path, fault.reason)
            return False
        self.taken.add(self.lying.tier(entry.path), entry.size_bytes)
        return True


def missing_fault(save: SurveyedSave) -> Fault:
    """Of a save that the nodes have in part."""
    ranks = ", ".join(map(str, save.missing))
    return Fault(IncompleteCheckpoint, "", f"the parts of ranks {ranks} are in no node's memory")


def bad_faults(gathered: AvailableCopies) -> list[Fault]:
    """What was found damaged, one a file, node and tier."""
    where = {
        MEMORY: "in a node's memory",
        PARTNER: "a partner's copy in a node's memory",
        LOCAL_DISK: "on a node's disk",
    }
    return [
        Fault(CorruptCheckpoint, path, f"{reason} ({where[tier]})")
        for (_, path, tier), reason in gathered.damaged.items()
    ]
