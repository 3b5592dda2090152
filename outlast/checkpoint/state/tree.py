"""The state to save as a tree: groups with attributes, and tensors at their paths."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from outlast.checkpoint.format.json_values import DICTIONARIES, MAX_DEPTH, key_text, to_json
from outlast.checkpoint.format.kinds import CannotStore
from outlast.checkpoint.format.names import CONTAINER, HEADER
from outlast.checkpoint.state.boxes import ShardLayout
from outlast.checkpoint.state.containers import Opened, holds_tensor, open_container
from outlast.checkpoint.state.dtensor import Meshes, is_dtensor, local_part
from outlast.checkpoint.state.keys import attribute_name, component, encoded_key
from outlast.checkpoint.state.matching import Mismatch, TensorType
from outlast.checkpoint.state.mismatch_text import mismatch_error
from outlast.checkpoint.state.tensors import as_plain
from outlast.checkpoint.state.wrappers import is_wrapper
from outlast.errors import CheckpointError

_MAX_PATH_BYTES = 3000
"""Of the keys that lead to a tensor, as path components: file systems allow 4096 in all."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the state."""

    path: str
    """Its array's path relative to the step."""
    name: str
    """As the user knows it: keys joined by ``/``."""
    tensor: torch.Tensor
    """The whole tensor, or this rank's part of a DTensor."""
    eager: bool
    """Whether to copy it before the save returns."""
    spread: ShardLayout | None = None
    """Of a DTensor: its shards."""
    dtensor: torch.Tensor | None = None
    """The DTensor itself: a change of it raises its own ``_version``, not that of the part."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.spread.shape if self.spread else tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * self.tensor.itemsize


@dataclass
class StateTree:
    """One rank's state."""

    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Attributes (JSON) by the group's path relative to the step; the root is ``""``."""
    items: list[TensorEntry] = field(default_factory=list)


def lay_out(
    tree: StateTree, state: Mapping[str, Any], prefix: str, eager: Collection[str], meshes: Meshes | None = None
) -> None:
    """Add a nested state to a tree, under the group ``prefix``.

    A top-level dictionary, and any container that has a tensor in it, becomes a group; every other value becomes an
    attribute of its group. What JSON does not tell of a container is in the group's attribute ``outlast_container``.

    Args:
        tree: that the state is added to.
        state: nested.
        prefix: a path relative to the step.
        eager: top-level keys whose tensors are copied before the save returns.
        meshes: of the DTensors; None if DTensors are not allowed.

    Raises:
        CheckpointError: a key or value that cannot be stored, a tensor without memory, its dtype, or a DTensor's
            placement; names it.
    """
    for key in state:
        if type(key) is not str:
            raise CheckpointError(
                f"the state has the key {key!r} at the top", "keys must be strings there; below, any will do"
            )
        if key == HEADER and not prefix:
            raise CheckpointError(f"{HEADER!r} is a reserved key of the replicated state", "use another key")
    shape = Opened({"type": "dict"}, [*state.items()])
    _Layout(tree, meshes).group(shape, prefix, prefix, 0, lambda key: key in eager)


