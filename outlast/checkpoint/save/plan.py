"""Which bytes go into which file, and which rank writes it.

A tensor is one Zarr array. Large ones are cut into chunks along their first dimensions, small ones of one rank are
packed end to end into arrays of bytes, with an index in the array's attributes. Local state is written by its rank;
replicated state is written once, each rank taking an equal share of its bytes, cut at chunks. Of a tensor that lies in
shards each is written by a rank that holds it, in chunks that end where shards do; it is never packed.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from outlast.checkpoint.format.names import PACKS, pack_path
from outlast.checkpoint.format.records import crc_hex
from outlast.checkpoint.format.zarr import Packed, array_document, chunk_name, group_document, node_path, pack_document
from outlast.checkpoint.save.chunk_grid import chunk_shape, shard_chunk_shape
from outlast.checkpoint.state.boxes import Box, whole
from outlast.checkpoint.state.shares import owner_of
from outlast.checkpoint.state.tree import StateTree, TensorEntry
from outlast.errors import CheckpointError

_PACK_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Content:
    """Some rows of a tensor, and where in a part they lie."""

    item: TensorEntry
    source: torch.Tensor
    """A view of the item's tensor."""
    offset: int
    block: tuple[int, ...] = ()
    """Shape of the block of which they are a corner, and the rest of it is zero; without it, they lie end to end."""

    @property
    def nbytes(self) -> int:
        """What it takes of the part."""
        return math.prod(self.block) * self.source.itemsize if self.block else self.source.nbytes


@dataclass(frozen=True)
class Part:
    """One chunk file: rows of one tensor, or several small tensors. What no content covers is zero."""

    path: str
    """Relative to the step."""
    nbytes: int
    """Of its payload; its CRC32C comes to that."""
    contents: tuple[Content, ...]
    eager: bool


@dataclass(frozen=True)
class RankPlan:
    """What one rank writes."""

    documents: dict[str, bytes]
    """``zarr.json`` files, by path relative to the step."""
    parts: tuple[Part, ...]
    """Eager ones first."""
    replicated_bytes: int
    """Of all replicated tensors, whoever writes them."""
    local_bytes: int
    """Of this rank's local tensors."""
    digest: str
    """Checksum of names, shapes, types and placements of the replicated state: ranks that differ in it have no common
    checkpoint."""


