"""What a ``torch.save`` file asks for, found before PyTorch reads it: no more than the file has.

PyTorch reserves memory for as many elements as a file names, and calls constructors with any size. So the archive's
parts are looked at first, and its pickle is read as records: each storage must be there whole, and each tensor lie
within its storage.
"""

from __future__ import annotations

import os
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping as Fields
from typing import IO, Any

import torch

from outlast.checkpoint.convert.pickle_reader import Maker, Mapping, PickleReader, Record
from outlast.errors import CheckpointError, CorruptCheckpoint

_DIMENSIONS = 64
_MOST = 1 << 62
_PICKLE_BYTES = 128 << 20
"""Of what describes the tensors, at most: some hundred bytes a tensor."""
_ZIP = b"PK\x03\x04"
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_BYTES = 20
_MAGIC = 0x1950A86A20F9469CFC6C
"""Begins files in the format before zip archives."""


class Storage:
    """The memory of tensors, as a file announces it.

    Args:
        dtype: of its elements; None: bytes.
        numel: number of its elements.
    """

    def __init__(self, dtype: torch.dtype | None, numel: int) -> None:
        self.dtype = dtype
        self.nbytes = numel * (1 if dtype is None else dtype.itemsize)


def check_archive(file: IO[bytes], what: str) -> None:
    """Look at a ``torch.save`` file.

    Args:
        file: seekable, at its beginning.
        what: its name, for errors.

    Raises:
        CorruptCheckpoint: it is damaged, or asks for more than it has; says which part.
        CheckpointError: it names what is neither a tensor nor a plain value.
        Exception: of parsers, for damaged bytes.
    """
    size_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    is_zip = file.read(len(_ZIP)) == _ZIP
    file.seek(0)
    if is_zip:
        _check_zip(file, size_bytes, what)
    else:
        _check_legacy(file, size_bytes, what)


def _check_zip(file: IO[bytes], size_bytes: int, what: str) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = {entry.filename for entry in entries}
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise CorruptCheckpoint(f"{what}: its part {packed[0]!r} is compressed, which torch.save never does")
        if len(names) < len(entries) or len({name.partition("/")[0] for name in names}) != 1:
            raise CorruptCheckpoint(f"{what}: two of its {len(entries)} parts have one name, or are not in one folder")
        announced = sum(entry.file_size for entry in entries)
        if announced > size_bytes or any(entry.file_size != entry.compress_size for entry in entries):
            raise CorruptCheckpoint(f"{what}: its parts have {announced} bytes, the file has {size_bytes}")
        _check_end(file, size_bytes, what)
        bad = archive.testzip()  # torch.load does not compare the checksums
        if bad is not None:
            raise CorruptCheckpoint(
                f"{what}: the CRC-32 of its part {bad} does not match",
                "copy it again; if it was written under torch.serialization.set_crc32_options(False), which leaves "
                "out checksums, save it again with them",
            )
        folder = next(iter(names)).partition("/")[0]
        sizes = {name.removeprefix(f"{folder}/data/"): archive.getinfo(name).file_size for name in names}
        entry = archive.getinfo(f"{folder}/data.pkl")
        if entry.file_size > _PICKLE_BYTES:
            raise CorruptCheckpoint(f"{what}: its data.pkl has {entry.file_size} bytes, more than {_PICKLE_BYTES}")
        data = archive.read(entry)

    def persistent(identity: Any) -> Storage:
        storage, key = _storage(identity, 5)
        if sizes.get(key) != storage.nbytes:
            raise ValueError(f"the storage {key!r:.60} is to have {storage.nbytes} bytes, and has {sizes.get(key)}")
        return storage

    _Reader(data, what, persistent).read()


def _check_end(file: IO[bytes], size_bytes: int, what: str) -> None:
    """The directory of a zip archive must end where its end begins, so that every reader finds the same one."""
    file.seek(size_bytes - _END.size)
    mark, *_, length, offset, _ = _END.unpack(file.read(_END.size))
    end = size_bytes - _END.size
    if offset == 0xFFFFFFFF or length == 0xFFFFFFFF:
        end -= _LOCATOR_BYTES + _END_64.size
        file.seek(max(end, 0))
        *_, length, offset = _END_64.unpack(file.read(_END_64.size))
    elif end >= offset + length + _LOCATOR_BYTES + _END_64.size:  # written where not needed, too
        end -= _LOCATOR_BYTES + _END_64.size
    if mark != b"PK\x05\x06" or offset + length != end:
        raise CorruptCheckpoint(f"{what}: its directory of {length} bytes at {offset} does not end at {end}")


def _check_legacy(file: IO[bytes], size_bytes: int, what: str) -> None:
    data = file.read(min(size_bytes, _PICKLE_BYTES))
    seen: dict[str, int] = {}

    def persistent(identity: Any) -> Storage:
        storage, key = _storage(identity, 6)
        seen[key] = max(storage.nbytes, seen.get(key, 0))
        if sum(seen.values()) > size_bytes:
            raise ValueError(f"its storages are to have {sum(seen.values())} bytes, and the file has {size_bytes}")
        return _view(storage, identity[5])

    position, first = 0, True
    for persist in (None, None, None, persistent, None):
        reader = _Reader(data, what, persist, position)
        value = reader.read()
        if first and value != _MAGIC:
            raise ValueError("it begins neither as a zip archive nor as an older file of torch.save")
        position, first = reader.position, False


