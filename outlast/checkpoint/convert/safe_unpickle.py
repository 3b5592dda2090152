"""Reading other programs' pickles without running anything that they name. The only file that unpickles.

outlast itself writes no pickles. Import reads ``torch.save`` files and PyTorch's distributed checkpoints, which are
pickles: archives through ``torch.load(weights_only=True)``, the metadata of a distributed checkpoint through
:func:`load_records`.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from typing import IO, Any

import torch

from outlast.errors import CheckpointError, CorruptCheckpoint

_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
_CONTAINERS: dict[tuple[str, str], type] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
}
_IGNORED = {
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("builtins", "getattr"),  # some versions of Python pickle enum members with it
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}
"""Named in the metadata but not needed: the memory format, and where the checkpoint was written."""
_NAMED = re.compile(r"GLOBAL (\S+)")


class Record:
    """An object in a pickle: the name of its class, and its state; the class itself is not used."""

    kind = ""
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_archive(file: IO[bytes], what: str) -> Any:
    """The contents of a ``torch.save`` file: tensors on the CPU, in dictionaries, lists and plain values.

    Args:
        file: seekable, at its beginning.
        what: its name, for errors.

    Raises:
        CorruptCheckpoint: it is damaged, or not a ``torch.save`` file.
        CheckpointError: it holds more than tensors and plain values.
    """
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                bad = archive.testzip()  # torch.load does not compare the checksums
            if bad is not None:
                raise CorruptCheckpoint(
                    f"{what}: the CRC-32 of its part {bad} does not match",
                    "copy it again; if it was written under torch.serialization.set_crc32_options(False), which leaves "
                    "out checksums, save it again with them",
                )
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        named = _NAMED.search(str(error))
        raise CheckpointError(
            f"{what} is refused: "
            + (f"it names {named[1].rstrip('.,')}, which is not a tensor or plain value" if named else _first(error)),
            "import takes torch.save files that hold only tensors, dictionaries, lists, numbers and strings; "
            "save model.state_dict(), not the model",
        ) from error
    except Exception as error:  # damaged bytes can raise anything in a parser
        raise CorruptCheckpoint(
            f"{what} cannot be read: {type(error).__name__}: {_first(error)}",
            "it is damaged, or not a torch.save file",
        ) from error


def load_records(data: bytes, what: str) -> Any:
    """The metadata of a PyTorch distributed checkpoint, with every object as a :class:`Record`.

    Classes are admitted by name and replaced by inert stand-ins, so nothing that a pickle names is run, and no class of
    the process is changed.

    Raises:
        CorruptCheckpoint: it is damaged, or not such metadata.
        CheckpointError: it names anything else, which is refused.
    """
    try:
        return _Unpickler(io.BytesIO(data), what).load()
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes can raise anything in a parser
        raise CorruptCheckpoint(
            f"{what} cannot be read: {type(error).__name__}: {_first(error)}",
            "it is damaged, or not the metadata of a PyTorch distributed checkpoint",
        ) from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], what: str) -> None:
        super().__init__(file)
        self._what = what
        # For this load alone: a pickle can set attributes of the classes that it gets.
        self._stand_ins = {name: type(name[1], (Record,), {"kind": name[1]}) for name in _RECORDS}

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in self._stand_ins:
            return self._stand_ins[module, name]
        if (module, name) in _CONTAINERS:
            return _CONTAINERS[module, name]
        if (module, name) in _IGNORED:
            return lambda *_: None
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise CheckpointError(
            f"{self._what} is refused: it names {module}.{name}, which the metadata of a distributed checkpoint does "
            "not need; nothing in it was run",
            "read it with other tools only if you trust whoever wrote it",
        )


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
