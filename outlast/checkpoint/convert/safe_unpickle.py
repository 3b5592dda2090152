"""Other programs' pickles, read without running anything that they name. The only file that unpickles.

outlast itself writes no pickles. Import reads ``torch.save`` files and PyTorch's distributed checkpoints, which are
pickles: the metadata of a distributed checkpoint through :func:`load_records`, archives through
``torch.load(weights_only=True)``, once :mod:`.archive_bounds` has found that nothing in one asks for more than it has.
"""

from __future__ import annotations

import pickle
from typing import IO, Any

import torch

from outlast.checkpoint.convert.archive_bounds import as_size, check_archive
from outlast.checkpoint.convert.pickle_reader import Maker, Mapping, PickleReader
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
_IGNORED = {
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("builtins", "getattr"),  # some versions of Python pickle enum members with it
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}
"""Named in the metadata but not needed: the memory format, and where the checkpoint was written."""


def load_archive(file: IO[bytes], what: str) -> Any:
    """The contents of a ``torch.save`` file: tensors on the CPU, in dictionaries, lists and plain values.

    Args:
        file: seekable, at its beginning.
        what: its name, for errors.

    Raises:
        CorruptCheckpoint: it is damaged, or not a ``torch.save`` file.
        CheckpointError: it holds more than tensors and plain values, or asks for more than it has.
    """
    try:
        check_archive(file, what)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{what} is refused: {_first(error)}",
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

    Raises:
        CorruptCheckpoint: it is damaged, or not such metadata.
        CheckpointError: it names anything else, which is refused.
    """

    def find(module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return Maker(name)
        if (module, name) in _IGNORED:
            return Maker(name, lambda *_: None)
        if (module, name) in makers:
            return makers[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise CheckpointError(
            f"{what} is refused: it names {module}.{name}, which the metadata of a distributed checkpoint does "
            "not need; nothing in it was run",
            "read it with other tools only if you trust whoever wrote it",
        )

    reader = PickleReader(data, what, find)
    makers: dict[tuple[str, str], Maker] = {
        ("torch", "Size"): Maker("Size", as_size),
        ("torch.serialization", "_get_layout"): Maker("layout", lambda name: name if type(name) is str else None),
        ("collections", "OrderedDict"): Maker("OrderedDict", Mapping),
        ("builtins", "set"): Maker("set", lambda *_: None),
    }
    return reader.read()


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
