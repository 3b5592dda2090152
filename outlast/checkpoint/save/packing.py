"""Small tensors, packed end to end into arrays of bytes, so that they do not take a file each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from outlast.checkpoint.format.names import pack_path
from outlast.checkpoint.format.zarr import MAX_PACKED, Packed, chunk_name, node_path, pack_document
from outlast.checkpoint.save.parts import Content, Part
from outlast.checkpoint.state.tree import TensorEntry

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Pack:
    """One array of bytes."""

    document: tuple[str, bytes]
    """Its ``zarr.json`` with the index of the tensors in it: path relative to the step, and content."""
    part: Part
    """Its only chunk."""


def pack(items: Sequence[TensorEntry], rank: int, chunk_bytes: int) -> list[Pack]:
    """The packs of one rank, of at most ``chunk_bytes`` each (or of one tensor); eager tensors are packed apart."""
    packs = []
    for number, contents in enumerate(_fill(items, chunk_bytes)):
        path = pack_path(rank, number)
        nbytes = max(1, _aligned(contents[-1].offset + contents[-1].source.nbytes))
        index = {
            content.item.path: Packed(content.offset, tuple(content.source.shape), content.source.dtype)
            for content in contents
        }
        part = Part(f"{path}/{chunk_name((0,))}", nbytes, tuple(contents), contents[0].item.eager)
        packs.append(Pack((node_path(path), pack_document(nbytes, index)), part))
    return packs


def _fill(items: Sequence[TensorEntry], chunk_bytes: int) -> Iterator[list[Content]]:
    for eager in (True, False):
        contents: list[Content] = []
        end = 0
        for item in items:
            if item.eager != eager:
                continue
            nbytes = _aligned(item.tensor.nbytes)
            if contents and (end + nbytes > chunk_bytes or len(contents) == MAX_PACKED):
                yield contents
                contents, end = [], 0
            contents.append(Content(item, item.tensor, end))
            end += nbytes
        if contents:
            yield contents


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
