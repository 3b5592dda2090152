"""Which bytes go into which file, and which rank writes it.

A tensor is one Zarr array. Large ones are cut into chunks along their first dimensions, small ones of one rank are
packed end to end into arrays of bytes, with an index in the array's attributes. Local state is written by its rank;
replicated state is written once, each rank taking an equal share of its bytes, cut at chunks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from outlast.checkpoint._names import PACKS, pack_path
from outlast.checkpoint._records import crc_hex
from outlast.checkpoint._tree import Item, Plan
from outlast.checkpoint._zarr import Packed, array_document, chunk_name, group_document, node_path, pack_document

_PACK_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Content:
    """Some rows of a tensor, and where in a part they lie."""

    item: Item
    source: torch.Tensor
    """A view of the item's tensor."""
    offset: int


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
class Share:
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
    """Checksum of names, shapes and types of the replicated state: ranks that differ in it have no common checkpoint.
    """


def share_of(
    replicated: Plan, local: Plan, rank: int, world_size: int, *, chunk_bytes: int, pack_below_bytes: int
) -> Share:
    """What ``rank`` writes of a replicated and its own local state.

    Args:
        replicated: equal on all ranks but for the tensors' numbers.
        local: this rank's.
        rank: of ``world_size``.
        world_size: number of ranks.
        chunk_bytes: a chunk has at most that many, unless a single element is larger.
        pack_below_bytes: tensors smaller than this are packed.
    """
    documents: dict[str, bytes] = {}
    parts: list[Part] = []
    small: list[Item] = []
    # By path, not in the order of the dictionaries, which a restore need not keep.
    of_all, own = (sorted(plan.items, key=lambda item: item.path) for plan in (replicated, local))
    total = sum(item.tensor.nbytes for item in of_all)
    before = 0
    for item in of_all:
        tensor = item.tensor
        if tensor.nbytes < pack_below_bytes:
            if _owner(before, tensor.nbytes, total, world_size) == rank:
                small.append(item)
        else:
            pieces = list(_cut(item, chunk_bytes))
            starts = [before * len(pieces) + index * tensor.nbytes for index in range(len(pieces))]
            owners = [_owner(start, tensor.nbytes, total * max(1, len(pieces)), world_size) for start in starts] or [
                _owner(before, 0, total, world_size)
            ]
            if owners[0] == rank:
                documents |= _document(item, chunk_bytes)
            parts += [piece for piece, owner in zip(pieces, owners, strict=False) if owner == rank]
        before += tensor.nbytes
    for item in own:
        if item.tensor.nbytes < pack_below_bytes:
            small.append(item)
        else:
            documents |= _document(item, chunk_bytes)
            parts += _cut(item, chunk_bytes)
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
    return Share(documents, tuple(parts), total, local_bytes, _digest(of_all))


def chunk_shape(shape: tuple[int, ...], itemsize: int, chunk_bytes: int) -> tuple[int, ...]:
    """The largest chunk of whole rows of at most ``chunk_bytes``, with rows spread evenly over chunks.

    A chunk is 1 in the first dimensions, some rows in one, and whole in the others.
    """
    inner = itemsize
    for d in range(len(shape) - 1, -1, -1):
        if inner * shape[d] > chunk_bytes:
            rows = max(1, chunk_bytes // inner)
            rows = math.ceil(shape[d] / math.ceil(shape[d] / rows))
            return (1,) * d + (rows,) + shape[d + 1 :]
        inner *= shape[d]
    return shape


def _owner(before: int, nbytes: int, total: int, world_size: int) -> int:
    """Whose share the middle of some bytes falls in."""
    return min(world_size - 1, (2 * before + nbytes) * world_size // (2 * total)) if total else 0


def _document(item: Item, chunk_bytes: int) -> dict[str, bytes]:
    shape = tuple(item.tensor.shape)
    chunk = chunk_shape(shape, item.tensor.itemsize, chunk_bytes)
    return {node_path(item.path): array_document(shape, chunk, item.tensor.dtype)}


def _cut(item: Item, chunk_bytes: int) -> Iterator[Part]:
    """A tensor's chunks, in the order of its elements; none where it has no elements."""
    tensor, shape = item.tensor, tuple(item.tensor.shape)
    if not tensor.numel():
        return
    chunk = chunk_shape(shape, tensor.itemsize, chunk_bytes)
    nbytes = math.prod(chunk) * tensor.itemsize
    counts = [math.ceil(size / rows) for size, rows in zip(shape, chunk, strict=True)]
    for place in itertools.product(*map(range, counts)):
        view = tensor
        for d, (index, rows) in enumerate(zip(place, chunk, strict=True)):
            if rows < shape[d]:
                view = view.narrow(d, index * rows, min(rows, shape[d] - index * rows))
        yield Part(f"{item.path}/{chunk_name(place)}", nbytes, (Content(item, view, 0),), item.eager)


def _pack(items: Sequence[Item], chunk_bytes: int) -> Iterator[tuple[tuple[Content, ...], dict[str, Packed]]]:
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


def _digest(items: Sequence[Item]) -> str:
    lines = [f"{item.path} {tuple(item.tensor.shape)} {item.tensor.dtype}\n" for item in items]
    return crc_hex("".join(lines).encode())
