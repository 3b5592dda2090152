"""Reading a committed step: every byte that is used, or looked at, is verified first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from outlast.checkpoint._json import from_json
from outlast.checkpoint._names import NODE, PACKS, decode_key, parse_local, parse_pack, rank_name, step_name
from outlast.checkpoint._records import Commit, Fault, FileEntry, Vote, crc_hex, read_commit, unseal_vote
from outlast.checkpoint._store import Buffer, Store
from outlast.checkpoint._tree import HEADER
from outlast.checkpoint._zarr import (
    CRC_BYTES,
    ArrayInfo,
    as_tensor,
    chunk_name,
    node_path,
    parse_node,
    payload,
    put_chunk,
    unpack,
)
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
        """The files of a rank's local state, or (None) of the replicated state. Packs may hold some of either."""
        if rank is None:
            files = (entry for vote in self.votes for entry in vote.files)
            return [entry for entry in files if parse_local(entry.path) is None]
        return [entry for entry in self.votes[rank].files if rank in (parse_local(entry.path), parse_pack(entry.path))]

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
            Fault: a file is missing or damaged; the first in the order of the votes.
        """
        entries = self.files_of(rank)
        nodes = self._nodes(entries)
        top = "" if rank is None else rank_name(rank)
        if top not in nodes:
            raise Fault(IncompleteCheckpoint, node_path(top), "no vote lists this file")
        groups: dict[str, dict[str, Any]] = {}
        # A parent's path is shorter than its children's, so parents come first.
        for path in sorted((path for path in nodes if not isinstance(nodes[path], ArrayInfo)), key=len):
            values: Any = nodes[path]
            groups[path] = {key: from_json(item) for key, item in values.items() if path or key != HEADER}
            if path != top:
                _put(groups, path, groups[path])
        for path, tensor in self._tensors(rank, nodes, entries).items():
            _put(groups, path, tensor)
        return groups[top]

    def describe(self, rank: int | None) -> tuple[dict[str, ArrayInfo], dict[str, dict[str, Any]]]:
        """Arrays, and attributes of groups, by path relative to the step; chunks are not read.

        Raises:
            Fault: a metadata file is missing or damaged.
        """
        arrays: dict[str, ArrayInfo] = {}
        values: dict[str, dict[str, Any]] = {}
        for path, info in self._nodes(self.files_of(rank)).items():
            if not isinstance(info, ArrayInfo):
                values[path] = from_json(info)
            elif info.packed is None:
                arrays[path] = info
            else:
                for name, entry in info.packed.items():
                    if parse_local(name) == rank:
                        arrays[name] = ArrayInfo(entry.shape, entry.dtype, entry.shape)
        return arrays, values

    def _nodes(self, entries: Iterable[FileEntry]) -> dict[str, ArrayInfo | dict[str, Any]]:
        """Arrays, and groups' attributes, by path."""
        documents = [entry for entry in entries if not entry.chunk]
        nodes = {
            entry.path.removesuffix(NODE).rstrip("/"): parse_node(bytes(data), entry.path)
            for entry, data in zip(documents, self._io.map(self.read, documents), strict=True)
        }
        nodes.pop(PACKS, None)  # a group of the format's, not of the state's
        return nodes

    def _tensors(
        self, rank: int | None, nodes: dict[str, ArrayInfo | dict[str, Any]], entries: Iterable[FileEntry]
    ) -> dict[str, torch.Tensor]:
        """By path. A chunk's memory becomes its tensor's, or is let go of once it was copied to its place there."""
        chunks = {entry.path: entry for entry in entries if entry.chunk}
        work: list[tuple[str, ArrayInfo, tuple[int, ...], FileEntry]] = []
        found: dict[str, torch.Tensor] = {}
        for path, info in nodes.items():
            if not isinstance(info, ArrayInfo):
                continue
            places = info.places()
            for place in places:
                file = f"{path}/{chunk_name(place)}"
                if file not in chunks:
                    raise Fault(IncompleteCheckpoint, file, "no vote lists this chunk, though its array has elements")
                work.append((path, info, place, chunks[file]))
            if info.packed is None and info.shape != info.chunk:
                found[path] = torch.empty(info.shape, dtype=info.dtype)

        def read(task: tuple[str, ArrayInfo, tuple[int, ...], FileEntry]) -> dict[str, torch.Tensor]:
            path, info, place, entry = task
            data = payload(info, self.read(entry), entry.path)
            if info.packed is not None:
                tensors = unpack(info, data, entry.path)
                return {name: tensor for name, tensor in tensors.items() if parse_local(name) == rank}
            if path not in found:
                return {path: as_tensor(data, info.shape, info.dtype)}
            put_chunk(info, data, place, found[path])
            return {}

        order = {entry.path: number for number, entry in enumerate(chunks.values())}
        work.sort(key=lambda task: order[task[3].path])
        for some in list(self._io.map(read, work)):
            found |= some
        return found

    def read(self, entry: FileEntry) -> Buffer:
        """A file's bytes, verified against the vote; raises :class:`Fault`."""
        try:
            data = self._store.read(f"{step_name(self.step)}/{entry.path}")
        except FileNotFoundError as error:
            raise Fault(IncompleteCheckpoint, entry.path, "missing") from error
        except (ConnectionError, TimeoutError, PermissionError):
            raise  # says nothing about the file
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


def _put(groups: dict[str, dict[str, Any]], path: str, value: Any) -> None:
    parent, _, name = path.rpartition("/")
    groups[parent][decode_key(name)] = value
