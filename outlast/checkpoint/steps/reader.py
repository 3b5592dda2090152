"""Reading a committed step: every byte that is used, or looked at, is verified first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch

from outlast.checkpoint.format.json_values import from_json
from outlast.checkpoint.format.names import (
    HEADER,
    NODE,
    PACKS,
    decode_key,
    parse_local,
    parse_pack,
    rank_name,
    step_name,
)
from outlast.checkpoint.format.records import (
    Commit,
    Fault,
    FileEntry,
    RunningChecksum,
    Vote,
    check_file,
    check_pieces,
    unseal_vote,
)
from outlast.checkpoint.format.zarr import (
    ArrayInfo,
    as_tensor,
    check_size,
    chunk_name,
    node_path,
    parse_node,
    payload,
    put_chunk,
    room_for,
    unpack,
)
from outlast.checkpoint.memory.pages import Buffer, allocate
from outlast.checkpoint.state.boxes import Box, whole
from outlast.checkpoint.state.target import RestoreTarget, part_of
from outlast.checkpoint.steps.commit import read_commit
from outlast.checkpoint.storage.base import Store
from outlast.errors import CheckpointError, CorruptCheckpoint, IncompleteCheckpoint, UnknownFormatVersion

T = TypeVar("T")
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


class FileSource(Protocol):
    """A place from which files come faster than from the store. It may be called from several threads."""

    def __call__(self, entry: FileEntry) -> Buffer | None:
        """A file's verified bytes, writable, or None if they are not here."""

    def fill(self, entry: FileEntry, out: Buffer) -> bool:
        """Have a chunk's elements where they belong, verified; False if they are not here, whatever lies there then."""


