"""Nested states as paths of keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from outlast.errors import CheckpointError


def leaves(state: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values that are not dictionaries, and empty dictionaries, each with its keys as strings."""
    for key, value in state.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


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
