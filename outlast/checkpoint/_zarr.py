"""Zarr v3 documents and chunks, written by hand: stock Zarr reads them.

One array a tensor and one chunk an array: its little-endian bytes in C order, uncompressed, then their CRC32C in 4
bytes (codecs ``bytes`` and ``crc32c``). An array without elements has no chunk. Chunk keys are joined by dots, as in
``c.0.0``, so that a tensor is one directory with two files. The format is Zarr's; its Python writer is not used: it
writes neither durably nor fast, and its reader takes a missing chunk for zeros.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from outlast.checkpoint._dtypes import DISGUISED, NATIVE, dtype_name, dtype_of
from outlast.checkpoint._names import NODE
from outlast.checkpoint._records import Fault
from outlast.checkpoint._store import Buffer
from outlast.errors import CorruptCheckpoint, UnknownFormatVersion

CRC_BYTES = 4


def group_document(attributes: dict[str, Any]) -> bytes:
    """A group's ``zarr.json``."""
    return _dump({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def array_document(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """A tensor's ``zarr.json``."""
    stored = NATIVE.get(dtype) or DISGUISED[dtype]
    fill: Any = False if stored == "bool" else [0.0, 0.0] if dtype.is_complex else 0.0 if "float" in stored else 0
    return _dump(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": stored,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, size) for size in shape]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "fill_value": fill,
            "attributes": {"outlast_dtype": dtype_name(dtype)},
        }
    )


def chunk_name(dimensions: int) -> str:
    """The file name of an array's only chunk."""
    return ".".join(["c"] + ["0"] * dimensions)


@dataclass(frozen=True)
class ArrayInfo:
    """A tensor as its ``zarr.json`` tells it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def payload_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_node(data: bytes, file: str) -> ArrayInfo | dict[str, Any]:
    """A ``zarr.json``: an array, or a group's attributes; raises :class:`Fault`."""
    try:
        document = json.loads(data)
        if document["node_type"] == "group":
            attributes: dict[str, Any] = document["attributes"]
            return attributes
        name = document["attributes"]["outlast_dtype"]
        shape = tuple(int(size) for size in document["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise Fault(CorruptCheckpoint, file, f"is not a Zarr document as outlast writes them: {error}") from error
    dtype = dtype_of(name)
    if dtype is None:
        raise Fault(UnknownFormatVersion, file, f"holds a tensor of dtype {name}, which this outlast does not know")
    return ArrayInfo(shape, dtype)


def as_tensor(info: ArrayInfo, chunk: Buffer | None, file: str) -> torch.Tensor:
    """The tensor whose verified chunk file this is (its memory is shared); raises :class:`Fault`."""
    if info.payload_bytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    if chunk is None or len(chunk) != info.payload_bytes + CRC_BYTES:
        size = 0 if chunk is None else len(chunk)
        raise Fault(CorruptCheckpoint, file, f"has {size} bytes, its array needs {info.payload_bytes + CRC_BYTES}")
    payload: Buffer = np.require(chunk[: info.payload_bytes], requirements="W")
    return torch.from_numpy(payload).view(info.dtype).reshape(info.shape)


def node_path(path: str) -> str:
    """Where the metadata of the group or array at ``path`` lies."""
    return f"{path}/{NODE}" if path else NODE


def _dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1, allow_nan=False).encode()
