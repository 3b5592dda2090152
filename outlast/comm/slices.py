"""How a tensor is cut into slices of rows, one for each of n ranks."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from outlast.comm.compressors import Shape


class Cut(NamedTuple):
    """One slice of a tensor: entries ``start`` to ``stop`` in row-major order, seen as ``shape``."""

    start: int
    stop: int
    shape: Shape
    """Has stop - start entries; the compressor gets the slice in this shape."""


def cuts(rows: int, parts: int) -> list[tuple[int, int]]:
    """(first row, end) of each of ``parts`` slices, as equal as possible; some are empty if rows < parts."""
    return list(pairwise(rows * part // parts for part in range(parts + 1)))


def slices(x: Tensor, parts: int) -> list[Tensor]:
    """Views of ``x`` (at least one dimension) along its first dimension."""
    return [x[start:stop] for start, stop in cuts(x.shape[0], parts)]


def slice_shape(shape: Shape, part: int, parts: int) -> Shape:
    """The shape of one slice; a scalar is cut as if it had one row."""
    rows = shape or (1,)
    start, stop = cuts(rows[0], parts)[part]
    return (stop - start, *rows[1:])