def share_of(
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
    documents: dict[str, bytes] = {}
    parts: list[Part] = []
    small: list[TensorEntry] = []
    # By path, not in the order of the dictionaries, which a restore need not keep.
    of_all, own = (sorted(plan.items, key=lambda item: item.path) for plan in (replicated, local))
    everyone = tuple(range(world_size))
    # Ranks that hold the same share it by its bytes. Of shards that others hold nothing has to be known.
    total, before = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for item in of_all:
        total[item.spread.holders if item.spread else everyone] += item.tensor.nbytes
    for number, item in enumerate(of_all):
        holders = item.spread.holders if item.spread else everyone
        if item.spread is None and item.tensor.nbytes < pack_below_bytes:
            if owner_of(holders, before[holders], item.tensor.nbytes, total[holders]) == rank:
                small.append(item)
        else:
            chunk = _chunk(item, chunk_bytes)
            at, owners = before[holders], []
            for piece in _cut(item, chunk):
                nbytes = piece.contents[0].source.nbytes
                owners.append(owner_of(holders, at, nbytes, total[holders]))
                if owners[-1] == rank:
                    parts.append(piece)
                at += nbytes
            if item.spread:
                writer = number % world_size
            else:
                writer = owners[0] if owners else owner_of(holders, at, 0, total[holders])
            if writer == rank:
                documents |= _document(item, chunk)
        before[holders] += item.tensor.nbytes
    for item in own:
        if item.tensor.nbytes < pack_below_bytes:
            small.append(item)
        else:
            chunk = _chunk(item, chunk_bytes)
            documents |= _document(item, chunk)
            parts += _cut(item, chunk)
    for number, (packed, index) in enumerate(_pack(small, chunk_bytes)):
        path = pack_path(rank, number)
        nbytes = max(1, sum(_room(content.source.nbytes) for content in packed))
        documents[node_path(path)] = pack_document(nbytes, index)
        parts.append(Part(f"{path}/{chunk_name((0,))}", nbytes, packed, packed[0].item.eager))
    plans = (replicated, local) if rank == 0 else (local,)
    for path, attributes in itertools.chain.from_iterable(plan.groups.items() for plan in plans):
        if path:  # the root is written when the save is opened
            documents[node_path(path)] = group_document(attributes)
    if rank == 0 and pack_below_bytes:
        documents[node_path(PACKS)] = group_document({})
    parts.sort(key=lambda part: not part.eager)
    local_bytes = sum(item.tensor.nbytes for item in own)
    return RankPlan(documents, tuple(parts), sum(item.nbytes for item in of_all), local_bytes, _digest(of_all))


def _chunk(item: TensorEntry, chunk_bytes: int) -> tuple[int, ...]:
    if item.spread is None:
        return chunk_shape(item.shape, item.tensor.itemsize, chunk_bytes)
    try:
        return shard_chunk_shape(item.spread, item.tensor.itemsize, chunk_bytes)
    except ValueError as error:
        raise CheckpointError(f"the shards of {item.name!r} {item.shape} fit no grid of chunks", str(error)) from error


def _document(item: TensorEntry, chunk: tuple[int, ...]) -> dict[str, bytes]:
    return {node_path(item.path): array_document(item.shape, chunk, item.tensor.dtype)}


def _cut(item: TensorEntry, chunk: tuple[int, ...]) -> Iterator[Part]:
    """What this rank holds, in chunks, in the order of elements; none where there are no elements."""
    tensor, path, eager = item.tensor, item.path, item.eager
    box = item.spread.box if item.spread else whole(item.shape)
    nbytes = math.prod(chunk) * tensor.itemsize
    for name, cuts, block in _cuts(box, chunk):
        view = tensor
        for cut in cuts:
            view = view.narrow(*cut)
        yield Part(f"{path}/{name}", nbytes, (Content(item, view, 0, block),), eager)


@lru_cache(maxsize=4096)
def _cuts(box: Box, chunk: tuple[int, ...]) -> list[tuple[str, list[tuple[int, int, int]], tuple[int, ...]]]:
    """Of each chunk its name, (dimension, first row, rows) of what is to be narrowed, and its block; kept from save to
    save, since tensors keep their shapes."""
    found = []
    for place in box.places(chunk):
        shape, cuts = list(box.size), []
        for d, (index, rows) in enumerate(zip(place, chunk, strict=True)):
            if rows < box.size[d]:
                start = index * rows - box.start[d]
                shape[d] = min(rows, box.size[d] - start)
                cuts.append((d, start, shape[d]))
        found.append((chunk_name(place), cuts, () if _is_prefix(tuple(shape), chunk) else chunk))
    return found


def _is_prefix(corner: tuple[int, ...], block: tuple[int, ...]) -> bool:
    """Whether the elements of a block's corner are the block's first ones."""
    short = [d for d, (size, full) in enumerate(zip(corner, block, strict=True)) if size < full]
    return not short or math.prod(corner[: short[-1]]) == 1


def _pack(items: Sequence[TensorEntry], chunk_bytes: int) -> Iterator[tuple[tuple[Content, ...], dict[str, Packed]]]:
    """Small tensors, end to end, in packs of at most ``chunk_bytes`` (or one tensor); eager ones by themselves."""
    for eager in (True, False):
        contents: list[Content] = []
        index: dict[str, Packed] = {}
        at = 0
        for item in items:
            if item.eager != eager:
                continue
            room = _room(item.tensor.nbytes)
            if contents and at + room > chunk_bytes:
                yield tuple(contents), index
                contents, index, at = [], {}, 0
            contents.append(Content(item, item.tensor, at))
            index[item.path] = Packed(at, tuple(item.tensor.shape), item.tensor.dtype)
            at += room
        if contents:
            yield tuple(contents), index


def _room(nbytes: int) -> int:
    return -(-nbytes // _PACK_ALIGNMENT_BYTES) * _PACK_ALIGNMENT_BYTES


def _digest(items: Sequence[TensorEntry]) -> str:
    lines = [f"{i.path} {i.shape} {i.tensor.dtype} {i.spread.placed if i.spread else ''}\n" for i in items]
    return crc_hex("".join(lines).encode())
