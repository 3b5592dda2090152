"""Zarr v3 documents and chunks, written by hand: stock Zarr reads them.

One array a tensor; a chunk is its little-endian bytes in C order, uncompressed, then their CRC32C in 4 bytes (codecs
``bytes`` and ``crc32c``). Every chunk is there, and an array without elements has none. Small tensors lie packed in
arrays of bytes, whose attribute ``outlast_packed`` is their index. Chunk keys are joined by dots, as in ``c.0.0``, so
that a tensor is one directory. The format is Zarr's; its Python writer is not used: it
writes neither durably nor fast, and its reader takes a missing chunk for zeros.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from outlast.checkpoint.format.dtypes import DISGUISED, NATIVE, dtype_name, dtype_of
from outlast.checkpoint.format.names import HEADER, NODE
from outlast.checkpoint.format.records import CRC_BYTES, FORMAT_VERSION, Fault
from outlast.checkpoint.memory.pages import Buffer
from outlast.errors import CorruptCheckpoint, UnknownFormatVersion

PACKED = "outlast_packed"
"""Attribute of a pack: its index."""


def group_document(attributes: dict[str, Any]) -> bytes:
    """A group's ``zarr.json``."""
    return _dump({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def root_document(attributes: dict[str, Any], step: int, world_size: int, attempt_id: str, save_id: int) -> bytes:
    """The root group's ``zarr.json``, which says of which save it is."""
    header = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": world_size,
        "epoch": attempt_id,
        "serial": save_id,
    }
    return group_document({**attributes, HEADER: header})


def array_document(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """A tensor's ``zarr.json``."""
    return _array(shape, chunk, dtype, {})


@dataclass(frozen=True)
class Packed:
    """Where in a pack a small tensor lies."""

    offset: int
    """Of its first byte."""
    shape: tuple[int, ...]
    dtype: torch.dtype


def pack_document(nbytes: int, index: dict[str, Packed]) -> bytes:
    """The ``zarr.json`` of an array of bytes, and of what lies in it: by path, ``[offset, shape, dtype]``."""
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
    """The file name of an array's chunk, by its place in the grid of chunks."""
    return ".".join(["c", *map(str, place)])


@dataclass(frozen=True)
class ArrayInfo:
    """A tensor as its ``zarr.json`` tells it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunk: tuple[int, ...]
    """Shape of a chunk; the last ones reach beyond the array where it is no multiple of it."""
    packed: dict[str, Packed] | None = None
    """Of a pack: what lies in it."""

    @property
    def payload_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the elements of a chunk."""
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
        raise Fault(CorruptCheckpoint, file, f"is not a Zarr document as outlast writes them: {error}") from error
    return ArrayInfo(shape, _dtype(name, file), chunk, packed)


def _dtype(name: str, file: str) -> torch.dtype:
    dtype = dtype_of(name)
    if dtype is None:
        raise Fault(UnknownFormatVersion, file, f"holds a tensor of dtype {name}, which this outlast does not know")
    return dtype


def payload(info: ArrayInfo, chunk: Buffer, file: str) -> Buffer:
    """The elements' bytes of a verified chunk file, writable; raises :class:`Fault`."""
    check_size(info, len(chunk), file)
    result: Buffer = np.require(chunk[: info.chunk_bytes], requirements="W")
    return result


def check_size(info: ArrayInfo, chunk_bytes: int, file: str) -> None:
    """Whether a chunk file is as large as its array's chunks are; raises :class:`Fault`."""
    if chunk_bytes != info.chunk_bytes + CRC_BYTES:
        raise Fault(CorruptCheckpoint, file, f"has {chunk_bytes} bytes, its array needs {info.chunk_bytes + CRC_BYTES}")


def as_tensor(data: Buffer, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor whose elements these bytes are; their memory is shared."""
    return torch.from_numpy(data).view(dtype).reshape(shape) if len(data) else torch.empty(shape, dtype=dtype)


def put_chunk(
    info: ArrayInfo, data: Buffer, place: tuple[int, ...], out: torch.Tensor, start: tuple[int, ...] | None = None
) -> None:
    """Copy what the payload of one chunk has of a tensor, or of a part of it, to where it belongs there.

    Args:
        info: of the whole tensor.
        data: the payload.
        place: of the chunk in the grid.
        out: the part.
        start: where in the whole tensor the part begins; None: it is all.
    """
    target, chunk = out, as_tensor(data, info.chunk, info.dtype)
    for d, (begin, low, high, at) in enumerate(_overlap(info, place, out, start)):
        target = target.narrow(d, low - begin, high - low)
        chunk = chunk.narrow(d, low - at, high - low)
    target.copy_(chunk)


def room_for(
    info: ArrayInfo, place: tuple[int, ...], out: torch.Tensor, start: tuple[int, ...] | None = None
) -> Buffer | None:
    """Where in ``out`` the payload of a chunk can be read to as it is; None where it has to be copied there.

    Args: as of :func:`put_chunk`.
    """
    target = out
    for d, (begin, low, high, _) in enumerate(_overlap(info, place, out, start)):
        target = target.narrow(d, low - begin, high - low)
    if tuple(target.shape) != info.chunk or target.device.type != "cpu" or not target.is_contiguous():
        return None
    # Strides of dimensions of one element may be anything.
    found: Buffer = target.as_strided((target.numel(),), (1,)).view(torch.uint8).numpy()
    return found


def _overlap(
    info: ArrayInfo, place: tuple[int, ...], out: torch.Tensor, start: tuple[int, ...] | None
) -> Iterator[tuple[int, int, int, int]]:
    """By dimension of the whole tensor: where ``out`` begins, where a chunk's overlap with it does and ends, and where
    the chunk begins."""
    for d, (index, step) in enumerate(zip(place, info.chunk, strict=True)):
        begin = start[d] if start is not None else 0
        yield begin, max(index * step, begin), min((index + 1) * step, begin + out.shape[d]), index * step


def unpack(info: ArrayInfo, data: Buffer, file: str) -> dict[str, torch.Tensor]:
    """The small tensors of a pack by path, each with memory of its own; raises :class:`Fault`."""
    assert info.packed is not None
    found = {}
    for path, entry in info.packed.items():
        nbytes = math.prod(entry.shape) * entry.dtype.itemsize
        raw = data[entry.offset : entry.offset + nbytes].copy()
        if len(raw) != nbytes or entry.offset < 0:
            raise Fault(CorruptCheckpoint, file, f"has {len(data)} bytes, {path} ends at {entry.offset + nbytes}")
        found[path] = as_tensor(raw, entry.shape, entry.dtype)
    return found


def node_path(path: str) -> str:
    """Where the metadata of the group or array at ``path`` lies."""
    return f"{path}/{NODE}" if path else NODE


def _dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1, allow_nan=False).encode()
