"""Storage is read once, however many ranks need a file: one rank reads it and sends it to the others.

As in MegaScale (https://arxiv.org/abs/2402.15627, section 4.4), where restarts were slow because every data-parallel
replica read for itself. Ranks of one node that read a local disk share the page cache, and read for themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from outlast.checkpoint.format.names import STORAGE, parse_pack
from outlast.checkpoint.format.records import Fault, FileEntry, check_file, crc_hex
from outlast.checkpoint.memory.pages import Buffer
from outlast.checkpoint.restore.copies import BytesByTier
from outlast.checkpoint.restore.request import RestoreContext
from outlast.checkpoint.state.selection import Selection
from outlast.checkpoint.state.shares import share_out
from outlast.checkpoint.steps.reader import StepReader

_log = logging.getLogger("outlast.checkpoint")


@dataclass(frozen=True)
class SharedFiles:
    """Files in storage that this rank read or received, of one step. A :class:`FileSource`.

    Each is handed out once, except packs.
    """

    read: dict[str, Buffer]
    """By path; verified when they were read."""
    received: dict[str, Buffer]
    """By path; verified when they are handed out."""
    bytes_by_tier: BytesByTier = field(default_factory=BytesByTier)
    """That were handed out; all of them are the storage's."""

    def __call__(self, entry: FileEntry) -> Buffer | None:
        """A file's verified bytes, or None if there is no good copy here."""
        is_pack = parse_pack(entry.path) is not None  # needed for the replicated and for the local state
        take = dict.get if is_pack else dict.pop
        data: Buffer | None = take(self.read, entry.path, None)
        if data is None:
            data = _verified(entry, take(self.received, entry.path, None))
        if data is None:
            return None
        self.bytes_by_tier.add(STORAGE, entry.size_bytes)
        return data.copy() if is_pack else data

    def fill(self, entry: FileEntry, out: Buffer) -> bool:
        """Copy a chunk's elements to their place; False if there is no good copy here."""
        data = self(entry)
        if data is not None:
            np.copyto(out, data[: len(out)])
        return data is not None


def read_once(context: RestoreContext, step: int, parted: Collection[str], selection: Selection) -> SharedFiles | None:
    """Have each file that all ranks need read by one of them and sent to the others; collective.

    Fails as :class:`Agreement` does. No buffer is shared with other ranks once this returns.

    Args:
        context: of this rank.
        step: in storage.
        parted: paths of the tensors of which each rank needs a part; their chunks are not read here.
        selection: what is taken; of files that hold nothing else, none is read.

    Returns:
        None on all ranks if any of them cannot read its share: each rank then reads, and finds out, for itself.
    """
    files: list[FileEntry] = []
    owners: list[int] = []
    read: dict[str, Buffer] = {}
    try:
        reader = StepReader(context.store, step, context.io)
        files = [
            entry
            for entry in reader.files_of(None)
            if entry.path.rpartition("/")[0] not in parted and selection.takes_file(entry.path)
        ]
        owners = share_out([entry.size_bytes for entry in files], context.world_size)
        own = [entry for entry, owner in zip(files, owners, strict=True) if owner == context.rank]
        read = dict(zip((entry.path for entry in own), reader.read_all(own), strict=True))
        digest = _digest(files)
    except Exception as error:  # whatever it is, this rank meets it again when it reads for itself
        digest = f"rank {context.rank}: {error}"  # unlike every other rank's
    if len(set(context.agreement.all_gather_text(digest))) > 1 or not files:
        return None
    received: dict[str, Buffer] = {}
    for entry, owner in zip(files, owners, strict=True):
        data = torch.from_numpy(read[entry.path]) if owner == context.rank else None
        receivers = [rank for rank in range(context.world_size) if rank != owner]
        copy = context.agreement.transfer(data, entry.size_bytes, owner, receivers)
        if copy is not None and owner != context.rank:
            received[entry.path] = copy.numpy()
    return SharedFiles(read, received)


def _verified(entry: FileEntry, data: Buffer | None) -> Buffer | None:
    if data is None:
        return None
    try:
        check_file(entry, data.data)
    except Fault as fault:
        _log.warning("%s was damaged on its way from the rank that read it: %s", entry.path, fault.reason)
        return None
    return data


def _digest(entries: Sequence[FileEntry]) -> str:
    """Equal on ranks that have the same list of files."""
    return crc_hex("".join(f"{entry.path} {entry.size_bytes} {entry.crc32c}\n" for entry in entries).encode())
