"""Reading a committed step: every byte is verified before it is used."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch

from outlast.checkpoint.format.names import (
    NODE,
    PACKS,
    decode_key,
    parse_local,
    parse_pack,
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
    wrong_size,
)
from outlast.checkpoint.format.zarr import (
    ArrayInfo,
    as_tensor,
    check_size,
    chunk_name,
    parse_node,
    payload,
    put_chunk,
    room_for,
    unpack,
)
from outlast.checkpoint.memory.pages import Buffer, allocate
from outlast.checkpoint.state.boxes import Box, whole
from outlast.checkpoint.state.matched import LEFT_OUT, Matched
from outlast.checkpoint.state.selection import EVERYTHING, Selection
from outlast.checkpoint.state.target import RestoreTarget, part_of
from outlast.checkpoint.steps.commit import as_fault, read_commit
from outlast.checkpoint.steps.groups import Groups
from outlast.checkpoint.steps.structure import (
    arrays_in,
    check_structure,
    check_votes,
    groups_in,
    top_of,
    types_of,
)
from outlast.checkpoint.storage.base import FileTooLarge, Store
from outlast.errors import CheckpointError, CorruptCheckpoint, IncompleteCheckpoint, UnknownFormatVersion

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with the bytes verified so far and in total."""


def as_error(fault: Fault, store: Store, step: int) -> CheckpointError:
    """The public error for a fault, with the file's whole path."""
    where = f"{store.url}/{step_name(step)}" + (f"/{fault.file}" if fault.file else "")
    if fault.kind is UnknownFormatVersion:
        fix = "read it with the version of outlast that wrote it, or a newer one; it is unchanged"
    elif fault.kind in (CorruptCheckpoint, IncompleteCheckpoint):
        fix = "restore an earlier step (`auto` does so); `outlast ckpt verify` lists all damaged files"
    else:
        fix = ""
    return fault.kind(f"{where}: {fault.reason}", fix)


class FileSource(Protocol):
    """A source of files that is asked before the store. Several threads may call it at once."""

    def __call__(self, entry: FileEntry) -> Buffer | None:
        """A file's verified bytes, writable, or None if the source does not have them."""

    def fill(self, entry: FileEntry, out: Buffer) -> bool:
        """Read a chunk's elements into ``out`` and verify them; False, and any bytes in ``out``, if it has no copy."""


@dataclass(frozen=True)
class ChunkRead:
    """One chunk to read, and its place."""

    path: str
    """Of its array."""
    info: ArrayInfo
    """Of its array."""
    index: tuple[int, ...]
    """In the array's grid of chunks."""
    entry: FileEntry
    out: torch.Tensor | None
    """This rank's part of the tensor, to be filled; None: the tensor, or those of a pack, are made of the chunk."""
    start: tuple[int, ...] | None
    """Where in the whole tensor ``out`` begins; None: ``out`` is all of it."""


