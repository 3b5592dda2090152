"""A state of any Python containers, taken apart into a JSON skeleton and the tensors that it refers to.

Nothing is lost: types of containers, keys that are not strings, and the order and attributes of dictionaries come back
as they were, by the codec that writes the values of all states. Tensors go into nested dictionaries under their keys,
so that they can be found by name; one that occurs twice is stored once. Objects are taken apart by the :class:`Kind`
of their class; an object of any other class is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from outlast.checkpoint.format.json_values import Codec, UnknownKind, key_text
from outlast.checkpoint.format.kinds import Kind
from outlast.checkpoint.state.tensors import as_plain
from outlast.errors import CheckpointError

TAG = "outlast_kind"
"""Key of a JSON object that represents something other than a dictionary."""
_TENSOR, _PARAMETER = "tensor", "parameter"


@dataclass(frozen=True)
class SkeletonAndTensors:
    """A state that was taken apart."""

    skeleton: Any
    """JSON, except for floats that are not finite and very long integers."""
    tensors: dict[str, Any]
    """Nested; those that do not change before the next update."""
    changing: dict[str, Any]
    """Nested; those that may change at once."""


def take_apart(
    state: Any, where: str, kinds: Iterable[Kind], stays: Callable[[tuple[str, ...], torch.Tensor], bool]
) -> SkeletonAndTensors:
    """Take a state apart; the tensors are not copied.

    Args:
        state: whatever can be stored as a value, objects of ``kinds``, and tensors.
        where: its name, for errors.
        kinds: in addition to those of all checkpoints.
        stays: whether the tensor under these keys does not change before the next update.

    Raises:
        CheckpointError: something cannot be stored; names its keys.
    """

    def name(path: tuple[Any, ...]) -> str:
        return f"{where}: {'/'.join(map(key_text, path)) or 'the state'}"

    found = _Tensors(name, stays)
    return SkeletonAndTensors(Codec(TAG, kinds, final=False).encode(state, name, found), found.tensors, found.changing)


def put_together(
    skeleton: Any,
    tensors: Mapping[str, Any],
    changing: Mapping[str, Any],
    *,
    kinds: Iterable[Kind],
    device: torch.device,
    where: str,
) -> Any:
    """The inverse of :func:`take_apart`.

    Args:
        skeleton: of :class:`SkeletonAndTensors`.
        tensors: likewise.
        changing: likewise.
        kinds: in addition to those of all checkpoints.
        device: of the result's tensors; a tensor that is on it is not copied.
        where: the state's name, for errors.

    Raises:
        CheckpointError: the skeleton names an unknown kind, or a tensor that is missing, or is malformed.
        StateMismatch: it needs a class that this program has not imported.
    """

    def elsewhere(node: dict[str, Any]) -> torch.Tensor:
        if node[TAG] not in (_TENSOR, _PARAMETER):
            raise UnknownKind(f"a {node[TAG]!r}")
        entry: Any = changing if node["changing"] else tensors
        for key in node["at"]:
            entry = entry.get(key) if isinstance(entry, Mapping) else None
        if not isinstance(entry, torch.Tensor):
            raise CheckpointError(f"{where} refers to the tensor {'/'.join(node['at'])!r}, which is missing")
        entry = entry.to(device)
        assert isinstance(entry, torch.Tensor)
        if node[TAG] == _PARAMETER:
            return torch.nn.Parameter(entry, requires_grad=node["requires_grad"])
        return entry

    try:
        return Codec(TAG, kinds, final=False).decode(skeleton, elsewhere)
    except UnknownKind as unknown:
        raise CheckpointError(
            f"{where} holds {unknown}, which this version of outlast does not know",
            "read it with the version of outlast that wrote it",
        ) from unknown
    except (AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where} is not a state as outlast takes it apart: {type(error).__name__}: {error}"
        ) from error


class _Tensors:
    """The tensors of one state; called for each of its objects, by the codec."""

    def __init__(
        self, name: Callable[[tuple[Any, ...]], str], stays: Callable[[tuple[str, ...], torch.Tensor], bool]
    ) -> None:
        self.tensors: dict[str, Any] = {}
        self.changing: dict[str, Any] = {}
        self._name = name
        self._stays = stays
        self._seen: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._steps: dict[tuple[str, ...], dict[Any, str]] = {}

    def __call__(self, value: Any, keys: tuple[Any, ...]) -> Any:
        """The node for a tensor; NotImplemented for anything else."""
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        plain, path = as_plain(value, self._name(keys)), self._path(keys)
        stays = self._stays(path, plain)
        same = (plain.data_ptr(), plain.device, plain.dtype, plain.shape, plain.stride(), stays)
        place = self._seen.get(same) if plain.numel() else None
        if place is None:
            path = path or ("(all)",)
            _insert(self.tensors if stays else self.changing, path, plain)
            place = self._seen[same] = {"at": list(path), "changing": not stays}
        if isinstance(value, torch.nn.Parameter):
            return {TAG: _PARAMETER, **place, "requires_grad": value.requires_grad}
        return {TAG: _TENSOR, **place}

    def _path(self, keys: tuple[Any, ...]) -> tuple[str, ...]:
        """Keys as text, different for different keys of one container."""
        path: tuple[str, ...] = ()
        for key in keys:
            steps = self._steps.setdefault(path, {})
            typed = type(key), key
            if typed not in steps:
                step = key_text(key) or "(empty)"
                while step in steps.values():
                    step += "'"
                steps[typed] = step
            path = (*path, steps[typed])
        return path


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: torch.Tensor) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
