"""Nested states as paths of keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from outlast.errors import CheckpointError


def leaves(state: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What is no dictionary, and empty dictionaries, with the keys that lead there, as text."""
    for key, value in state.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def insert(state: dict[str, Any], path: Sequence[Any], value: Any, where: str) -> None:
    """Put a value at the end of a path of keys; dictionaries on the way are made.

    Raises:
        CheckpointError: something is there already, or a key is no string; names it and ``where``.
    """
    name = "/".join(map(str, path))
    if not path or not all(isinstance(key, str) for key in path):
        raise CheckpointError(
            f"{where}: {name!r} stands in a list, or under a key that is no string",
            "checkpoints hold tensors in dictionaries whose keys are strings",
        )
    node = state
    for key in path[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise CheckpointError(f"{where}: {name!r} stands below {key!r}, which is a value of its own")
    if path[-1] in node:
        raise CheckpointError(f"{where}: {name!r} stands there twice")
    node[path[-1]] = value
