"""Which bytes go into which file, and which rank writes it.

A tensor is one Zarr array. Large ones are cut into chunks along their first dimensions, small ones of one rank are
packed end to end into arrays of bytes, with an index in the array's attributes. Local state is written by its rank;
replicated state is written once, each rank taking an equal share of its bytes, cut at chunks. Each shard of a sharded
tensor is written by a rank that holds it, in chunks that end where shards do; it is never packed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from outlast.checkpoint.format.names import PACKS
from outlast.checkpoint.format.records import crc_hex
from outlast.checkpoint.format.zarr import array_document, group_document, node_path
from outlast.checkpoint.save.packing import pack
from outlast.checkpoint.save.parts import Content, Part, chunk_of, cut
from outlast.checkpoint.save.replicas import Piece
from outlast.checkpoint.state.shares import owner_of
from outlast.checkpoint.state.tree import StateTree, TensorEntry


@dataclass(frozen=True)
class RankPlan:
    """What one rank writes."""

    documents: dict[str, bytes]
    """``zarr.json`` files, by path relative to the step."""
    parts: tuple[Part, ...]
    """Eager ones first."""
    replicated_bytes: int
    """Of all replicated tensors, whichever rank writes them."""
    local_bytes: int
    """Of this rank's local tensors."""
    pieces: tuple[Piece, ...]
    """Of the replicated tensors, what this rank and another one digest."""
    digest: str
    """Checksum of names, shapes, types and placements of the replicated state; ranks must agree on it to commit."""


def plan_rank(
    replicated: StateTree, local: StateTree, rank: int, world_size: int, *, chunk_bytes: int, pack_below_bytes: int
) -> RankPlan:
    """What ``rank`` writes of a replicated and its own local state.

    Args:
        replicated: equal on all ranks but for the tensors' numbers, and for which shards a rank holds.
        local: this rank's.
        rank: of ``world_size``.
        world_size: number of ranks.
        chunk_bytes: a chunk has at most that many, unless a single element is larger.
        pack_below_bytes: tensors smaller than this are packed.

    Raises:
        CheckpointError: shards that fit no regular grid of chunks; names the tensor.
    """
    # By path, not in the order of the dictionaries, which a restore need not keep.
    of_all, own = (sorted(tree.items, key=lambda item: item.path) for tree in (replicated, local))
    draft = _Draft(rank, world_size, chunk_bytes, pack_below_bytes)
    draft.add_replicated(of_all)
    draft.add_local(own)
    draft.add_packs()
    draft.add_groups((replicated, local) if rank == 0 else (local,))
    return RankPlan(
        documents=draft.documents,
        parts=tuple(sorted(draft.parts, key=lambda part: not part.eager)),
        replicated_bytes=sum(item.nbytes for item in of_all),
        local_bytes=sum(item.tensor.nbytes for item in own),
        pieces=tuple(draft.pieces),
        digest=_digest(of_all),
    )


@dataclass
class _Draft:
    """One rank's plan while it is being made."""

    rank: int
    world_size: int
    chunk_bytes: int
    pack_below_bytes: int
    documents: dict[str, bytes] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    """Of replicated tensors, those that this rank writes or checks."""
    small: list[TensorEntry] = field(default_factory=list)
    """To be packed."""

    def add_replicated(self, items: Sequence[TensorEntry]) -> None:
        division = _Division(items, self.world_size)
        for number, item in enumerate(items):
            if item.spread is None and item.tensor.nbytes < self.pack_below_bytes:
                owner = division.owner_of_next(item, item.tensor.nbytes)
                if owner == self.rank:
                    self.small.append(item)
                if item.tensor.nbytes and self.rank in division.compared_by(item, owner):
                    self.pieces.append(Piece(item.path, Content(item, item.tensor, 0)))
                continue
            chunk = chunk_of(item, self.chunk_bytes)
            owners = []
            for part in cut(item, chunk):
                owners.append(division.owner_of_next(item, part.contents[0].source.nbytes))
                if owners[-1] == self.rank:
                    self.parts.append(part)
                if self.rank in division.compared_by(item, owners[-1]):
                    self.pieces.append(Piece(part.path, part.contents[0]))
            if item.spread:
                writer = number % self.world_size  # no rank knows who holds the shards of the others
            else:
                writer = owners[0] if owners else division.owner_of_next(item, 0)
            if writer == self.rank:
                self._add_array(item, chunk)

    def add_local(self, items: Iterable[TensorEntry]) -> None:
        for item in items:
            if item.tensor.nbytes < self.pack_below_bytes:
                self.small.append(item)
                continue
            chunk = chunk_of(item, self.chunk_bytes)
            self.parts += cut(item, chunk)
            self._add_array(item, chunk)

    def add_packs(self) -> None:
        for each in pack(self.small, self.rank, self.chunk_bytes):
            self.documents.update([each.document])
            self.parts.append(each.part)

    def add_groups(self, trees: Iterable[StateTree]) -> None:
        for tree in trees:
            for path, attributes in tree.groups.items():
                if path:  # the root is written when the save is opened
                    self.documents[node_path(path)] = group_document(attributes)
        if self.rank == 0 and self.pack_below_bytes:
            self.documents[node_path(PACKS)] = group_document({})

    def _add_array(self, item: TensorEntry, chunk: tuple[int, ...]) -> None:
        self.documents[node_path(item.path)] = array_document(item.shape, chunk, item.tensor.dtype)


class _Division:
    """Divides replicated bytes: ranks that hold the same tensors get equal shares of their bytes, in order.

    Nothing has to be known of the shards that other ranks hold.
    """

    def __init__(self, items: Iterable[TensorEntry], world_size: int) -> None:
        self._everyone = tuple(range(world_size))
        self._total_bytes = Counter[tuple[int, ...]]()
        self._divided_bytes = Counter[tuple[int, ...]]()
        for item in items:
            self._total_bytes[self._holders(item)] += item.tensor.nbytes

    def owner_of_next(self, item: TensorEntry, nbytes: int) -> int:
        """The rank that writes the next ``nbytes`` of an item; items and their bytes are asked for in order."""
        holders = self._holders(item)
        owner = owner_of(holders, self._divided_bytes[holders], nbytes, self._total_bytes[holders])
        self._divided_bytes[holders] += nbytes
        return owner

    def compared_by(self, item: TensorEntry, owner: int) -> tuple[int, ...]:
        """The ranks that digest a piece which ``owner`` writes: it and the next that holds it; none if it is alone."""
        holders = self._holders(item)
        return () if len(holders) == 1 else (owner, holders[(holders.index(owner) + 1) % len(holders)])

    def _holders(self, item: TensorEntry) -> tuple[int, ...]:
        return item.spread.holders if item.spread else self._everyone


def _digest(items: Sequence[TensorEntry]) -> str:
    lines = [f"{i.path} {i.shape} {i.tensor.dtype} {i.spread.placed if i.spread else ''}\n" for i in items]
    return crc_hex("".join(lines).encode())
