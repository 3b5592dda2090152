"""A state of any Python containers, taken apart into a JSON skeleton and the tensors that it refers to.

Nothing is lost: types of containers, keys that are not strings, and the order and attributes of dictionaries come back
as they were. Tensors go into nested dictionaries under their keys, so that they can be found by name. Objects are taken
apart by the :class:`Kind` of their class; an object of any other class is an error.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from outlast.checkpoint.format.dtypes import dtype_name, dtype_of
from outlast.checkpoint.format.names import encode_key
from outlast.checkpoint.state.tensors import as_plain
from outlast.errors import CheckpointError

TAG = "outlast_kind"
"""Key of a JSON object that represents something other than a dictionary."""
_RESERVED = {TAG, "outlast_float"}


@dataclass(frozen=True)
class Kind:
    """How objects of one class, not of its subclasses, are taken apart and made again."""

    name: str
    cls: type
    take: Callable[[Any], Any]
    make: Callable[[Any], Any]


@dataclass(frozen=True)
class SkeletonAndTensors:
    """A state that was taken apart."""

    skeleton: Any
    """JSON, except for floats that are not finite."""
    tensors: dict[str, Any]
    """Nested; those that do not change before the next update."""
    changing: dict[str, Any]
    """Nested; those that may change at once."""


def kind_of_fields(name: str, cls: type) -> Kind:
    """The kind of a class whose objects are fully described by their attributes."""

    def make(fields: dict[str, Any]) -> Any:
        item: Any = object.__new__(cls)
        vars(item).update(fields)
        return item

    return Kind(name, cls, lambda item: dict(vars(item)), make)


def _dtype(name: str) -> torch.dtype:
    dtype = dtype_of(name)
    if dtype is None:
        raise CheckpointError(
            f"the checkpoint has the unknown dtype {name!r}", "read it with the version of outlast that wrote it"
        )
    return dtype


PLAIN: tuple[Kind, ...] = (
    Kind("tuple", tuple, list, tuple),
    Kind("set", set, list, set),
    Kind("frozenset", frozenset, list, frozenset),
    Kind("torch.Size", torch.Size, list, torch.Size),
    Kind("torch.dtype", torch.dtype, dtype_name, _dtype),
    Kind("torch.device", torch.device, str, torch.device),
)
_DICTIONARIES: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


def take_apart(
    state: Any, where: str, kinds: Iterable[Kind], stays: Callable[[tuple[str, ...], torch.Tensor], bool]
) -> SkeletonAndTensors:
    """Take a state apart; the tensors are not copied.

    Args:
        state: dictionaries, lists, objects of PLAIN and ``kinds``, tensors, strings, numbers, True, False and None.
        where: its name, for errors.
        kinds: in addition to PLAIN.
        stays: whether the tensor under these keys does not change before the next update.

    Raises:
        CheckpointError: something cannot be stored; names its keys.
    """
    walk = _Walk(where, (*PLAIN, *kinds), stays)
    return SkeletonAndTensors(walk.value(state, ()), walk.tensors, walk.changing)


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
        kinds: in addition to PLAIN.
        device: of the result's tensors; a tensor that is on it is not copied.
        where: the state's name, for errors.

    Raises:
        CheckpointError: the skeleton names an unknown kind, or a tensor that is missing.
    """
    makers = {kind.name: kind.make for kind in (*PLAIN, *kinds)}

    def value(node: Any) -> Any:
        if isinstance(node, list):
            return [value(item) for item in node]
        if not isinstance(node, dict):
            return node
        if TAG not in node:
            return {key: value(item) for key, item in node.items()}
        name = node[TAG]
        if name in ("tensor", "parameter"):
            return tensor(node)
        if name in _DICTIONARIES:
            pairs = node["items"].items() if "items" in node else ((value(k), v) for k, v in node["pairs"])
            made = _DICTIONARIES[name]()
            made.update({key: value(item) for key, item in pairs})
            if "attributes" in node:
                vars(made).update(value(node["attributes"]))
            return made
        if name not in makers:
            raise CheckpointError(
                f"{where} holds a {name!r}, which this version of outlast does not know",
                "read it with the version of outlast that wrote it",
            )
        return makers[name](value(node["value"]))

    def tensor(node: dict[str, Any]) -> torch.Tensor:
        entry: Any = changing if node["changing"] else tensors
        for key in node["at"]:
            entry = entry.get(key) if isinstance(entry, Mapping) else None
        if not isinstance(entry, torch.Tensor):
            raise CheckpointError(f"{where} refers to the tensor {'/'.join(node['at'])!r}, which is missing")
        entry = entry.to(device)
        return torch.nn.Parameter(entry, requires_grad=node["requires_grad"]) if node[TAG] == "parameter" else entry

    return value(skeleton)