class StepReader:
    """One committed step. The constructor reads and verifies its commit record and votes.

    Args:
        store: of the step.
        step: its number.
        io: threads that read and verify.
        faster: asked before the store; None: there is no such source.
        commit: the commit record, if it is known; None reads it from the store.
        votes: those that are known, by rank.

    Attributes:
        stored_bytes: how much was read from the store, the commit record apart.

    Raises:
        Fault: the commit record or a vote is missing, damaged, or of an unknown version.
    """

    def __init__(
        self,
        store: Store,
        step: int,
        io: Executor,
        faster: FileSource | None = None,
        commit: Commit | None = None,
        votes: Mapping[int, Vote] = MappingProxyType({}),
    ) -> None:
        self.step = step
        self.commit: Commit = commit if commit is not None else read_commit(store, step)
        self._store = store
        self._io = io
        self._faster = faster
        self.stored_bytes = 0
        self._counting = threading.Lock()
        self.votes: tuple[Vote, ...] = tuple(
            votes[rank] if rank in votes else self._vote(rank, entry) for rank, entry in enumerate(self.commit.votes)
        )
        check_votes(self.commit, self.votes)

    def files_of(self, rank: int | None) -> list[FileEntry]:
        """The files of a rank's local state, or (None) of the replicated state. A pack may hold parts of both."""
        if rank is None:
            files = (entry for vote in self.votes for entry in vote.files)
            return [entry for entry in files if parse_local(entry.path) is None]
        return [entry for entry in self.votes[rank].files if rank in (parse_local(entry.path), parse_pack(entry.path))]

    def parts(self) -> list[str]:
        """The top-level keys of the replicated state, and of local states, that are dictionaries; sorted."""
        found = set()
        for vote in self.votes:
            for entry in vote.files:
                keys = entry.path.split("/")
                if parse_local(entry.path) is not None:
                    keys = keys[1:]
                if len(keys) == 2 and keys[1] == NODE and keys[0] != PACKS:
                    found.add(str(decode_key(keys[0])))
        return sorted(found)

    def verify(self, entries: Iterable[FileEntry], progress: Progress | None = None) -> list[Fault]:
        """Verify files; returns what is wrong with them, in their order."""
        entries = list(entries)
        total, done, faults = sum(entry.size_bytes for entry in entries), 0, []
        for entry, fault in zip(entries, self._io.map(self._fault, entries), strict=True):
            if fault is not None:
                faults.append(fault)
            done += entry.size_bytes
            if progress is not None:
                progress(done, total)
        return faults

    def check(
        self, ranks: Iterable[int | None], progress: Progress | None = None, selection: Selection = EVERYTHING
    ) -> list[Fault]:
        """All that keeps local states, or (None) the replicated state, from being loaded; no tensor is made.

        Args:
            ranks: whose states.
            progress: called with the bytes verified so far and in total.
            selection: what of them; of local state, only its parts matter.

        Returns:
            The files that are missing or damaged; and of each state, if its documents are intact, the first thing in
            them that no save writes.
        """
        files = {rank: [entry for entry in self.files_of(rank) if selection.takes_file(entry.path)] for rank in ranks}
        faults = self.verify({entry.path: entry for of_rank in files.values() for entry in of_rank}.values(), progress)
        damaged = {fault.file for fault in faults}
        for rank, entries in files.items():
            if damaged.isdisjoint(entry.path for entry in entries if not entry.chunk):
                try:
                    nodes = self._nodes(rank, entries, selection)
                    taken = {path for path in types_of(rank, arrays_in(nodes)) if selection.takes_part(path)}
                    groups = Groups(groups_in(nodes), top_of(rank), parts=selection.parts, stand_ins=True)
                    groups.close(dict.fromkeys(taken), lambda path, shape, items: items)
                except Fault as fault:
                    faults.append(fault)
        return faults

    @property
    def states(self) -> list[int | None]:
        """The states of the step: the replicated one (None), and the local ones of all ranks."""
        return [None, *range(self.commit.world_size)]

    def load(self, rank: int | None, *, stand_ins: bool = False) -> dict[str, Any]:
        """The local state of a rank, or (None) the replicated state, whole; tensors on the CPU.

        Args:
            rank: whose state.
            stand_ins: for objects of classes that this program has not imported, give stand-ins.

        Raises:
            Fault: a file is missing or damaged; the first in the order of the votes.
            StateMismatch: a value needs a class that is not loaded or has changed.
        """
        return self.load_selected(rank, None, EVERYTHING, stand_ins=stand_ins)[0]

    def load_selected(
        self, rank: int | None, target: RestoreTarget | None, selection: Selection, *, stand_ins: bool = False
    ) -> tuple[dict[str, Any], Matched]:
        """What is selected of the local state of a rank, or (None) of the replicated state; and how that was matched.

        Args:
            rank: whose state.
            target: this rank's tensors, and whether to fill them; chunks outside of its parts are not read. None: all
                tensors, whole, in new memory.
            selection: which tensors and values; of local state, only its parts matter.
            stand_ins: see :meth:`load`.

        Raises:
            Fault: a file is missing or damaged; the first in the order of the votes. Some of the tensors to be filled
                may be overwritten.
            StateMismatch: the step does not have the target's tensors, or a value needs a class that is not loaded or
                has changed, and no chunk was read; or an element is too large for the type that it is converted to.
        """
        entries = [entry for entry in self.files_of(rank) if selection.takes_file(entry.path)]
        nodes = self._nodes(rank, entries, selection)
        arrays = arrays_in(nodes)
        types = {path: of for path, of in types_of(rank, arrays).items() if selection.takes_part(path)}
        matched = Matched(types, target, selection if rank is None else Selection(selection.parts))
        groups = Groups(groups_in(nodes), top_of(rank), parts=selection.parts, stand_ins=stand_ins)
        matched.check_wrappers(groups.shapes)
        self._check_sizes(arrays, entries)
        # In one order on all ranks, which may issue a collective for each tensor of what they get.
        read = sorted(self._tensors(rank, arrays, entries, matched).items())
        tensors: dict[str, Any] = {path: matched.placed(path, tensor) for path, tensor in read}
        tensors |= dict.fromkeys(matched.left_out, LEFT_OUT)
        state: dict[str, Any] = groups.close(tensors, matched.wrapper)
        matched.arrange(state, groups.odd_keys)
        return state, matched

    def describe(self, rank: int | None) -> tuple[dict[str, ArrayInfo], dict[str, dict[str, Any]]]:
        """The arrays, and the values of groups, by path relative to the step; chunks are not read.

        Raises:
            Fault: a metadata file is missing or damaged.
        """
        arrays: dict[str, ArrayInfo] = {}
        attributes: dict[str, dict[str, Any]] = {}
        for path, info in self._nodes(rank, self.files_of(rank)).items():
            if not isinstance(info, ArrayInfo):
                attributes[path] = info
            elif info.packed is None:
                arrays[path] = info
            else:
                for name, entry in info.packed.items():
                    if parse_local(name) == rank:
                        arrays[name] = ArrayInfo(entry.shape, entry.dtype, entry.shape)
        groups = Groups(attributes, "", stand_ins=True)
        return arrays, {path: groups.shown(path) for path in attributes}

    def _nodes(
        self, rank: int | None, entries: Sequence[FileEntry], selection: Selection = EVERYTHING
    ) -> dict[str, ArrayInfo | dict[str, Any]]:
        """Arrays and attributes of groups, by path; raises :class:`Fault` if they do not fit together."""
        documents = [entry for entry in entries if not entry.chunk]
        nodes = {
            entry.path.removesuffix(NODE).rstrip("/"): parse_node(data, entry.path)
            for entry, data in zip(documents, self._io.map(self.read, documents), strict=True)
        }
        nodes.pop(PACKS, None)  # a group of the format, not of the state
        check_structure(rank, nodes, entries, selection.takes_part)
        return nodes

    def _check_sizes(self, arrays: Mapping[str, ArrayInfo], entries: Iterable[FileEntry]) -> None:
        """Compare chunks with their votes before memory is taken for a tensor of several; raises :class:`Fault`.

        A faster source has compared the sizes of its own copies, and a single chunk is compared when it is read.
        """
        chunks = [entry for entry in entries if entry.chunk and arrays[entry.path.rpartition("/")[0]].has_parts]
        if self._faster is not None or not chunks:
            return
        sizes = self._store.sizes(step_name(self.step))
        for entry in chunks:
            if entry.path not in sizes:
                raise Fault(IncompleteCheckpoint, entry.path, "missing")
            if sizes[entry.path] != entry.size_bytes:
                raise wrong_size(entry, sizes[entry.path])

    def _tensors(
        self, rank: int | None, arrays: Mapping[str, ArrayInfo], entries: Iterable[FileEntry], matched: Matched
    ) -> dict[str, torch.Tensor]:
        """What is taken, by path: whole or (where a part is needed) a part of it.

        A chunk's memory becomes its tensor's, or is freed once it is copied to its place there.
        """
        arrays = {path: info for path, info in arrays.items() if matched.takes(path, info)}
        tensors = _memory_to_fill(arrays, matched)
        reads = _chunk_reads(arrays, matched.boxes, tensors, [entry for entry in entries if entry.chunk])
        for made in list(self._io.map(lambda chunk: self._read_chunk(chunk, rank, matched), reads)):
            for path, tensor in made.items():
                place = matched.memory(path)
                tensors[path] = tensor if place is None else place.copy_(tensor)
        return tensors

    def _read_chunk(self, chunk: ChunkRead, rank: int | None, matched: Matched) -> dict[str, torch.Tensor]:
        """Read one chunk to its place, or else return what is made of it: its tensor, or those of a pack, by path."""
        info, out, boxes = chunk.info, chunk.out, matched.boxes
        if out is not None and (room := room_for(info, chunk.index, out, chunk.start)) is not None:
            self._read_to(room, info, chunk.entry)
            return {}
        data = payload(info, self.read(chunk.entry), chunk.entry.path)
        if info.packed is not None:
            tensors = unpack(info, data, chunk.entry.path)
            return {
                path: matched.converted(path, part_of(tensor, boxes[path]) if path in boxes else tensor)
                for path, tensor in tensors.items()
                if parse_local(path) == rank and matched.takes(path)
            }
        elements = matched.converted(chunk.path, as_tensor(data, info.chunk, info.dtype))
        if out is None:
            return {chunk.path: elements}
        put_chunk(info, elements, chunk.index, out, chunk.start)
        return {}

    def read(self, entry: FileEntry) -> Buffer:
        """A file's bytes, verified against the vote; raises :class:`Fault`."""
        if self._faster is not None and (copy := self._faster(entry)) is not None:
            return copy
        data = self._stored(entry, lambda path: self._store.read(path, entry.size_bytes))
        check_file(entry, data.data)
        return data

    def _read_to(self, room: Buffer, info: ArrayInfo, entry: FileEntry) -> None:
        """Read a chunk's elements to their place and verify them; raises :class:`Fault`, with any bytes there then."""
        check_size(info, entry.size_bytes, entry.path)
        if self._faster is not None and self._faster.fill(entry, room):
            return
        seen = RunningChecksum()
        end = self._stored(entry, lambda path: self._store.read_into(path, room.data, seen, entry.size_bytes))
        check_pieces(entry, seen, end)

    def _stored(self, entry: FileEntry, read: Callable[[str], T]) -> T:
        with self._counting:
            self.stored_bytes += entry.size_bytes
        try:
            return read(f"{step_name(self.step)}/{entry.path}")
        except FileTooLarge as error:
            raise wrong_size(entry, error.size_bytes) from error
        except OSError as error:
            raise as_fault(error, entry.path) from error

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
        if (vote.rank, vote.step, vote.world_size, vote.attempt_id, vote.save_id) != (
            rank,
            commit.step,
            commit.world_size,
            commit.attempt_id,
            commit.save_id,
        ):
            raise Fault(CorruptCheckpoint, entry.path, f"is rank {vote.rank}'s vote for another save")
        return vote


