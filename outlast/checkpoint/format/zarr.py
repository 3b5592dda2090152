"""Zarr v3 documents and chunks, written by hand: stock Zarr reads them.

One array per tensor; a chunk is its little-endian bytes in C order, uncompressed, followed by their CRC32C in 4 bytes
(codecs ``bytes`` and ``crc32c``). Every chunk is written; an array without elements has none. Small tensors are packed
into arrays of bytes, whose attribute ``outlast_packed`` is the index. Chunk keys are joined by dots (``c.0.0``): a
tensor is one directory. Zarr's own Python code is not used: its writer is neither durable nor fast, and its
reader takes a missing chunk for zeros.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from outlast.checkpoint.format.dtypes import DISGUISED, NATIVE, dtype_name, dtype_of
from outlast.checkpoint.format.names import HEADER, NODE
from outlast.checkpoint.format.records import CRC_BYTES, FORMAT_VERSION, Fault
from outlast.checkpoint.memory.pages import Buffer
from outlast.errors import CorruptCheckpoint, UnknownFormatVersion

_READ_BY_PEOPLE = 100_000
"""Characters up to which a document has line breaks. (In a pack's index of many tensors they would take longest.)"""
PACKED = "outlast_packed"
"""The attribute of a pack that is its index."""


def group_document(attributes: dict[str, Any]) -> bytes:
    """A group's ``zarr.json``."""
    return _dump({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def root_document(attributes: dict[str, Any], step: int, world_size: int, attempt_id: str, save_id: int) -> bytes:
    """The root group's ``zarr.json``, which says to which save it belongs."""
    header = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": world_size,
        "epoch": attempt_id,
        "serial": save_id,
    }
    return group_document({**attributes, HEADER: header})


@lru_cache(maxsize=16_384)
def array_document(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """A tensor's ``zarr.json``."""
    return _array(shape, chunk, dtype, {})


class Packed(NamedTuple):
    """Where a small tensor is in a pack."""

    offset: int
    """Of its first byte, in bytes."""
    shape: tuple[int, ...]
    dtype: torch.dtype


def pack_document(nbytes: int, index: dict[str, Packed]) -> bytes:
    """The ``zarr.json`` of a pack; its index has ``[offset, shape, dtype]`` for each path."""
    entries = {path: [entry.offset, list(entry.shape), dtype_name(entry.dtype)] for path, entry in index.items()}
    return _array((nbytes,), (nbytes,), torch.uint8, {PACKED: entries})


def _array(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: torch.dtype, more: dict[str, Any]) -> bytes:
    stored = NATIVE.get(dtype) or DISGUISED[dtype]
    fill: Any = False if stored == "bool" else [0.0, 0.0] if dtype.is_complex else 0.0 if "float" in stored else 0
    return _dump(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": stored,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, size) for size in chunk]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "fill_value": fill,
            "attributes": {"outlast_dtype": dtype_name(dtype), **more},
        }
    )


def chunk_name(place: Sequence[int]) -> str:
    """The file name of a chunk, by its index in the array's grid of chunks."""
    return ".".join(["c", *map(str, place)])


@dataclass(frozen=True)
class ArrayInfo:
    """A tensor as its ``zarr.json`` describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunk: tuple[int, ...]
    """Shape of a chunk; the last chunks reach beyond an array that is not a multiple of it."""
    packed: dict[str, Packed] | None = None
    """Of a pack: its index, by path."""

    @property
    def payload_bytes(self) -> int:
        """Size of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Size of the elements of a chunk."""
        return math.prod(self.chunk) * self.dtype.itemsize


def parse_node(data: bytes, file: str) -> ArrayInfo | dict[str, Any]:
    """A ``zarr.json``: an array, or a group's attributes; raises :class:`Fault`."""
    try:
        document = json.loads(data)
        attributes: dict[str, Any] = document["attributes"]
        if document["node_type"] == "group":
            return attributes
        name = attributes["outlast_dtype"]
        shape = tuple(int(size) for size in document["shape"])
        chunk = tuple(int(size) for size in document["chunk_grid"]["configuration"]["chunk_shape"])
        if len(chunk) != len(shape) or min(chunk, default=1) < 1:
            raise ValueError(f"shape {shape}, chunk shape {chunk}")
        entries = attributes.get(PACKED)
        packed = None
        if entries is not None:
            packed = {
                path: Packed(int(at), tuple(size), _dtype(kind, file)) for path, (at, size, kind) in entries.items()
            }
    except (ValueError, KeyError, TypeError) as error:
        raise Fault(CorruptCheckpoint, file, f"is not a Zarr document that outlast wrote: {error}") from error
    return ArrayInfo(shape, _dtype(name, file), chunk, packed)


def _dtype(name: str, file: str) -> torch.dtype:
    dtype = dtype_of(name)
    if dtype is None:
        raise Fault(
            UnknownFormatVersion, file, f"holds a tensor of dtype {name}, which this version of outlast does not know"
        )
    return dtype


def payload(info: ArrayInfo, chunk: Buffer, file: str) -> Buffer:
    """The bytes of the elements in a verified chunk file, writable; raises :class:`Fault`."""
    check_size(info, len(chunk), file)
    result: Buffer = np.require(chunk[: info.chunk_bytes], requirements="W")
    return result


def check_size(info: ArrayInfo, chunk_bytes: int, file: str) -> None:
    """Raise :class:`Fault` unless a chunk file is as large as its array's chunks."""
    expected_bytes = info.chunk_bytes + CRC_BYTES
    if chunk_bytes != expected_bytes:
        raise Fault(CorruptCheckpoint, file, f"expected {expected_bytes} bytes for its array, found {chunk_bytes}")


def as_tensor(data: Buffer, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of these bytes; it shares their memory."""
    return torch.from_numpy(data).view(dtype).reshape(shape) if len(data) else torch.empty(shape, dtype=dtype)


def put_chunk(
    info: ArrayInfo,
    elements: torch.Tensor,
    place: tuple[int, ...],
    out: torch.Tensor,
    start: tuple[int, ...] | None = None,
) -> None:
    """Copy the elements that a chunk has in common with a part of its tensor to their place there.

    Args:
        info: of the whole tensor.
        elements: the chunk's, in its shape.
        place: the chunk's index in the grid.
        out: the part.
        start: where in the whole tensor the part begins; None: the part is the whole tensor.
    """
    target, chunk = out, elements
    for d, (begin, low, high, at) in enumerate(_overlap(info, place, out, start)):
        target = target.narrow(d, low - begin, high - low)
        chunk = chunk.narrow(d, low - at, high - low)
    target.copy_(chunk)


def room_for(
    info: ArrayInfo, place: tuple[int, ...], out: torch.Tensor, start: tuple[int, ...] | None = None
) -> Buffer | None:
    """The memory of ``out`` into which a chunk's payload can be read directly; None if it has to be copied.

    Takes the arguments of :func:`put_chunk`.
    """
    if out.dtype != info.dtype:
        return None
    target = out
    for d, (begin, low, high, _) in enumerate(_overlap(info, place, out, start)):
        target = target.narrow(d, low - begin, high - low)
    if tuple(target.shape) != info.chunk or target.device.type != "cpu" or not target.is_contiguous():
        return None
    # A dimension of size 1 may have any stride.
    room: Buffer = target.as_strided((target.numel(),), (1,)).view(torch.uint8).numpy()
    return room


def _overlap(
    info: ArrayInfo, place: tuple[int, ...], out: torch.Tensor, start: tuple[int, ...] | None
) -> Iterator[tuple[int, int, int, int]]:
    """By dimension of the whole tensor: where ``out`` begins, where its overlap with a chunk begins and ends, and where
    the chunk begins."""
    for d, (index, step) in enumerate(zip(place, info.chunk, strict=True)):
        begin = start[d] if start is not None else 0
        yield begin, max(index * step, begin), min((index + 1) * step, begin + out.shape[d]), index * step


def unpack(info: ArrayInfo, data: Buffer, file: str) -> dict[str, torch.Tensor]:
    """The tensors of a pack by path, each with memory of its own; raises :class:`Fault`."""
    assert info.packed is not None
    tensors = {}
    for path, entry in info.packed.items():
        nbytes = math.prod(entry.shape) * entry.dtype.itemsize
        raw = data[entry.offset : entry.offset + nbytes].copy()
        if len(raw) != nbytes or entry.offset < 0:
            raise Fault(
                CorruptCheckpoint, file, f"has {len(data)} bytes, but {path} ends at byte {entry.offset + nbytes}"
            )
        tensors[path] = as_tensor(raw, entry.shape, entry.dtype)
    return tensors


def node_path(path: str) -> str:
    """The path of the metadata document of the group or array at ``path``."""
    return f"{path}/{NODE}" if path else NODE


def _dump(document: dict[str, Any]) -> bytes:
    compact = json.dumps(document, allow_nan=False)
    return _indented(compact) if len(compact) <= _READ_BY_PEOPLE else compact.encode()


@lru_cache(maxsize=16_384)
def _indented(compact: str) -> bytes:
    """With line breaks, for people. That takes ten times as long, and most saves write what the save before wrote."""
    return json.dumps(json.loads(compact), indent=1).encode()