class _Reader(PickleReader):
    """Of what describes tensors: their storages, and where in those they lie."""

    def __init__(self, data: bytes, what: str, persistent: Any, position: int = 0) -> None:
        super().__init__(data, what, self._look_up, persistent, position)
        self._name = what

    def _look_up(self, module: str, name: str) -> Any:
        # torch.save writes the names of Python 2.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full in _PLAIN:
            return Maker(full, self._plain(full))
        if full in _REBUILT:
            return Maker(full, _REBUILT[full])
        if full == "torch._tensor._rebuild_from_type_v2":
            return Maker(full, _rebuilt_from_type)
        found = getattr(torch, name, None) if module in ("torch", "torch.storage") else None
        if isinstance(found, _VALUES):
            return found
        if isinstance(found, type) and issubclass(found, _STORAGES):
            return found
        if full in _NAMES:
            return Record(full)
        raise CheckpointError(
            f"{self._name} is refused: it names {full}, which is not a tensor or plain value",
            "import takes torch.save files that hold only tensors, dictionaries, lists, numbers and strings; "
            "save model.state_dict(), not the model",
        )

    def _plain(self, full: str) -> Any:
        """Constructors that copy what they get, and reserve nothing by its number."""

        def make(*args: Any) -> Any:
            for arg in args:
                if full == "builtins.bytearray" and not isinstance(arg, (bytes, str, Record)):
                    raise ValueError(f"it calls bytearray with a {type(arg).__name__}")
                self.count(len(arg) if isinstance(arg, (dict, list, tuple, set, str, bytes)) else 1)
            return Mapping() if full.startswith("collections.") else Record(full, args)

        return make


_VALUES = (torch.dtype, torch.qscheme, torch.layout, torch.memory_format)
_STORAGES = (torch.storage._LegacyStorage, torch.UntypedStorage)
_NAMES = {"torch.Tensor", "torch.nn.parameter.Parameter"}
"""What may be named, but not called."""


def as_size(values: Any) -> tuple[int, ...]:
    """The dimensions of a tensor, or its strides; raises ValueError if they are not such."""
    if not isinstance(values, (tuple, list)) or len(values) > _DIMENSIONS:
        raise ValueError(f"a size is {values!r:.60}" if not isinstance(values, (tuple, list)) else "a size is too long")
    if not all(type(value) is int and 0 <= value <= _MOST for value in values):
        raise ValueError("a size has what is no integer from 0")
    return tuple(values)


def elements(size: tuple[int, ...]) -> int:
    """The number of elements of a tensor, which are at most 2^62; raises ValueError otherwise."""
    numel = 1
    for length in sorted(size):
        numel *= length
        if numel > _MOST:
            raise ValueError(f"a tensor of the size {list(size)[:9]} has more than {_MOST} elements")
    return numel


def _storage(identity: Any, fields: int) -> tuple[Storage, str]:
    if type(identity) is not tuple or len(identity) != fields or identity[0] not in ("storage", b"storage"):
        raise ValueError("it has a persistent id that is not of a storage")
    _, kind, key, _, numel, *_ = identity
    if not (isinstance(kind, type) and issubclass(kind, _STORAGES)) or type(key) is not str:
        raise ValueError("it has a storage of no known type, or without a name")
    if type(numel) is not int or not 0 <= numel <= _MOST:
        raise ValueError(f"the storage {key!r:.60} is to have {numel!r:.60} elements")
    return Storage(getattr(kind, "_dtype", None), numel), key


def _view(storage: Storage, view: Any) -> Storage:
    if view is None:
        return storage
    if type(view) is not tuple or len(view) != 3 or not all(type(field) is int for field in view[1:]):
        raise ValueError("it has a part of a storage without place and size")
    _, offset, numel = view
    part = Storage(storage.dtype, max(numel, 0))
    if offset < 0 or numel < 0 or Storage(storage.dtype, offset + numel).nbytes > storage.nbytes:
        raise ValueError(f"a part of a storage is to have {numel} elements from {offset}, of {storage.nbytes} bytes")
    return part


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any, dtype: torch.dtype | None = None) -> Record:
    size, stride = as_size(size), as_size(stride)
    if not isinstance(storage, Storage) or type(offset) is not int or not 0 <= offset <= _MOST:
        raise ValueError("it has a tensor without a storage, or without a place in it")
    if len(size) != len(stride):
        raise ValueError(f"it has a tensor of {len(size)} dimensions with {len(stride)} strides")
    kind = dtype or storage.dtype or torch.uint8
    if elements(size):
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if (last + 1) * kind.itemsize > storage.nbytes:
            raise ValueError(
                f"a tensor of the size {list(size)[:9]} needs {(last + 1) * kind.itemsize} bytes of a storage that has "
                f"{storage.nbytes}"
            )
    elif offset * kind.itemsize > storage.nbytes:
        raise ValueError(f"an empty tensor begins at {offset}, behind its storage of {storage.nbytes} bytes")
    return Record("tensor")


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Record:
    if not isinstance(dtype, torch.dtype):
        raise ValueError("it has a tensor without a type")
    return _tensor(storage, offset, size, stride, dtype=dtype)


def _without_storage(dtype: Any, size: Any, stride: Any, *_: Any) -> Record:
    elements(as_size(size))
    as_size(stride)
    return Record("tensor")


def _rebuilt_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    if not isinstance(function, Maker) or function.name not in _REBUILT or type(args) is not tuple:
        raise ValueError("it makes a tensor with what makes none")
    return Record("tensor", (function(args), state))


_U = "torch._utils._rebuild_"
_REBUILT: Fields[str, Any] = {
    f"{_U}tensor": _tensor,
    f"{_U}tensor_v2": _tensor,
    f"{_U}tensor_v3": _tensor_v3,
    f"{_U}meta_tensor_no_storage": _without_storage,
    f"{_U}parameter": None,
    f"{_U}parameter_with_state": None,
    f"{_U}sparse_tensor": None,
}
"""Functions that make tensors of storages, or of other tensors."""
_PLAIN = {
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
}
