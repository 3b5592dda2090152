"""Which ranks need which chunks: with DTensors, a rank needs those alone that its parts lie in."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.format.zarr import ArrayInfo, chunk_name, node_path, parse_node
from outlast.checkpoint.memory.pages import Buffer
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.state.boxes import Box


def who_needs(
    chunks: Sequence[str], boxes: Mapping[str, Box], documents: Mapping[str, Buffer], agreement: Agreement
) -> dict[str, Collection[int]]:
    """The ranks that need each of some chunks; collective.

    Args:
        chunks: paths relative to the step; the same on all ranks.
        boxes: this rank's parts, by the path of the tensor, whose paths are the same on all ranks. All ranks need all
            chunks of any other tensor, and packs.
        documents: those this rank has of the step, by path. Of a tensor without one it needs all chunks: it cannot
            tell which.
        agreement: over all ranks.
    """
    everyone = range(agreement.world_size)
    needs: dict[str, Collection[int]] = dict.fromkeys(chunks, everyone)
    parts = [path for path in chunks if path.rpartition("/")[0] in boxes]
    if not parts:
        return needs
    names: dict[str, Collection[str] | None] = {}
    for array in {path.rpartition("/")[0] for path in parts}:
        names[array] = _chunk_names(array, boxes[array], documents.get(node_path(array)))
    mine = []
    for path in parts:
        array, _, name = path.rpartition("/")
        some = names[array]
        mine.append(some is None or name in some)
    # One bit a chunk, of all ranks: paths would be a thousand times as much.
    said = agreement.all_gather_text(base64.b64encode(np.packbits(mine).tobytes()).decode())
    table = [np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=len(parts)) for text in said]
    for number, path in enumerate(parts):
        needs[path] = [rank for rank in everyone if table[rank][number]]
    return needs


def _chunk_names(array: str, box: Box, document: Buffer | None) -> set[str] | None:
    """Names of the chunks that a part of a tensor lies in; None: it cannot be told."""
    if document is None:
        return None
    try:
        info = parse_node(bytes(document), node_path(array))
    except Fault:
        return None  # damaged on its way: it is found when it is read, and read elsewhere
    if not isinstance(info, ArrayInfo) or len(info.shape) != len(box.size):
        return None  # another state than is wanted, which is found when it is loaded
    return {chunk_name(place) for place in box.places(info.chunk)}
