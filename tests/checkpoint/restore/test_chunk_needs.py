"""Which ranks need which chunks: those that a rank's part overlaps, and all where it cannot be told."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpoint.format.zarr import array_document, chunk_name, node_path
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.restore.chunk_needs import who_needs
from outlast.checkpoint.state.boxes import Box

ALONE = Agreement(None, 0, 1)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], Box]:
    """Shape, chunk's shape, and a box, which may be empty."""
    dims = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 9)) for _ in range(dims))
    chunk = tuple(draw(st.integers(1, size)) for size in shape)
    start = tuple(draw(st.integers(0, size)) for size in shape)
    return shape, chunk, Box(start, tuple(draw(st.integers(0, n - at)) for n, at in zip(shape, start, strict=True)))


@given(arrays())
def test_a_part_needs_the_chunks_it_overlaps(array: tuple[tuple[int, ...], tuple[int, ...], Box]) -> None:
    shape, chunk, box = array
    cells = np.full(shape, -1)
    places = list(itertools.product(*(range(math.ceil(n / rows)) for n, rows in zip(shape, chunk, strict=True))))
    for number, place in enumerate(places):
        cells[tuple(slice(i * rows, (i + 1) * rows) for i, rows in zip(place, chunk, strict=True))] = number
    held = cells[tuple(slice(at, at + n) for at, n in zip(box.start, box.size, strict=True))]
    paths = [f"model/w/{chunk_name(place)}" for place in places]
    document = np.frombuffer(array_document(shape, chunk, torch.float32), np.uint8)
    needs = who_needs(paths, {"model/w": box}, {node_path("model/w"): document}, ALONE)
    assert [list(needs[path]) for path in paths] == [[0] if n in held else [] for n in range(len(paths))]


def test_all_where_it_cannot_be_told() -> None:
    box = Box((2, 0), (2, 4))
    good = np.frombuffer(array_document((8, 4), (2, 4), torch.float32), np.uint8)
    other = np.frombuffer(array_document((8,), (2,), torch.float32), np.uint8)
    chunks = [f"model/w/c.{number}.0" for number in range(4)]

    def needed(document: np.ndarray | None) -> list[str]:
        documents = {} if document is None else {node_path("model/w"): document}
        needs = who_needs([*chunks, "packed/rank_00000.0/c.0"], {"model/w": box}, documents, ALONE)
        return [path for path, ranks in needs.items() if 0 in ranks]

    packed = "packed/rank_00000.0/c.0"
    assert needed(good) == [chunks[1], packed]
    assert needed(None) == needed(good[:-9]) == needed(other) == [*chunks, packed]
