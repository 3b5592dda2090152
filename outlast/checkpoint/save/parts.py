"""Chunk files: what goes into one, and how a tensor is cut into them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from outlast.checkpoint.format.zarr import chunk_name
from outlast.checkpoint.save.chunk_grid import chunk_shape, shard_chunk_shape
from outlast.checkpoint.state.boxes import Box, whole
from outlast.checkpoint.state.tree import TensorEntry
from outlast.errors import CheckpointError


class Content(NamedTuple):
    """Some rows of a tensor, and where in a part they go."""

    item: TensorEntry
    source: torch.Tensor
    """A view of the item's tensor."""
    offset: int
    """Bytes from the begin of the part."""
    block: tuple[int, ...] = ()
    """Shape of the block of which the rows are a corner, the rest of it being zero. Empty: they are contiguous."""

    @property
    def nbytes(self) -> int:
        """Bytes of the part that it takes."""
        return math.prod(self.block) * self.source.itemsize if self.block else self.source.nbytes


@dataclass(frozen=True)
class Part:
    """One chunk file: rows of one tensor, or several small tensors. Bytes that no content covers are zero."""

    path: str
    """Relative to the step."""
    nbytes: int
    """Of its payload, without the CRC32C after it."""
    contents: tuple[Content, ...]
    eager: bool
    """Whether it is copied before ``save`` returns."""


def chunk_of(item: TensorEntry, chunk_bytes: int) -> tuple[int, ...]:
    """The shape of a tensor's chunks.

    Raises:
        CheckpointError: it is sharded, and no regular grid of chunks fits its shards; names it.
    """
    if item.spread is None:
        return chunk_shape(item.shape, item.tensor.itemsize, chunk_bytes)
    try:
        return shard_chunk_shape(item.spread, item.tensor.itemsize, chunk_bytes)
    except ValueError as error:
        raise CheckpointError(f"the shards of {item.name!r} {item.shape} fit no grid of chunks", str(error)) from error


def cut(item: TensorEntry, chunk: tuple[int, ...]) -> Iterator[Part]:
    """The parts of a tensor that this rank holds, one a chunk, in the order of elements; none for an empty tensor."""
    box = item.spread.box if item.spread else whole(item.shape)
    nbytes = math.prod(chunk) * item.tensor.itemsize
    for name, narrowed, block in _cuts(box, chunk):
        view = item.tensor
        for dimension, start, rows in narrowed:
            view = view.narrow(dimension, start, rows)
        yield Part(f"{item.path}/{name}", nbytes, (Content(item, view, 0, block),), item.eager)


@lru_cache(maxsize=4096)
def _cuts(box: Box, chunk: tuple[int, ...]) -> list[tuple[str, list[tuple[int, int, int]], tuple[int, ...]]]:
    """For each chunk its name, (dimension, first row, rows) for each dimension to narrow, and its block.

    Cached from save to save, since tensors keep their shapes.
    """
    cuts = []
    for place in box.places(chunk):
        shape, narrowed = list(box.size), []
        for d, (index, rows) in enumerate(zip(place, chunk, strict=True)):
            if rows < box.size[d]:
                start = index * rows - box.start[d]
                shape[d] = min(rows, box.size[d] - start)
                narrowed.append((d, start, shape[d]))
        cuts.append((chunk_name(place), narrowed, () if _is_prefix(tuple(shape), chunk) else chunk))
    return cuts


def _is_prefix(corner: tuple[int, ...], block: tuple[int, ...]) -> bool:
    """Whether the elements of a block's corner are the block's first ones."""
    short = [d for d, (size, full) in enumerate(zip(corner, block, strict=True)) if size < full]
    return not short or math.prod(corner[: short[-1]]) == 1
