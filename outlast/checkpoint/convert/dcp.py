"""PyTorch's distributed checkpoints (DCP): a folder of ``*.distcp`` files and a pickled ``.metadata``.

PyTorch does the writing. Reading is done here, because PyTorch unpickles the metadata and every value without checks.
"""

from __future__ import annotations

import io
import itertools
import os
import reprlib
import warnings
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import torch

from outlast.checkpoint.convert.archive_bounds import as_size, elements
from outlast.checkpoint.convert.loadable import check_loadable
from outlast.checkpoint.convert.pickle_reader import Record
from outlast.checkpoint.convert.safe_unpickle import load_archive, load_records
from outlast.checkpoint.convert.source_files import open_source, read_source
from outlast.checkpoint.format.fields import MAX_DOCUMENT_BYTES
from outlast.checkpoint.storage.local import sync_dir
from outlast.errors import CheckpointError, CorruptCheckpoint

METADATA = ".metadata"


def write(state: dict[str, Any], path: str, step: int) -> list[str]:
    """Write a nested state to a new folder that ``torch.distributed.checkpoint.load`` reads; durable on return.

    Returns:
        Names of what the format cannot hold: empty dictionaries.

    Raises:
        CheckpointError: PyTorch would not read something back; names it.
        OSError, ValueError, CheckpointError: the folder cannot be written.
    """
    check_loadable(state, "dcp")
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    del step
    with warnings.catch_warnings():
        # It warns that there is no process group, which no_dist asks for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            save(state, storage_writer=FileSystemWriter(path), no_dist=True)
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            raise CheckpointError("; ".join(f"{type(cause).__name__}: {cause}" for cause in causes)) from error
    sync_dir(path)
    return _empty(state, "")


def read(path: str) -> dict[str, Any]:
    """The nested state in a folder; the shards of a tensor are joined.

    Raises:
        OSError: it cannot be opened.
        CheckpointError: it is damaged, names classes that the metadata does not need, holds more than tensors and plain
            values, or is not such a folder.
    """
    file = os.path.join(path, METADATA)
    try:
        data = read_source(file, MAX_DOCUMENT_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path} is not a PyTorch distributed checkpoint: it has no {METADATA}", "pass the folder that holds it"
        ) from error
    metadata = load_records(data, file)
    try:
        return _Folder(path, metadata).state()
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{file} is not metadata as PyTorch writes it: {type(error).__name__}: {error}",
            "it may be from a later version",
        ) from error


