"""Nested states as paths of keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from outlast.checkpoint.format.json_values import key_text
from outlast.checkpoint.state.containers import holds_tensor, open_container
from outlast.errors import CheckpointError


def leaves(state: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The tensors and values of a state, each with its keys as strings.

    Dictionaries are followed, and other containers if they have tensors in them; empty dictionaries are values.
    """
    opened = open_container(state) if isinstance(state, Mapping) or holds_tensor(state) else None
    for key, value in opened.items if opened is not None else state.items():
        below = (*path, key_text(key))
        follow = bool(value) if isinstance(value, Mapping) else not _is_tensor(value) and holds_tensor(value)
        if follow:
            yield from leaves(value, below)
        else:
            yield below, value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def insert(state: dict[str, Any], path: Sequence[Any], value: Any, where: str) -> None:
    """Put a value under a path of keys, and make the dictionaries that lead to it.

    Raises:
        CheckpointError: the path has a value already, or a key is not a string; names it and ``where``.
    """
    name = "/".join(map(str, path))
    if not path or not all(isinstance(key, str) for key in path):
        raise CheckpointError(
            f"{where}: {name!r} is in a list, or under a key that is not a string",
            "checkpoints hold tensors in dictionaries whose keys are strings",
        )
    node = state
    for key in path[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise CheckpointError(f"{where}: {name!r} is below {key!r}, which is a value itself")
    if path[-1] in node:
        raise CheckpointError(f"{where}: {name!r} occurs twice")
    node[path[-1]] = value
