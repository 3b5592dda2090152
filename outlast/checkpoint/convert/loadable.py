"""What PyTorch reads back without running what a file names: exports in its formats hold nothing else."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import torch

from outlast.checkpoint.format.json_values import key_text
from outlast.errors import CheckpointError

_DICTIONARIES = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple, set, torch.Size)
_VALUES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    torch.Tensor,
    torch.dtype,
    torch.device,
    torch.layout,
)


def is_loadable(value: Any) -> bool:
    """Whether a tensor or value can be read back."""
    try:
        check_loadable(value, "")
    except CheckpointError:
        return False
    return True


def check_loadable(value: Any, format: str, name: str = "") -> None:
    """Raise :class:`CheckpointError`, naming the value, unless all of a state can be read back.

    Args:
        value: the state.
        format: for the message.
        name: of the value.
    """
    cls = type(value)
    if cls in _DICTIONARIES:
        for key, item in value.items():
            below = f"{name}/{key_text(key)}" if name else key_text(key)
            check_loadable(key, format, f"a key of {name or 'the state'}")
            check_loadable(item, format, below)
    elif cls in _SEQUENCES:
        for index, item in enumerate(value):
            check_loadable(item, format, f"{name}/{index}")
    elif cls not in _VALUES:
        raise CheckpointError(
            f"{name!r} is a {cls.__module__}.{cls.__qualname__}, which PyTorch does not read back from a {format} file "
            "without running what it names",
            "export as safetensors, or only a part of the state with --part",
        )