class _Layout:
    """One walk through a state."""

    def __init__(self, tree: StateTree, meshes: Meshes | None) -> None:
        self._tree = tree
        self._meshes = meshes

    def group(self, opened: Opened, path: str, name: str, depth: int, eager: Callable[[Any], bool]) -> None:
        try:
            self._group(opened, path, name, depth, eager)
        except CannotStore as refused:
            raise CheckpointError(f"the state at {name!r} {refused.what}", refused.fix) from refused

    def _group(self, opened: Opened, path: str, name: str, depth: int, eager: Callable[[Any], bool]) -> None:
        attributes: dict[str, Any] = {}
        self._tree.groups[path] = attributes
        for key, item in opened.items:
            child_name = f"{name}/{key_text(key)}" if name else key_text(key)
            if isinstance(item, torch.Tensor) and not is_wrapper(item):
                self._tensor(item, child_path(path, key), child_name, eager(key))
            elif (depth == 0 and type(item) in DICTIONARIES) or holds_tensor(item):
                self._below(item, child_path(path, key), child_name, depth + 1, eager(key))
            else:
                attributes[attribute_name(key)] = to_json(item, child_name)
        odd = [component(key) for key, _ in opened.items if type(key) is not str and type(key) is not int]
        if len(set(odd)) < len(odd):
            raise CannotStore("has two keys that cannot be told apart, as two NaNs cannot", "use other keys")
        shape = dict(opened.shape)
        if not opened.numbered:
            shape["keys"] = [encoded_key(key) for key, _ in opened.items]
        if opened.attributes:
            shape["attributes"] = to_json(opened.attributes, f"{name}/(attributes)")
        attributes[CONTAINER] = shape

    def _below(self, item: Any, path: str, name: str, depth: int, eager: bool) -> None:
        if depth > MAX_DEPTH or len(path) > _MAX_PATH_BYTES:
            raise CheckpointError(
                f"the state at {name[:200]!r}... contains itself, or is nested too deep ({depth} levels, {len(path)} "
                "bytes of keys)",
                f"store a tree of at most {MAX_DEPTH} levels and {_MAX_PATH_BYTES} bytes of keys to a tensor",
            )
        try:
            opened = open_container(item)
        except CannotStore as refused:
            raise CheckpointError(f"the state at {name!r} {refused.what}", refused.fix) from refused
        assert opened is not None, f"{name} holds a tensor"
        self.group(opened, path, name, depth, lambda key: eager)

    def _tensor(self, value: torch.Tensor, path: str, name: str, eager: bool) -> None:
        if is_dtensor(value) and self._meshes is not None:
            part = as_plain(local_part(value, name), name)
            entry = TensorEntry(path, name, part, eager, self._meshes.spread(value, name), value)
        else:
            entry = TensorEntry(path, name, as_plain(value, name), eager)
        self._tree.items.append(entry)


def child_path(path: str, key: Any) -> str:
    """The path of a key's value in the group at ``path``."""
    name = component(key, at_root=not path)
    return f"{path}/{name}" if path else name


def check_like(saved: Mapping[str, Any], running: Mapping[str, Any]) -> None:
    """Check that a restored state has the running one's tensors; other values are not compared.

    Args:
        saved: nested, as :meth:`Checkpointer.restore` returned it.
        running: nested, e.g. ``{"model": model.state_dict()}``; tensors may be on any device, or meta.

    Raises:
        StateMismatch: names the tensors that are missing, unexpected, or differ in shape or dtype.
    """
    have, want = (
        {name: TensorType(tuple(tensor.shape), tensor.dtype) for _, name, tensor in tensors_of(state)}
        for state in (saved, running)
    )
    names = dict.fromkeys([*have, *want])
    differ = [Mismatch(name, have.get(name), want.get(name)) for name in names if have.get(name) != want.get(name)]
    if differ:
        raise mismatch_error(differ, have, want)


def tensors_of(
    state: Mapping[Any, Any], wrappers: dict[str, tuple[str, torch.Tensor]] | None = None
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """The tensors of a nested state: path relative to the step, name, tensor; of wrappers their inner tensors.

    Args:
        state: nested.
        wrappers: gets the wrappers, with their names, by path.

    Raises:
        CheckpointError: a container or wrapper that could not have been saved; names it.
    """
    wrappers = {} if wrappers is None else wrappers
    return _tensors_of([*state.items()], "", "", wrappers, 0)


def _tensors_of(
    items: Iterable[tuple[Any, Any]], path: str, name: str, wrappers: dict[str, tuple[str, torch.Tensor]], depth: int
) -> Iterator[tuple[str, str, torch.Tensor]]:
    for key, value in items:
        is_tensor = isinstance(value, torch.Tensor)
        if not is_tensor and not holds_tensor(value):
            continue
        child_name = f"{name}/{key_text(key)}" if name else key_text(key)
        try:
            below = child_path(path, key)
        except CannotStore as refused:
            raise CheckpointError(f"the state at {name!r} {refused.what}", refused.fix) from refused
        if is_tensor and not is_wrapper(value):
            yield below, child_name, value
            continue
        if is_tensor:
            wrappers[below] = child_name, value
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{child_name[:200]!r}... is nested deeper than {MAX_DEPTH} levels", "use a tree")
        try:
            opened = open_container(value)
        except CannotStore as refused:
            raise CheckpointError(f"{child_name!r} {refused.what}", refused.fix) from refused
        assert opened is not None, f"{child_name} holds a tensor"
        yield from _tensors_of(opened.items, below, child_name, wrappers, depth + 1)
