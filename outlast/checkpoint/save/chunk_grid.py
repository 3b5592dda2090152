"""The shape of a tensor's chunks: Zarr has only regular grids."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

from outlast.checkpoint.state.boxes import ShardLayout, divisors

_FRAGMENTS = 16
"""A grid is refused if it has more than this many times the chunks that the bytes and the shards ask for."""


@lru_cache(maxsize=4096)
def chunk_shape(shape: tuple[int, ...], itemsize: int, chunk_bytes: int) -> tuple[int, ...]:
    """The largest chunk of whole rows with at most ``chunk_bytes``, the rows being spread evenly over the chunks.

    A chunk has size 1 in the first dimensions, some rows in one, and the full size in the others.
    """
    inner = itemsize
    for d in range(len(shape) - 1, -1, -1):
        if inner * shape[d] > chunk_bytes:
            rows = max(1, chunk_bytes // inner)
            rows = math.ceil(shape[d] / math.ceil(shape[d] / rows))
            return (1,) * d + (rows,) + shape[d + 1 :]
        inner *= shape[d]
    return shape


def shard_chunk_shape(spread: ShardLayout, itemsize: int, chunk_bytes: int) -> tuple[int, ...]:
    """The shape of a sharded tensor's chunks; no chunk overlaps two shards.

    Of all grids whose lines include the shards' boundaries, it is the one with the fewest chunks of at most
    ``chunk_bytes``; of several, the one whose chunks have the longest rows.

    Raises:
        ValueError: every such grid has many times the chunks that the bytes ask for; says what would help.
    """
    if 0 in spread.shape:
        return spread.shape
    chunk = _fewest(spread.shape, spread.units, itemsize, chunk_bytes)
    count = _count(spread.shape, chunk)
    shard_bytes = math.prod(spread.shape) * itemsize / spread.shards
    if count > _FRAGMENTS * spread.shards * math.ceil(shard_bytes / chunk_bytes):
        largest = itemsize * math.prod(u or s for u, s in zip(spread.units, spread.shape, strict=True))
        raise ValueError(
            f"its shards end at multiples of {spread.units} rows (0: not split), and of no larger numbers; chunks of "
            f"at most {chunk_bytes} bytes would be {chunk}, {count} of them; use sizes that the ranks share evenly"
            + (f", or a checkpoint.chunk_mb of at least {largest / 1e6:.6g}" if largest > chunk_bytes else "")
        )
    return chunk


@lru_cache(maxsize=4096)
def _fewest(shape: tuple[int, ...], units: tuple[int, ...], itemsize: int, chunk_bytes: int) -> tuple[int, ...]:
    split = [d for d, unit in enumerate(units) if unit]
    free = [d for d, unit in enumerate(units) if not unit]
    best: tuple[int, tuple[int, ...]] | None = None
    for rows in itertools.product(*(divisors(units[d]) for d in split)):
        inner = itemsize * math.prod(rows)
        if inner > chunk_bytes and math.prod(rows) > 1:
            continue
        others = chunk_shape(tuple(shape[d] for d in free), inner, chunk_bytes)
        chunk = dict(zip(split, rows, strict=True)) | dict(zip(free, others, strict=True))
        candidate = tuple(chunk[d] for d in range(len(shape)))
        key = _count(shape, candidate), tuple(-size for size in reversed(candidate))
        if best is None or key < best:
            best = key
    assert best is not None  # single rows are always among them
    return tuple(-size for size in reversed(best[1]))


def _count(shape: tuple[int, ...], chunk: tuple[int, ...]) -> int:
    return math.prod(math.ceil(size / rows) for size, rows in zip(shape, chunk, strict=True))
