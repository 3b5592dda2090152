"""Storage is read once, however many ranks need what lies there: one reader a file, then a broadcast.

(As MegaScale does, https://arxiv.org/abs/2402.15627, section 4.4: that every data-parallel replica read for itself was
what made its restarts slow.) Ranks of one node that read a local disk have the page cache for that, and read for
themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from outlast.checkpoint.format.names import parse_pack
from outlast.checkpoint.format.records import Fault, FileEntry, check_file, crc_hex
from outlast.checkpoint.memory.pages import Buffer
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.state.shares import share_out
from outlast.checkpoint.steps.reader import StepReader

_log = logging.getLogger("outlast.checkpoint")


@dataclass(frozen=True)
class Shared:
    """What was read or received; each file is given once, but for packs."""

    read: dict[str, Buffer]
    """Verified when it was read."""
    received: dict[str, Buffer]

    def __call__(self, entry: FileEntry) -> Buffer | None:
        """A file's verified bytes, or None if they are not here."""
        if parse_pack(entry.path) is not None:  # read for replicated and for local state
            return self._packed(entry)
        data = self.read.pop(entry.path, None)
        return data if data is not None else self._checked(entry, self.received.pop(entry.path, None))

    def _packed(self, entry: FileEntry) -> Buffer | None:
        data = self.read.get(entry.path)
        data = data if data is not None else self._checked(entry, self.received.get(entry.path))
        return data.copy() if data is not None else None

    def _checked(self, entry: FileEntry, data: Buffer | None) -> Buffer | None:
        if data is None:
            return None
        try:
            check_file(entry, data.data)
        except Fault as fault:
            _log.warning("%s was damaged on its way from its reader: %s", entry.path, fault.reason)
            return None
        return data


def read_once(
    read: Callable[[], tuple[StepReader, Sequence[FileEntry]]],
    rank: int,
    world_size: int,
    agreement: Agreement,
) -> Shared | None:
    """Have each file read by one rank and sent to the others; collective.

    Args:
        read: opens the step; its reader, and the files that all ranks need.
        rank: of this process.
        world_size: ranks of the group.
        agreement: over them.

    Returns:
        None on all ranks: some rank cannot read some file, and each is to find out for itself.
    """
    mine: dict[str, Buffer] = {}
    entries: Sequence[FileEntry] = ()
    owners: list[int] = []
    try:
        reader, entries = read()
        owners = share_out([entry.size_bytes for entry in entries], world_size)
        own = [entry for entry, owner in zip(entries, owners, strict=True) if owner == rank]
        mine = dict(zip((entry.path for entry in own), reader.read_all(own), strict=True))
        said = _digest(entries)
    except (Fault, OSError) as error:
        said = f"rank {rank}: {error}"
    if len(set(agreement.all_gather_text(said))) > 1 or not entries:
        return None
    received: dict[str, Buffer] = {}
    for entry, owner in zip(entries, owners, strict=True):
        data = torch.from_numpy(mine[entry.path]) if owner == rank else None
        others = [other for other in range(world_size) if other != owner]
        got = agreement.transfer(data, entry.size_bytes, owner, others)
        if got is not None and owner != rank:
            received[entry.path] = got.numpy()
    return Shared(mine, received)


def _digest(entries: Sequence[FileEntry]) -> str:
    """The same on ranks that walk the same list."""
    return crc_hex("".join(f"{entry.path} {entry.size_bytes} {entry.crc32c}\n" for entry in entries).encode())
