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
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from outlast.checkpoint.format.dtypes import DISGUISED, NATIVE, dtype_name, dtype_of
from outlast.checkpoint.format.fields import (
    MAX_DOCUMENT_BYTES,
    MAX_INTEGER,
    Malformed,
    as_count,
    as_list,
    as_mapping,
    as_text,
    member,
    parse,
)
from outlast.checkpoint.format.names import HEADER, NODE
from outlast.checkpoint.format.records import CRC_BYTES, FORMAT_VERSION, Fault
from outlast.checkpoint.memory.pages import Buffer
from outlast.errors import CheckpointError, CorruptCheckpoint, UnknownFormatVersion

_READ_BY_PEOPLE = 100_000
"""Characters up to which a document has line breaks. (In a pack's index of many tensors they would take longest.)"""
PACKED = "outlast_packed"
"""The attribute of a pack that is its index."""
MAX_PACKED = 1 << 20
"""How many tensors a pack has at most."""
_DTYPE = re.compile(r"(bool|bfloat|float|u?int|complex)[0-9a-z_]{0,30}")
"""How PyTorch may name the types of a later version."""
_MAX_DIMENSIONS = 64
"""As many as PyTorch computes with."""


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
    return _dump({**_layout(shape, chunk, dtype), "attributes": {"outlast_dtype": dtype_name(dtype), **more}})


def _layout(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """What an array's document says of its bytes: all but its attributes."""
    stored = NATIVE.get(dtype) or DISGUISED[dtype]
    fill: Any = False if stored == "bool" else [0.0, 0.0] if dtype.is_complex else 0.0 if "float" in stored else 0
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": stored,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, size) for size in chunk]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "fill_value": fill,
    }


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
    def has_parts(self) -> bool:
        """Whether it has several chunks."""
        return any(size > step for size, step in zip(self.shape, self.chunk, strict=True)) and 0 not in self.shape

    @property
    def chunk_bytes(self) -> int:
        """Size of the elements of a chunk."""
        return math.prod(self.chunk) * self.dtype.itemsize


def parse_node(data: bytes | Buffer, file: str) -> ArrayInfo | dict[str, Any]:
    """A ``zarr.json``: an array, or a group's attributes; raises :class:`Fault`.

    An array is at most as large as memory could be, its packed tensors lie side by side within it, and the whole is
    what outlast writes for an array of that shape and dtype.
    """
    try:
        document = parse(data)
        attributes = as_mapping(member(document, "attributes"), "attributes")
        kind = member(document, "node_type")
        if kind == "group":
            return attributes
        if kind != "array":
            raise Malformed(f"node_type is {as_text(kind, 'node_type')[:20]!r}")
        name = as_text(member(attributes, "outlast_dtype"), "outlast_dtype")
        dtype = _dtype(name, file)
        shape = _shape(member(document, "shape"), dtype, "shape")
        grid = as_mapping(member(document, "chunk_grid"), "chunk_grid")
        configuration = as_mapping(member(grid, "configuration"), "configuration")
        chunk = _shape(member(configuration, "chunk_shape"), dtype, "chunk_shape")
        if len(chunk) != len(shape) or 0 in chunk:
            raise Malformed(f"shape {shape}, chunk shape {chunk}")
        for key, expected in _layout(shape, chunk, dtype).items():
            if document.get(key) != expected:
                raise Malformed(f"{key} is not the one of a {name} array")
        entries = attributes.get(PACKED)
        packed = _index(as_mapping(entries, "its index"), shape, chunk, dtype, file) if entries is not None else None
    except Malformed as error:
        raise Fault(CorruptCheckpoint, file, f"is not a Zarr document that outlast wrote: {error}") from error
    return ArrayInfo(shape, dtype, chunk, packed)


def _index(
    entries: dict[str, Any], shape: tuple[int, ...], chunk: tuple[int, ...], dtype: torch.dtype, file: str
) -> dict[str, Packed]:
    """The index of a pack; raises :class:`Malformed`."""
    if len(shape) != 1 or shape != chunk or dtype != torch.uint8 or len(entries) > MAX_PACKED:
        raise Malformed(f"its pack of {len(entries)} tensors has shape {shape}, chunk shape {chunk}")
    index, spans = {}, []
    kinds: dict[str, torch.dtype] = {}  # there may be 100,000 entries, and few types
    for path, entry in entries.items():
        values = as_list(entry, "an entry of its index")
        if len(values) != 3:
            raise Malformed(f"the entry of {path[:80]!r} has {len(values)} values")
        offset, sizes, name = as_count(values[0], "offset"), values[1], values[2]
        if type(name) is not str or name not in kinds:
            kinds[name] = _dtype(as_text(name, "dtype"), file)
        kind = kinds[name]
        index[path] = packed = Packed(
            offset, _shape(sizes, kind, f"the shape of {path[:80]!r}") if sizes != [] else (), kind
        )
        spans.append((offset, offset + math.prod(packed.shape) * kind.itemsize, path))
    end = 0
    for begin, after, path in sorted(spans):
        # One after the other: each has a copy, and together they must not take more than the pack has.
        if begin < end or after > shape[0]:
            raise Malformed(f"{path[:80]!r} at bytes {begin} to {after} of {shape[0]} overlaps another, or the end")
        end = after
    return index


def _shape(value: Any, dtype: torch.dtype, name: str) -> tuple[int, ...]:
    sizes = as_list(value, name)
    if len(sizes) > _MAX_DIMENSIONS:
        raise Malformed(f"{name} has {len(sizes)} dimensions; at most {_MAX_DIMENSIONS} are read")
    elements = 1
    for size in sizes:
        elements *= as_count(size, name) or 1  # strides of an empty tensor count its empty dimensions as 1
    if elements * dtype.itemsize > MAX_INTEGER:
        raise Malformed(f"{name} {tuple(sizes)} does not fit into memory")
    return tuple(sizes)


def _dtype(name: str, file: str) -> torch.dtype:
    dtype = dtype_of(name)
    if dtype is None and not _DTYPE.fullmatch(name):
        raise Malformed(f"the dtype {name[:40]!r}")
    if dtype is None:
        raise Fault(
            UnknownFormatVersion,
            file,
            f"holds a tensor of dtype {name[:40]!r}, which this version of outlast does not know",
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
    data = json.dumps(json.loads(compact), indent=1).encode()
    if len(data) > MAX_DOCUMENT_BYTES:
        raise CheckpointError(
            f"the values of one dictionary of the state take {len(data)} bytes as JSON; "
            f"at most {MAX_DOCUMENT_BYTES} are read",
            "store long lists of numbers as tensors",
        )
    return data
