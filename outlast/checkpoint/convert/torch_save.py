"""Files of ``torch.save``."""

from __future__ import annotations

import os
from typing import Any

import torch

from outlast.checkpoint.convert.hugging_face import is_index, read_folder, read_shards
from outlast.checkpoint.convert.loadable import check_loadable
from outlast.checkpoint.convert.safe_unpickle import load_archive
from outlast.checkpoint.convert.source_files import open_source
from outlast.errors import CheckpointError


def write(state: dict[str, Any], path: str, step: int) -> list[str]:
    """Write a nested state to a new file that ``torch.load(weights_only=True)`` reads; durable on return.

    Returns:
        Names of what is left out: always empty.

    Raises:
        CheckpointError: PyTorch would not read something back; names it.
        OSError, RuntimeError: the file cannot be written.
    """
    del step
    check_loadable(state, "torch")
    with open(path, "xb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return []


def read(path: str) -> dict[str, Any]:
    """The nested state in a file.

    Args:
        path: of a file, of a folder with ``pytorch_model.bin`` or its shards, or of the index in one.

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: it is damaged, in another format, or holds more than tensors and plain values.
    """
    if os.path.isdir(path):
        return read_folder(path, "pytorch_model", "bin", read)
    if is_index(path):
        return read_shards(os.path.dirname(path), path, read)
    with open_source(path) as file:
        state = load_archive(file, path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}", "import takes a dictionary of tensors")
    return state
