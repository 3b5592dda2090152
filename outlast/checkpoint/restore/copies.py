"""The copies of a save that one rank can use without the storage, and how they are handed to the reader."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from outlast.checkpoint.format.names import LOCAL_DISK, MEMORY, PARTNER, parse_local, parse_pack
from outlast.checkpoint.format.records import Fault, FileEntry, RunningChecksum, Vote, check_file, check_pieces
from outlast.checkpoint.memory.pages import Buffer
from outlast.checkpoint.restore.messages import DamagedCopy
from outlast.checkpoint.restore.slot_files import SlotFiles
from outlast.errors import CorruptCheckpoint

_log = logging.getLogger("outlast.checkpoint")
_WHERE = {
    MEMORY: "in a node's memory",
    PARTNER: "in the copy in a partner node's memory",
    LOCAL_DISK: "on a node's disk",
}


@dataclass
class BytesByTier:
    """How many bytes came from which tier. Several threads may count at once."""

    counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, tier: str, nbytes: int) -> None:
        """Count bytes from a tier."""
        with self._lock:
            self.counts[tier] += nbytes


@dataclass(frozen=True)
class AvailableCopies:
    """What one rank has of a save: its node's copies, and what other nodes sent. A :class:`FileSource`."""

    files: SlotFiles
    """Of this node."""
    good: set[str]
    """The paths of those that are not known to be damaged."""
    verified: bool
    """Whether they were verified; if not, reading a damaged one raises :class:`Fault`."""
    received: dict[str, Buffer]
    """From other nodes, not yet verified."""
    damaged: list[DamagedCopy]
    """On any node; equal on all ranks."""
    votes: dict[int, Vote]
    """By rank; of those parts that nodes have."""
    bytes_by_tier: BytesByTier = field(default_factory=BytesByTier)
    """That were handed out."""
    handed_out: set[str] = field(default_factory=set)
    """Paths of the files whose memory tensors share: who reads one again gets a copy."""

    def __call__(self, entry: FileEntry) -> Buffer | None:
        """A file's verified bytes, or None if there is no good copy."""
        again = entry.path in self.handed_out
        data = self._own(entry) if entry.path in self.good else self._received(entry)
        if data is None:
            return None
        self.handed_out.add(entry.path)
        return data.copy() if again else data

    def fill(self, entry: FileEntry, out: Buffer) -> bool:
        """Read a chunk's elements into their place and verify them; False if there is no good copy."""
        if entry.path not in self.good:
            data = self(entry)
            if data is not None:
                np.copyto(out, data[: len(out)])
            return data is not None
        checksum = RunningChecksum()
        try:
            check_pieces(entry, checksum, self.files.read_into(entry.path, out.data, checksum))
        except Fault as fault:
            if not self.verified:
                raise
            _log.warning("%s on this node was verified, and is damaged now: %s", entry.path, fault.reason)
            return False
        self.bytes_by_tier.add(self.files.tier(entry.path), entry.size_bytes)
        return True

    def damage_faults(self) -> list[Fault]:
        """The damaged copies as faults, one for each file, node and tier."""
        return [Fault(CorruptCheckpoint, copy.path, f"{copy.reason} ({_WHERE[copy.tier]})") for copy in self.damaged]

    def _own(self, entry: FileEntry) -> Buffer:
        data = self.files.view(entry.path)
        if not self.verified:
            check_file(entry, data.data)
        self.bytes_by_tier.add(self.files.tier(entry.path), entry.size_bytes)
        return data

    def _received(self, entry: FileEntry) -> Buffer | None:
        data = self.received.get(entry.path)
        if data is None:
            return None
        try:
            check_file(entry, data.data)
        except Fault as fault:
            _log.warning("%s was damaged on its way from another node: %s", entry.path, fault.reason)
            return None
        self.bytes_by_tier.add(PARTNER, entry.size_bytes)
        if parse_local(entry.path) is None and parse_pack(entry.path) is None:
            del self.received[entry.path]  # read once, into its tensor
        return data
