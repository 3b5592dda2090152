"""Safetensors: a flat dictionary of tensors, and text metadata.

A tensor's name is its keys joined by ``/``, so a flat state keeps its keys. The metadata holds, as JSON, the state with
the names of the tensors in their place, and CRC32Cs of everything, since the format has no checksums.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from outlast.checkpoint.convert.hugging_face import is_index, read_folder, read_shards
from outlast.checkpoint.convert.safetensors_header import check_header
from outlast.checkpoint.format.dtypes import dtype_name
from outlast.checkpoint.format.json_values import TAG, VALUES, UnknownKind, from_json, key_text
from outlast.checkpoint.format.records import crc_hex
from outlast.checkpoint.state.nested import insert
from outlast.errors import CheckpointError, CorruptCheckpoint, MissingDependency

_OURS = "outlast."
_STEP = "outlast.step"
_STATE = "outlast.state"
_VALUES = "outlast.values"
_PATHS = "outlast.paths"
"""The state as the version before wrote it: its values, and the keys of tensors that contain a slash."""
_CRCS = "outlast.crc32c"
_RESERVED = "__metadata__"
_TENSOR = "tensor"


def check_installed() -> None:
    """Raise :class:`MissingDependency` unless the package is installed."""
    _package("safetensors")


def holds(value: Any) -> bool:
    """Whether a file can hold a tensor or value."""
    try:
        if isinstance(value, torch.Tensor):
            _check_dtype(_package("safetensors.torch"), value.dtype, "")
    except CheckpointError:
        return False
    return True


def write(state: dict[str, Any], path: str, step: int) -> list[str]:
    """Write a nested state to a new file; durable on return.

    Returns:
        Names of what is left out: always empty; what the format cannot hold is an error.

    Raises:
        MissingDependency: safetensors is not installed.
        CheckpointError: two tensors would have the same name, or the format does not have a dtype; names them.
        OSError: the file cannot be written.
    """
    package = _package("safetensors.torch")
    tensors: dict[str, torch.Tensor] = {}
    dtypes: set[torch.dtype] = set()

    def place(value: Any, path: tuple[Any, ...]) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        name = "/".join(map(key_text, path))
        if name in tensors or name == _RESERVED:
            why = "is reserved in" if name == _RESERVED else "would occur twice in"
            raise CheckpointError(f"the tensor name {name!r} {why} a safetensors file", "export as dcp or torch")
        if value.dtype not in dtypes:
            _check_dtype(package, value.dtype, name)
            dtypes.add(value.dtype)
        tensors[name] = value.contiguous()
        return {TAG: _TENSOR, "name": name}

    encoded = VALUES.encode(state, lambda path: f"the state at {'/'.join(map(key_text, path))!r}", place)
    metadata = {"format": "pt", _STEP: str(step), _STATE: json.dumps(encoded)}
    metadata[_CRCS] = json.dumps(_checksums(metadata, tensors))
    try:
        package.save_file(tensors, path, metadata=metadata)
    except importlib.import_module("safetensors").SafetensorError as error:
        raise OSError(str(error)) from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return []


def read(path: str) -> dict[str, Any]:
    """The state in a file: nested as it was if outlast wrote it, otherwise flat, with the file's keys.

    Args:
        path: of a file, of a folder as Hugging Face's ``save_pretrained`` writes it, or of the index in one.

    Raises:
        MissingDependency: safetensors is not installed.
        OSError: the file cannot be opened.
        CheckpointError: it is damaged, or in another format.
    """
    if os.path.isdir(path):
        return read_folder(path, "model", "safetensors", read)
    if is_index(path):
        return read_shards(os.path.dirname(path), path, read)
    package = _package("safetensors")
    check_header(path)
    try:
        with package.safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except package.SafetensorError as error:
        raise CorruptCheckpoint(
            f"{path} cannot be read: {error}", "it is damaged, or not a safetensors file"
        ) from error
    if not any(key.startswith(_OURS) for key in metadata):
        return dict(tensors)
    try:
        computed = _checksums(metadata, tensors)
        written = json.loads(metadata[_CRCS])
        if computed != written:
            damaged = sorted(
                name for name in computed.keys() | written.keys() if computed.get(name) != written.get(name)
            )
            raise CorruptCheckpoint(f"{path}: the CRC32C of {damaged[:9]} does not match", "copy it again")
        return _state(metadata, tensors, path)
    except (AttributeError, LookupError, RecursionError, RuntimeError, TypeError, UnknownKind, ValueError) as error:
        raise CorruptCheckpoint(
            f"{path}: outlast did not write its metadata {_OURS}*: {type(error).__name__}: {error}",
            "copy it again",
        ) from error


def _state(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor], path: str) -> dict[str, Any]:
    """The state that outlast wrote; raises as :func:`from_json` does."""
    if _STATE not in metadata:
        paths = json.loads(metadata[_PATHS])
        before: dict[str, Any] = dict(from_json(json.loads(metadata[_VALUES])))
        for name, tensor in tensors.items():
            insert(before, paths.get(name) or name.split("/"), tensor, path)
        return before

    def tensor_of(node: dict[str, Any]) -> torch.Tensor:
        if node[TAG] != _TENSOR:
            raise UnknownKind(f"a value of the kind {node[TAG]!r}")
        return tensors[node["name"]]

    state = VALUES.decode(json.loads(metadata[_STATE]), tensor_of, stand_ins=True)
    if not isinstance(state, dict):
        raise TypeError(f"its state is a {type(state).__name__}")
    return state


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(
            f"safetensors files need a package that is not installed: {error}", "pip install 'outlast[safetensors]'"
        ) from error


def _check_dtype(package: Any, dtype: torch.dtype, name: str) -> None:
    try:
        package.save({"x": torch.empty(0, dtype=dtype)})
    except Exception as error:  # the package has no error of its own for this
        raise CheckpointError(
            f"the tensor {name!r} has dtype {dtype_name(dtype)}, which safetensors cannot hold",
            "export as dcp or torch, or only a part of the state with --part",
        ) from error


def _checksums(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """CRC32C of each tensor with its dtype and shape, by name; that of outlast's metadata by the reserved name."""
    texts = (_STEP, _STATE) if _STATE in metadata else (_STEP, _VALUES, _PATHS)
    checksums = {_RESERVED: crc_hex("\n".join(metadata[key] for key in texts).encode())}
    for name, tensor in tensors.items():
        kind = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode()
        checksums[name] = crc_hex(kind, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return checksums
