"""Reading a committed step: every byte that is used, or looked at, is verified first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from outlast.checkpoint._json import from_json
from outlast.checkpoint._names import NODE, decode_key, rank_name, step_name
from outlast.checkpoint._records import Commit, Fault, FileEntry, Vote, crc_hex, read_commit, unseal_vote
from outlast.checkpoint._store import Buffer, Store
from outlast.checkpoint._tree import HEADER
from outlast.checkpoint._zarr import CRC_BYTES, ArrayInfo, as_tensor, chunk_name, node_path, parse_node
from outlast.errors import CheckpointError, CorruptCheckpoint, IncompleteCheckpoint, UnknownFormatVersion

Progress = Callable[[int, int], None]
"""Called with bytes verified so far and bytes in all."""


def as_error(fault: Fault, store: Store, step: int) -> CheckpointError:
    """The public error of a fault, with the file's whole path."""
    where = f"{store.url}/{step_name(step)}" + (f"/{fault.file}" if fault.file else "")
    if fault.kind is UnknownFormatVersion:
        fix = "read it with the version of outlast that wrote it, or a newer one; it is left as it is"
    elif fault.kind in (CorruptCheckpoint, IncompleteCheckpoint):
        fix = "restore an earlier step (`auto` does so); `outlast ckpt verify` lists all damaged files"
    else:
        fix = ""
    return fault.kind(f"{where}: {fault.reason}", fix)


class StepReader:
    """One committed step. Its commit record and votes are read and verified by the constructor.

    Raises:
        Fault: the commit record or a vote is missing, damaged, or of an unknown version.
    """

    def __init__(self, store: Store, step: int, io: ThreadPoolExecutor) -> None:
        self.step = step
        self.commit: Commit = read_commit(store, step)
        self._store = store
        self._io = io
        self.votes: tuple[Vote, ...] = tuple(self._vote(rank, entry) for rank, entry in enumerate(self.commit.votes))

    def files_of(self, rank: int | None) -> list[FileEntry]:
        """The files of a rank's local state, or (None) of the replicated state."""
        vote = self.votes[0 if rank is None else rank]
        local = f"{rank_name(vote.rank)}/"
        return [entry for entry in vote.files if entry.path.startswith(local) == (rank is not None)]

    def verify(self, entries: Iterable[FileEntry], progress: Progress | None = None) -> list[Fault]:
        """Verify files; returns what is wrong with which."""
        entries = list(entries)
        total, done, faults = sum(entry.size_bytes for entry in entries), 0, []
        for entry, fault in zip(entries, self._io.map(self._fault, entries), strict=True):
            if fault is not None:
                faults.append(fault)
            done += entry.size_bytes
            if progress is not None:
                progress(done, total)
        return faults

    def load(self, rank: int | None) -> dict[str, Any]:
        """The local state of a rank, or (None) the replicated state; tensors on the CPU.

        Raises:
            Fault: a file is missing or damaged; the first in the order of the vote.
        """
        entries = self.files_of(rank)
        data = dict(zip((entry.path for entry in entries), self._io.map(self.read, entries), strict=True))
        nodes = {path: parse_node(bytes(data[path]), path) for path in data if path.rpartition("/")[2] == NODE}
        top = "" if rank is None else rank_name(rank)
        if node_path(top) not in nodes:
            raise Fault(IncompleteCheckpoint, node_path(top), "no vote lists this file")
        groups: dict[str, dict[str, Any]] = {}
        # A parent's path is shorter than its children's, so parents come first.
        for file in sorted(nodes, key=len):
            path = file.removesuffix(NODE).rstrip("/")
            value: Any
            info = nodes[file]
            if isinstance(info, ArrayInfo):
                chunk = f"{path}/{chunk_name(len(info.shape))}"
                value = as_tensor(info, self._chunk(chunk, info, data), chunk)
            else:
                value = groups[path] = {key: from_json(item) for key, item in info.items() if path or key != HEADER}
            if path != top:
                parent, _, name = path.rpartition("/")
                groups[parent][decode_key(name)] = value
        return groups[top]

    def describe(self, rank: int | None) -> tuple[dict[str, ArrayInfo], dict[str, dict[str, Any]]]:
        """Arrays, and attributes of groups, by path relative to the step; chunks are not read.

        Raises:
            Fault: a metadata file is missing or damaged.
        """
        entries = [entry for entry in self.files_of(rank) if not entry.chunk]
        arrays: dict[str, ArrayInfo] = {}
        values: dict[str, dict[str, Any]] = {}
        for entry, data in zip(entries, self._io.map(self.read, entries), strict=True):
            path = entry.path.removesuffix(NODE).rstrip("/")
            info = parse_node(bytes(data), entry.path)
            if isinstance(info, ArrayInfo):
                arrays[path] = info
            else:
                values[path] = from_json(info)
        return arrays, values

    def read(self, entry: FileEntry) -> Buffer:
        """A file's bytes, verified against the vote; raises :class:`Fault`."""
        try:
            data = self._store.read(f"{step_name(self.step)}/{entry.path}")
        except FileNotFoundError as error:
            raise Fault(IncompleteCheckpoint, entry.path, "missing") from error
        except PermissionError:
            raise
        except OSError as error:
            raise Fault(CorruptCheckpoint, entry.path, f"cannot be read: {error}") from error
        if len(data) != entry.size_bytes:
            raise Fault(CorruptCheckpoint, entry.path, f"has {len(data)} bytes, {entry.size_bytes} were written")
        view = data.data
        if entry.chunk:
            stored = bytes(view[-CRC_BYTES:])[::-1].hex()
            if stored != entry.crc32c:
                raise Fault(CorruptCheckpoint, entry.path, f"its own CRC32C is {stored}, written was {entry.crc32c}")
            view = view[:-CRC_BYTES]
        computed = crc_hex(view)
        if computed != entry.crc32c:
            raise Fault(CorruptCheckpoint, entry.path, f"CRC32C of its bytes is {computed}, written was {entry.crc32c}")
        return data

    def _fault(self, entry: FileEntry) -> Fault | None:
        try:
            self.read(entry)
        except Fault as fault:
            return fault
        return None

    def _vote(self, rank: int, entry: FileEntry) -> Vote:
        vote = unseal_vote(bytes(self.read(entry)), entry.path)
        commit = self.commit
        if (vote.rank, vote.step, vote.epoch, vote.serial) != (rank, commit.step, commit.epoch, commit.serial):
            raise Fault(CorruptCheckpoint, entry.path, f"is the vote of rank {vote.rank} for another save")
        return vote

    @staticmethod
    def _chunk(path: str, info: ArrayInfo, data: dict[str, Buffer]) -> Buffer | None:
        if info.payload_bytes and path not in data:
            raise Fault(IncompleteCheckpoint, path, "no vote lists this chunk, though its array has elements")
        return data.get(path)