class StepReader:
    """One committed step. Its commit record and votes are read and verified by the constructor.

    Args:
        store: where it lies.
        step: which.
        io: threads that read and verify.
        faster: what is asked first.
        commit: the commit record; None reads the store's.
        votes: those that are known already, by rank.

    Raises:
        Fault: the commit record or a vote is missing, damaged, or of an unknown version.
    """

    def __init__(
        self,
        store: Store,
        step: int,
        io: ThreadPoolExecutor,
        faster: FileSource | None = None,
        commit: Commit | None = None,
        votes: Mapping[int, Vote] = MappingProxyType({}),
    ) -> None:
        self.step = step
        self.commit: Commit = commit if commit is not None else read_commit(store, step)
        self._store = store
        self._io = io
        self._faster = faster
        self.votes: tuple[Vote, ...] = tuple(
            votes[rank] if rank in votes else self._vote(rank, entry) for rank, entry in enumerate(self.commit.votes)
        )

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

    def load(self, rank: int | None, wanted: RestoreTarget | None = None) -> dict[str, Any]:
        """The local state of a rank, or (None) the replicated state; tensors on the CPU.

        Args:
            rank: whose state.
            wanted: of which tensors this rank needs a part, and where they are to be read to; chunks that lie in no
                such part are not read.

        Raises:
            Fault: a file is missing or damaged; the first in the order of the votes. Where tensors are read to, some
                may have been overwritten.
            StateMismatch: the step has other tensors than are wanted; no chunk is read.
        """
        entries = self.files_of(rank)
        nodes = self._nodes(entries)
        if wanted is not None:
            wanted.check(_described(rank, nodes))
        top = "" if rank is None else rank_name(rank)
        if top not in nodes:
            raise Fault(IncompleteCheckpoint, node_path(top), "no vote lists this file")
        groups: dict[str, dict[Any, Any]] = {}
        # A parent's path is shorter than its children's, so parents come first.
        for path in sorted((path for path in nodes if not isinstance(nodes[path], ArrayInfo)), key=len):
            values: Any = nodes[path]
            groups[path] = {key: from_json(item) for key, item in values.items() if path or key != HEADER}
            if path != top:
                _put(groups, path, groups[path])
        for path, tensor in self._tensors(rank, nodes, entries, wanted).items():
            _put(groups, path, tensor if wanted is None else wanted.placed(path, tensor))
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
        self,
        rank: int | None,
        nodes: dict[str, ArrayInfo | dict[str, Any]],
        entries: Iterable[FileEntry],
        wanted: RestoreTarget | None,
    ) -> dict[str, torch.Tensor]:
        """By path, whole or (where a part is wanted) a part of it.

        A chunk's memory becomes its tensor's, or is let go of once it was copied to its place there.
        """
        boxes: Mapping[str, Box] = wanted.boxes if wanted is not None else {}
        chunks = {entry.path: entry for entry in entries if entry.chunk}
        work: list[tuple[str, ArrayInfo, tuple[int, ...], FileEntry]] = []
        found: dict[str, torch.Tensor] = {}
        for path, info in nodes.items():
            if not isinstance(info, ArrayInfo):
                continue
            box = boxes.get(path) or whole(info.shape)
            target = wanted.target(path) if wanted is not None else None
            places = box.places(info.chunk)
            for place in places:
                file = f"{path}/{chunk_name(place)}"
                if file not in chunks:
                    raise Fault(IncompleteCheckpoint, file, "no vote lists this chunk, though its array has elements")
                work.append((path, info, place, chunks[file]))
            is_chunk = box.size == info.chunk and len(places) == 1
            if target is not None:
                found[path] = target
            elif info.packed is None and not is_chunk:
                found[path] = as_tensor(allocate(math.prod(box.size) * info.dtype.itemsize), box.size, info.dtype)

        def read(task: tuple[str, ArrayInfo, tuple[int, ...], FileEntry]) -> dict[str, torch.Tensor]:
            path, info, place, entry = task
            start = boxes[path].start if path in boxes else None
            if path in found and (room := room_for(info, place, found[path], start)) is not None:
                self._read_to(room, info, entry)
                return {}
            data = payload(info, self.read(entry), entry.path)
            if info.packed is not None:
                tensors = unpack(info, data, entry.path)
                return {
                    name: part_of(tensor, boxes[name]) if name in boxes else tensor
                    for name, tensor in tensors.items()
                    if parse_local(name) == rank
                }
            if path not in found:
                return {path: as_tensor(data, info.chunk, info.dtype)}
            put_chunk(info, data, place, found[path], start)
            return {}

        order = {entry.path: number for number, entry in enumerate(chunks.values())}
        work.sort(key=lambda task: order[task[3].path])
        for some in list(self._io.map(read, work)):
            for name, tensor in some.items():
                target = wanted.target(name) if wanted is not None else None
                found[name] = tensor if target is None else target.copy_(tensor)
        return found

    def read(self, entry: FileEntry) -> Buffer:
        """A file's bytes, verified against the vote; raises :class:`Fault`."""
        if self._faster is not None and (found := self._faster(entry)) is not None:
            return found
        data = self._stored(entry, self._store.read)
        check_file(entry, data.data)
        return data

    def _read_to(self, room: Buffer, info: ArrayInfo, entry: FileEntry) -> None:
        """A chunk's elements, verified, to where they belong; raises :class:`Fault`, and then something lies there."""
        check_size(info, entry.size_bytes, entry.path)
        if self._faster is not None and self._faster.fill(entry, room):
            return
        seen = RunningChecksum()
        end = self._stored(entry, lambda path: self._store.read_into(path, room.data, seen))
        check_pieces(entry, seen, end)

    def _stored(self, entry: FileEntry, read: Callable[[str], T]) -> T:
        try:
            return read(f"{step_name(self.step)}/{entry.path}")
        except FileNotFoundError as error:
            raise Fault(IncompleteCheckpoint, entry.path, "missing") from error
        except (ConnectionError, TimeoutError, PermissionError):
            raise  # says nothing about the file
        except OSError as error:
            raise Fault(CorruptCheckpoint, entry.path, f"cannot be read: {error}") from error

    def read_all(self, entries: Iterable[FileEntry]) -> list[Buffer]:
        """Several files' bytes, verified; raises :class:`Fault`, of the first in order."""
        return list(self._io.map(self.read, entries))

    def _fault(self, entry: FileEntry) -> Fault | None:
        try:
            self.read(entry)
        except Fault as fault:
            return fault
        return None

    def _vote(self, rank: int, entry: FileEntry) -> Vote:
        vote = unseal_vote(bytes(self.read(entry)), entry.path)
        commit = self.commit
        if (vote.rank, vote.step, vote.attempt_id, vote.save_id) != (
            rank,
            commit.step,
            commit.attempt_id,
            commit.save_id,
        ):
            raise Fault(CorruptCheckpoint, entry.path, f"is the vote of rank {vote.rank} for another save")
        return vote


def _described(rank: int | None, nodes: dict[str, ArrayInfo | dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Shape and dtype of a state's tensors, by path."""
    arrays = {path: info for path, info in nodes.items() if isinstance(info, ArrayInfo)}
    found: dict[str, tuple[Any, ...]] = {
        path: (info.shape, info.dtype) for path, info in arrays.items() if info.packed is None
    }
    for info in arrays.values():
        packed = info.packed or {}
        found |= {path: (at.shape, at.dtype) for path, at in packed.items() if parse_local(path) == rank}
    return found


def _put(groups: dict[str, dict[Any, Any]], path: str, value: Any) -> None:
    parent, _, name = path.rpartition("/")
    groups[parent][decode_key(name)] = value
