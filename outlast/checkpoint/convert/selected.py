"""A part of a state, under other names, in another precision, or without what a format cannot hold.

What is taken, and how it is called, means the same as in a restore
(:class:`~outlast.checkpoint.state.selection.Selection`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, MutableMapping
from typing import Any

import torch

from outlast.checkpoint.format.dtypes import check_storable
from outlast.checkpoint.format.json_values import to_json
from outlast.checkpoint.format.kinds import CannotStore
from outlast.checkpoint.state.containers import close_container, holds_tensor, open_container
from outlast.checkpoint.state.keys import component, is_plain
from outlast.checkpoint.state.matched import LEFT_OUT, Matched
from outlast.checkpoint.state.matching import TensorType
from outlast.checkpoint.state.nested import leaves
from outlast.checkpoint.state.selection import Selection
from outlast.checkpoint.state.tree import child_path, tensors_of
from outlast.errors import CheckpointError


def select(state: dict[str, Any], selection: Selection, where: str) -> dict[str, Any]:
    """What is selected of a state, with the names and types that are asked for.

    Args:
        state: nested; changed.
        selection: without a running state.
        where: what the state is of, for errors.

    Raises:
        CheckpointError: it does not have one of the parts; names what it has.
        StateMismatch: two tensors would have one name, or an element is too large for its new type; names it.
    """
    check_parts(state, selection, where)
    if selection.takes_all:
        return state
    state = {key: value for key, value in state.items() if selection.parts is None or key in selection.parts}
    types = {path: TensorType(tuple(tensor.shape), tensor.dtype) for path, _, tensor in tensors_of(state)}
    matched = Matched(types, None, selection)
    odd_keys: dict[str, Any] = {}

    def change(path: str, key: Any, value: Any) -> Any:
        if not is_plain(key):
            odd_keys[component(key)] = key
        if path in matched.left_out:
            return LEFT_OUT
        return matched.converted(path, value) if isinstance(value, torch.Tensor) else value

    _change(state, "", change)
    matched.arrange(state, odd_keys)
    return state


def check_parts(found: Collection[str], selection: Selection, where: str) -> None:
    """Raise :class:`CheckpointError` unless there are all parts that are selected by name."""
    missing = sorted((selection.parts or frozenset()) - set(found))
    if missing:
        parts = ", ".join(str(key)[:80] for key in list(found)[:30])
        raise CheckpointError(f"{where} has no part {', '.join(map(repr, missing))}", f"its parts: {parts or 'none'}")


def fitting(state: dict[str, Any], holds: Callable[[Any], bool]) -> tuple[dict[str, Any], list[str]]:
    """A state without what a format does not hold, and the names of that.

    In lists and tuples, None is in its place; a container that cannot be opened is left out whole.

    Args:
        state: nested; changed.
        holds: whether a value, or a tensor, can be in the format.
    """
    left = ["/".join(path) for path, value in leaves(state) if not holds(value)]
    if left:
        _drop(state, holds)
    return state, left


def storable(value: Any) -> bool:
    """Whether a step can hold a tensor or a value."""
    try:
        if isinstance(value, torch.Tensor):
            check_storable(value, "")
        else:
            to_json(value, "")
    except (CheckpointError, CannotStore):
        return False
    return True


def _change(container: MutableMapping[Any, Any], path: str, change: Callable[[str, Any, Any], Any]) -> None:
    for key, value in list(container.items()):
        if holds_tensor(value):
            below = child_path(path, key)
            container[key] = change(below, key, _opened(value, below, change))


def _opened(value: Any, path: str, change: Callable[[str, Any, Any], Any]) -> Any:
    """A value after the changes in it."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, MutableMapping):
        _change(value, path, change)
        return value
    opened = open_container(value)
    if opened is None:
        return value
    items = dict(opened.items)
    _change(items, path, change)
    return close_container(opened.shape, items, None, stand_ins=True)


def _drop(container: MutableMapping[Any, Any], holds: Callable[[Any], bool]) -> None:
    for key, value in list(container.items()):
        if isinstance(value, MutableMapping) and value:
            _drop(value, holds)
        elif not isinstance(value, torch.Tensor) and holds_tensor(value) and (opened := open_container(value)):
            items = dict(opened.items)
            _drop(items, holds)
            kept = {number: items.get(number) for number, _ in opened.items}
            container[key] = close_container(opened.shape, kept, None, stand_ins=True)
        elif not holds(value):
            del container[key]