class _Folder:
    def __init__(self, path: str, metadata: Any) -> None:
        fields = _fields(metadata, "Metadata")
        self._path = path
        self._entries: dict[str, Any] = dict(fields["state_dict_metadata"])
        self._paths: dict[str, Sequence[Any]] = dict(fields.get("planner_data") or {})
        self._places: dict[tuple[str, tuple[int, ...] | None], dict[str, Any]] = {}
        for index, info in fields["storage_data"].items():
            key = _fields(index, "MetadataIndex")
            offset = key.get("offset")
            self._places[_text(key["fqn"]), None if offset is None else as_size(offset)] = _fields(info, "_StorageInfo")
        self._check_places()

    def state(self) -> dict[str, Any]:
        entries: dict[tuple[Any, ...], Any] = {}
        for name, entry in self._entries.items():
            is_value = isinstance(entry, Record) and entry.kind == "BytesStorageMetadata"
            value = self._load(name, None) if is_value else self._tensor(name, _fields(entry, "TensorStorageMetadata"))
            path = tuple(self._paths.get(_text(name), (name,)))
            if not path or path in entries:
                raise ValueError(f"{name!r} has no path, or that of another entry")
            entries[path] = value
        state = _nest(entries)
        if not isinstance(state, dict):
            raise ValueError("the top level is not a dictionary")
        return state

    def _tensor(self, name: str, fields: dict[str, Any]) -> torch.Tensor:
        properties = fields["properties"]
        if not isinstance(properties, Record) or not isinstance(properties.state, tuple):
            raise ValueError(f"{name!r} has no properties")
        dtype, size = properties.state[0], as_size(fields["size"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name!r} has no type")
        chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
        if len(chunks) == 1 and as_size(chunks[0]["sizes"]) == size:
            return self._shard(name, chunks[0], dtype)
        self._check_chunks(name, size, dtype, chunks)
        whole = torch.empty(size, dtype=dtype)
        missing = torch.ones(size, dtype=torch.bool)
        for chunk in chunks:
            shard = self._shard(name, chunk, dtype)
            pairs = zip(chunk["offsets"], chunk["sizes"], strict=True)
            region = tuple(slice(start, start + length) for start, length in pairs)
            whole[region] = shard
            missing[region] = False
        if missing.any():
            raise CorruptCheckpoint(f"{self._path}: parts of the tensor {name!r} are missing", "save it again")
        return whole

    def _check_chunks(self, name: str, size: tuple[int, ...], dtype: torch.dtype, chunks: list[dict[str, Any]]) -> None:
        """No more memory is taken for a tensor than its chunks have bytes in their files."""
        covered = stored_bytes = 0
        for chunk in chunks:
            offsets, sizes = as_size(chunk["offsets"]), as_size(chunk["sizes"])
            ends = [start + length for start, length in zip(offsets, sizes, strict=True)]
            if len(ends) != len(size) or any(end > length for end, length in zip(ends, size, strict=True)):
                raise CorruptCheckpoint(
                    f"{self._path}: the part of {name!r} at {list(offsets)[:9]} is not within {list(size)[:9]}"
                )
            covered += elements(sizes)
            stored_bytes += self._places[name, offsets]["length"]
        if covered < elements(size):
            raise CorruptCheckpoint(
                f"{self._path}: parts of the tensor {name!r} are missing: it has {elements(size)} elements, they have "
                f"{covered}",
                "save it again",
            )
        if covered > elements(size) or covered * dtype.itemsize > stored_bytes:
            raise CorruptCheckpoint(
                f"{self._path}: the tensor {name!r} has {elements(size)} elements, its parts {covered}, in "
                f"{stored_bytes} bytes"
            )

    def _check_places(self) -> None:
        """Each has bytes of its own, so that what is read is in all no more than the files have."""
        spans: dict[str, list[tuple[int, int, str]]] = {}
        for (name, _), place in self._places.items():
            start, length = place["offset"], place["length"]
            if type(start) is not int or type(length) is not int or start < 0 or length < 0:
                raise ValueError(f"{name!r} has {length!r:.60} bytes at {start!r:.60}")
            spans.setdefault(_text(place["relative_path"]), []).append((start, start + length, name))
        for file, taken in spans.items():
            taken.sort()
            for (_, end, one), (start, _, other) in itertools.pairwise(taken):
                if start < end:
                    raise CorruptCheckpoint(f"{self._path}: {one!r} and {other!r} have the same bytes of {file!r}")

    def _shard(self, name: str, chunk: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
        offsets, sizes = as_size(chunk["offsets"]), as_size(chunk["sizes"])
        shard = self._load(name, offsets)
        if not isinstance(shard, torch.Tensor) or shard.dtype != dtype or tuple(shard.shape) != sizes:
            raise CorruptCheckpoint(
                f"{self._path}: the part of {name!r} at {offsets} is not the tensor that the metadata describes"
            )
        return shard

    def _load(self, name: str, offset: tuple[int, ...] | None) -> Any:
        place = self._places.pop((name, offset))  # each is read once
        if place.get("transform_descriptors"):
            raise CheckpointError(
                f"{self._path}: {name!r} is stored through {place['transform_descriptors']}, which outlast cannot undo",
                "save it without extensions",
            )
        relative = _text(place["relative_path"])
        if "\0" in relative or PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts:
            raise CheckpointError(f"{self._path}: {name!r} points outside of the folder, to {relative!r}; refused")
        file, start, length = os.path.join(self._path, relative), place["offset"], place["length"]
        try:
            with open_source(file) as stream:
                if length > os.fstat(stream.fileno()).st_size - start:
                    raise CorruptCheckpoint(f"{file} ends before {name!r} does", "copy it again")
                stream.seek(start)
                data = stream.read(length)
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"{file}, which holds {name!r}, is missing", "copy the whole folder") from error
        return load_archive(io.BytesIO(data), f"{name!r} in {file}")


def _nest(entries: dict[tuple[Any, ...], Any]) -> Any:
    """Dictionaries, and lists where the paths have numbers, from their leaves by path."""
    if () in entries:
        if len(entries) > 1:
            raise ValueError("a value has other values below it")
        return entries[()]
    children: dict[Any, dict[tuple[Any, ...], Any]] = {}
    for (key, *rest), value in entries.items():
        children.setdefault(key, {})[tuple(rest)] = value
    if all(isinstance(key, str) for key in children):
        return {key: _nest(below) for key, below in children.items()}
    if not all(type(key) is int and key >= 0 for key in children):
        raise ValueError(f"keys and list indices are mixed: {list(children)[:9]}")
    if max(children) >= 2 * len(children) + 1000:
        raise ValueError(f"a list of {len(children)} items has one at index {max(children)}")
    # PyTorch leaves out empty dictionaries, in lists too; the items after them keep their index.
    return [_nest(children[index]) if index in children else {} for index in range(max(children) + 1)]


def _empty(value: Any, name: str) -> list[str]:
    """Names of empty dictionaries below the top level."""
    if isinstance(value, dict):
        if not value:
            return [name] if name else []
        below = [(f"{name}/{key}" if name else key, item) for key, item in value.items()]
    elif isinstance(value, list):
        below = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    else:
        return []
    return [empty for path, item in below for empty in _empty(item, path)]


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"expected a text, found a {type(value).__name__}")
    return value


def _fields(record: Any, kind: str) -> dict[str, Any]:
    """The attributes of a record in the pickle."""
    if not isinstance(record, Record) or record.kind != kind or not isinstance(record.state, dict):
        raise ValueError(f"expected a {kind}, found {reprlib.repr(record):.60}")
    return record.state