def _memory_to_fill(arrays: Mapping[str, ArrayInfo], matched: Matched) -> dict[str, torch.Tensor]:
    """What chunks are read or copied to, by path: the running job's tensors, or new ones.

    There is none for packs, and none for a tensor of one chunk, which is made of the chunk's own memory.
    """
    memory: dict[str, torch.Tensor] = {}
    for path, info in arrays.items():
        if info.packed is not None:
            continue
        box = _box_of(path, info, matched.boxes)
        running = matched.memory(path)
        is_one_chunk = box.size == info.chunk and len(box.places(info.chunk)) == 1
        if running is not None:
            memory[path] = running
        elif not is_one_chunk:
            dtype = matched.dtype(path, info.dtype)
            memory[path] = as_tensor(allocate(math.prod(box.size) * dtype.itemsize), box.size, dtype)
    return memory


def _chunk_reads(
    arrays: Mapping[str, ArrayInfo],
    boxes: Mapping[str, Box],
    memory: Mapping[str, torch.Tensor],
    entries: Sequence[FileEntry],
) -> list[ChunkRead]:
    """The chunks that hold this rank's parts, in the order of the votes; raises :class:`Fault` if one is missing."""
    by_path = {entry.path: entry for entry in entries}
    reads = []
    for path, info in arrays.items():
        start = boxes[path].start if path in boxes else None
        for index in _box_of(path, info, boxes).places(info.chunk):
            file = f"{path}/{chunk_name(index)}"
            if file not in by_path:
                raise Fault(IncompleteCheckpoint, file, "no vote lists this chunk, though its array has elements")
            reads.append(ChunkRead(path, info, index, by_path[file], memory.get(path), start))
    order = {path: number for number, path in enumerate(by_path)}
    return sorted(reads, key=lambda chunk: order[chunk.entry.path])


def _box_of(path: str, info: ArrayInfo, boxes: Mapping[str, Box]) -> Box:
    """This rank's part of a tensor."""
    return boxes.get(path) or whole(info.shape)
