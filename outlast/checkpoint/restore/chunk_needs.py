"""Which ranks need which chunks: of a DTensor, a rank needs only the chunks that hold its part."""

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
    """The ranks that need each chunk; collective. Fails as :class:`Agreement` does.

    Args:
        chunks: paths relative to the step; equal on all ranks.
        boxes: this rank's parts of DTensors, by the tensor's path; the paths are equal on all ranks. All ranks need all
            chunks of other tensors, and packs.
        documents: the step's documents that this rank has, by path. Without a tensor's document this rank cannot tell
            which of its chunks it needs, and asks for all.
        agreement: over all ranks.
    """
    all_ranks = range(agreement.world_size)
    needs: dict[str, Collection[int]] = dict.fromkeys(chunks, all_ranks)
    sharded = [path for path in chunks if path.rpartition("/")[0] in boxes]
    if not sharded:
        return needs
    needed_names: dict[str, Collection[str] | None] = {}
    for array in {path.rpartition("/")[0] for path in sharded}:
        needed_names[array] = _chunk_names(array, boxes[array], documents.get(node_path(array)))
    needed_here = []
    for path in sharded:
        array, _, name = path.rpartition("/")
        names = needed_names[array]
        needed_here.append(names is None or name in names)
    # One bit per chunk: paths would be a thousand times as long.
    texts = agreement.all_gather_text(base64.b64encode(np.packbits(needed_here).tobytes()).decode())
    by_rank = [np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=len(sharded)) for text in texts]
    for number, path in enumerate(sharded):
        needs[path] = [rank for rank in all_ranks if by_rank[rank][number]]
    return needs


def _chunk_names(array: str, box: Box, document: Buffer | None) -> set[str] | None:
    """Names of the chunks that hold a part of a tensor; None if that is unknown."""
    if document is None:
        return None
    try:
        info = parse_node(bytes(document), node_path(array))
    except Fault:
        return None  # damaged on its way: the reader notices, and reads it elsewhere
    if not isinstance(info, ArrayInfo) or len(info.shape) != len(box.size):
        return None  # not the tensor that this job has: loading notices
    return {chunk_name(index) for index in box.places(info.chunk)}
