"""Folders as Hugging Face's ``save_pretrained`` writes them: weights in one file, or in shards with an index.

What ``from_pretrained`` reads of such a folder is read here: a variant if it is named, otherwise the plain names. Of
shards, all tensors are taken, each from the shard that the index names, if it names one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from outlast.checkpoint.convert.source_files import read_source
from outlast.errors import CheckpointError, CorruptCheckpoint

_INDEX_BYTES = 64 << 20
"""Of an index, at most: some hundred bytes a tensor."""


def read_folder(folder: str, stem: str, ending: str, read: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The tensors in a folder, by name.

    Args:
        folder: that holds ``STEM.ENDING``, or ``STEM.ENDING.index.json`` and the shards that it names.
        stem: ``model`` or ``pytorch_model``.
        ending: ``safetensors`` or ``bin``.
        read: reads one file.

    Raises:
        CheckpointError: there are no such files, or those of several variants; says what there is.
        CorruptCheckpoint: the index is malformed, or tensors that it names are missing.
        OSError: a file cannot be read.
    """
    names = sorted(os.listdir(folder))
    whole, index = f"{stem}.{ending}", f"{stem}.{ending}.index.json"
    if whole in names:  # from_pretrained takes it first, too
        return read(os.path.join(folder, whole))
    if index in names:
        return read_shards(folder, os.path.join(folder, index), read)
    others = [name for name in names if name.endswith((f".{ending}", ".index.json"))]
    raise CheckpointError(
        f"{folder} has neither {whole} nor {index}",
        f"pass one of its files: {', '.join(others[:9])}"
        if others
        else "pass a file, or a folder as save_pretrained writes it",
    )


def is_index(path: str) -> bool:
    """Whether a file is an index of shards, by its name."""
    return path.endswith(".json") and ".index." in os.path.basename(path)


def read_shards(folder: str, index: str, read: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The tensors of the shards that an index names; raises as :func:`read_folder` does."""
    places = _weight_map(index)
    tensors: dict[str, Any] = {}
    for shard in sorted(set(places.values())):
        path = os.path.join(folder, shard)
        if os.path.isdir(path):
            raise CheckpointError(f"{index} names the shard {shard!r}, which is a folder; refused")
        try:
            found = read(path)
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"{index} names {shard}, which is missing", "copy the whole folder") from error
        missing = [name for name, place in places.items() if place == shard and name not in found]
        if missing:
            raise CorruptCheckpoint(
                f"{path} has no tensor {missing[0]!r}, which {index} says it has ({len(missing)} such)",
                "copy the whole folder again: shards and index are of different models",
            )
        for name, tensor in found.items():
            if places.get(name, shard) != shard:
                continue
            if name in tensors:
                raise CorruptCheckpoint(f"{folder}: {name!r} is in several shards, and the index does not say in which")
            tensors[name] = tensor
    return tensors


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError if it has a key twice, since readers differ in which value counts."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return fields


def _weight_map(index: str) -> dict[str, str]:
    """The shard of each tensor."""
    data = read_source(index, _INDEX_BYTES)
    try:
        places = json.loads(data, object_pairs_hook=without_repeats)["weight_map"]
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise TypeError("weight_map is no dictionary of file names")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{index} is not an index of shards: {type(error).__name__}: {error}", "copy it again"
        ) from error
    for place in set(places.values()):
        if is_index(place):
            raise CheckpointError(f"{index} names the shard {place!r}, which is an index itself; refused")
        if place in ("", ".", "..") or os.path.basename(place) != place or "\0" in place:
            raise CheckpointError(
                f"{index} names the shard {place!r}, which is not beside it; refused", "use the files of one folder"
            )
    return dict(places)