class _Walk:
    """One walk through a state, which collects its tensors."""

    def __init__(
        self, where: str, kinds: Iterable[Kind], stays: Callable[[tuple[str, ...], torch.Tensor], bool]
    ) -> None:
        self.tensors: dict[str, Any] = {}
        self.changing: dict[str, Any] = {}
        self._where = where
        self._kinds = {kind.cls: kind for kind in kinds}
        self._stays = stays
        self._inside: set[int] = set()
        self._seen: dict[tuple[Any, ...], dict[str, Any]] = {}

    def value(self, value: Any, path: tuple[str, ...]) -> Any:
        """The skeleton of a value; its tensors are collected."""
        cls = type(value)
        if value is None or cls in (bool, int, float, str):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        with self._once(value, path):
            if cls is list:
                return [self.value(item, (*path, str(index))) for index, item in enumerate(value)]
            for name, dictionary in _DICTIONARIES.items():
                if cls is dictionary:
                    return self._dictionary(name, value, path)
            if cls in self._kinds:
                kind = self._kinds[cls]
                return {TAG: kind.name, "value": self.value(kind.take(value), path)}
        raise CheckpointError(
            f"{self._name(path)} is a {cls.__module__}.{cls.__qualname__}, which cannot be stored",
            "store tensors, numbers, strings, None, True, False, and lists, tuples, sets and dictionaries of these; "
            "for an object store its state_dict()",
        )

    def _dictionary(self, name: str, value: dict[Any, Any], path: tuple[str, ...]) -> Any:
        used: set[str] = set()
        below = []
        for key, item in value.items():
            step = key if isinstance(key, str) else str(key) if type(key) is int else repr(key)
            step = step or "(empty)"
            while step in used:
                step += "'"
            used.add(step)
            below.append((key, self.value(item, (*path, step))))
        # A subclass of str would not come back as such.
        plain = all(type(key) is str and key not in _RESERVED for key in value)
        attributes = dict(getattr(value, "__dict__", {}))
        if plain and name == "dict":
            return dict(below)
        made: dict[str, Any] = {TAG: name}
        if plain:
            made["items"] = dict(below)
        else:
            made["pairs"] = [[self.value(key, (*path, "(key)")), item] for key, item in below]
        if attributes:
            made["attributes"] = self.value(attributes, (*path, "(attributes)"))
        return made

    def _tensor(self, value: torch.Tensor, path: tuple[str, ...]) -> dict[str, Any]:
        plain = as_plain(value, self._name(path))
        stays = self._stays(path, plain)
        same = (plain.data_ptr(), plain.device, plain.dtype, plain.shape, plain.stride(), stays)
        place = self._seen.get(same) if plain.numel() else None
        if place is None:
            self._insert(self.tensors if stays else self.changing, path or ("(all)",), plain)
            place = self._seen[same] = {"at": list(path or ("(all)",)), "changing": not stays}
        if isinstance(value, torch.nn.Parameter):
            return {TAG: "parameter", **place, "requires_grad": value.requires_grad}
        return {TAG: "tensor", **place}

    def _insert(self, tree: dict[str, Any], path: tuple[str, ...], value: torch.Tensor) -> None:
        for key in path:
            encode_key(key)  # a name that is too long for a file is an error here, where its keys are known
        for key in path[:-1]:
            tree = tree.setdefault(key, {})
        if path[-1] in tree:
            raise CheckpointError(f"{self._name(path)}: two tensors have this name", "rename one of the keys")
        tree[path[-1]] = value

    @contextmanager
    def _once(self, value: object, path: tuple[str, ...]) -> Iterator[None]:
        """Raise if a value contains itself: the walk would not end."""
        if id(value) in self._inside:
            raise CheckpointError(f"{self._name(path)} contains itself", "store a tree")
        self._inside.add(id(value))
        try:
            yield
        finally:
            self._inside.discard(id(value))

    def _name(self, path: tuple[str, ...]) -> str:
        return f"{self._where}: {'/'.join(path) or 'the state'}"
