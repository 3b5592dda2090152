"""The state to save as a tree: groups with attributes, and tensors at their paths."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from outlast.checkpoint.format.json_values import to_json
from outlast.checkpoint.format.names import HEADER, encode_key
from outlast.checkpoint.state.boxes import ShardLayout
from outlast.checkpoint.state.dtensor import Meshes, is_dtensor, local_part
from outlast.checkpoint.state.matching import Mismatch, TensorType
from outlast.checkpoint.state.mismatch_text import mismatch_error
from outlast.checkpoint.state.tensors import as_plain
from outlast.errors import CheckpointError


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

    A top-level dictionary, and any that contains a tensor or an integer key, becomes a group; every other value becomes
    an attribute of its group. Below the top level, keys of tensors and dictionaries may be integers, as in an
    optimizer's state.

    Args:
        tree: that the state is added to.
        state: nested.
        prefix: a path relative to the step.
        eager: top-level keys whose tensors are copied before the save returns.
        meshes: of the DTensors; None if DTensors are not allowed.

    Raises:
        CheckpointError: a key or value that cannot be stored, a tensor's dtype, or a DTensor's placement; names it.
    """
    _group(tree, state, prefix, prefix, meshes, top=True, eager=False, eager_keys=eager)


def _group(
    tree: StateTree,
    state: Mapping[Any, Any],
    path: str,
    name: str,
    meshes: Meshes | None,
    *,
    top: bool,
    eager: bool,
    eager_keys: Collection[str],
) -> None:
    attributes: dict[Any, Any] = {}  # all keys of leaves are strings
    tree.groups[path] = attributes
    for key, value in state.items():
        child_name = f"{name}/{key}" if name else str(key)
        child_eager = eager or (top and key in eager_keys)
        is_group = isinstance(value, Mapping) and (top or _needs_group(value) or not isinstance(key, str))
        is_leaf = not is_group and not isinstance(value, torch.Tensor)
        if not isinstance(key, str) and (top or is_leaf or type(key) is not int):
            raise CheckpointError(f"the state at {name or 'the top'!r} has the key {key!r}", "keys must be strings")
        if is_leaf:
            if not path and key == HEADER:
                raise CheckpointError(f"{HEADER!r} is a reserved key of the replicated state", "use another key")
            attributes[key] = to_json(value, child_name)
            continue
        child = child_path(path, key)
        if is_group:
            _group(tree, value, child, child_name, meshes, top=False, eager=child_eager, eager_keys=())
        elif is_dtensor(value) and meshes is not None:
            part = as_plain(local_part(value, child_name), child_name)
            tree.items.append(
                TensorEntry(child, child_name, part, child_eager, meshes.spread(value, child_name), value)
            )
        else:
            tree.items.append(TensorEntry(child, child_name, as_plain(value, child_name), child_eager))


def child_path(path: str, key: str | int) -> str:
    """The path of a key's value in the group at ``path``."""
    component = encode_key(key, at_root=not path)
    return f"{path}/{component}" if path else component


def _needs_group(value: Mapping[Any, Any]) -> bool:
    """Whether it contains a tensor or an integer key, which JSON does not have."""
    return any(
        isinstance(item, torch.Tensor) or type(key) is int or (isinstance(item, Mapping) and _needs_group(item))
        for key, item in value.items()
    )


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


def tensors_of(state: Mapping[Any, Any], path: str = "", name: str = "") -> Iterator[tuple[str, str, torch.Tensor]]:
    """The tensors of a nested state: path relative to the step, name, tensor."""
    for key, value in state.items():
        child_name = f"{name}/{key}" if name else str(key)
        if isinstance(value, torch.Tensor):
            yield child_path(path, key), child_name, value
        elif isinstance(value, Mapping):
            yield from tensors_of(value, child_path(path, key), child_name)
