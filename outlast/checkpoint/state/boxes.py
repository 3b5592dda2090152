"""The shards of a tensor: which box of it each rank holds, and what the shards' boundaries have in common.

Pure arithmetic, so that every rank knows every other rank's shard without asking. A tensor's dimension is split by one
or several dimensions of a mesh of ranks, as DTensor does: into pieces of ``ceil(size / ranks)`` rows, the last of them
shorter or empty; each piece is split again by the next dimension of the mesh.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A part of a tensor: a range of rows in each dimension."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def places(self, chunk: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Indices of the chunks of a regular grid that the box overlaps, in the order of elements."""
        if 0 in self.size:
            return []
        return list(
            itertools.product(
                *(
                    range(start // rows, math.ceil((start + size) / rows))
                    for start, size, rows in zip(self.start, self.size, chunk, strict=True)
                )
            )
        )


def whole(shape: tuple[int, ...]) -> Box:
    """The whole tensor."""
    return Box((0,) * len(shape), shape)


@dataclass(frozen=True)
class Split:
    """How one dimension of a mesh splits a tensor."""

    dim: int | None
    """The tensor's dimension that is split; None: every rank has all of it."""
    after: int = 1
    """How many pieces later dimensions of the mesh split it into first, as with FSDP2 over tensor parallelism."""


@dataclass(frozen=True)
class ShardLayout:
    """The shards of a tensor, as one rank sees them."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    box: Box
    """This rank's shard."""
    holders: tuple[int, ...]
    """The ranks that hold this same shard, ascending."""
    units: tuple[int, ...]
    """By dimension: all boundaries between shards are multiples of this; 0 if there are none."""
    shards: int
    """The number of different boxes, empty ones included."""
    placed: str
    """Mesh and placements in words, equal on all ranks."""


def spread_over(
    shape: tuple[int, ...],
    mesh: Sequence[int],
    ranks: Sequence[int],
    place: Sequence[int],
    splits: Sequence[Split],
) -> ShardLayout:
    """How a tensor is spread over a mesh.

    Args:
        shape: of the whole tensor.
        mesh: shape of the mesh.
        ranks: of the mesh, in row-major order.
        place: this rank's coordinates in the mesh.
        splits: one for each dimension of the mesh.

    Raises:
        ValueError: no order of the mesh's dimensions explains the splits, or interleaved shards are uneven.
    """
    orders = {dim: _order(dim, shape, mesh, splits) for dim in sorted({s.dim for s in splits if s.dim is not None})}
    units = [_unit(shape[d], [mesh[m] for m in orders.get(d, ())]) for d in range(len(shape))]
    start, size = [0] * len(shape), list(shape)
    for dim, order in orders.items():
        for m in order:
            rows = math.ceil(size[dim] / mesh[m])
            begin = min(place[m] * rows, size[dim])
            start[dim] += begin
            size[dim] = min(rows, size[dim] - begin)
    alike = [range(n) if split.dim is None else (index,) for n, index, split in zip(mesh, place, splits, strict=True)]
    strides = [math.prod(mesh[m + 1 :]) for m in range(len(mesh))]
    holders = [ranks[sum(map(int.__mul__, at, strides))] for at in itertools.product(*alike)]
    words = ["copy" if s.dim is None else f"split {s.dim}" + (f" after {s.after}" * (s.after > 1)) for s in splits]
    numbers = "in order" if list(ranks) == sorted(ranks) else str(list(ranks))
    return ShardLayout(
        shape,
        Box(tuple(start), tuple(size)),
        tuple(sorted(holders)),
        tuple(units),
        math.prod(n for n, split in zip(mesh, splits, strict=True) if split.dim is not None),
        f"mesh of {tuple(mesh)} ranks {numbers}: {', '.join(words)}",
    )


def _order(dim: int, shape: tuple[int, ...], mesh: Sequence[int], splits: Sequence[Split]) -> list[int]:
    """The mesh's dimensions that split one of the tensor's, in the order in which they split it."""
    order: list[int] = []
    for m in reversed([m for m, split in enumerate(splits) if split.dim == dim]):
        at, pieces = 0, 1
        while pieces < splits[m].after and at < len(order):
            pieces *= mesh[order[at]]
            at += 1
        if pieces != splits[m].after:
            raise ValueError(
                f"dimension {m} of the mesh splits {splits[m].after} pieces, which no other dimension of it makes"
            )
        order.insert(at, m)
    pieces = math.prod(mesh[m] for m in order)
    if any(splits[m].after > 1 for m in order) and shape[dim] % pieces:
        raise ValueError(f"{shape[dim]} rows of dimension {dim} do not divide evenly into {pieces} interleaved shards")
    return order


def _unit(size: int, counts: Sequence[int]) -> int:
    """Greatest common divisor of all boundaries in ``size`` rows that are split by each of the counts in turn."""
    unit, lengths = 0, {size}
    for count in counts:
        pieces = set()
        for length in lengths:
            rows = math.ceil(length / count)
            if 0 < rows < length:
                unit = math.gcd(unit, rows)
            pieces |= {rows, length % rows if rows else 0}
        lengths = pieces - {0}
    return unit


def divisors(number: int) -> Iterator[int]:
    """The divisors of a positive number, in no particular order."""
    for low in range(1, math.isqrt(number) + 1):
        if number % low == 0:
            yield low
            if low != number // low:
                yield number // low
