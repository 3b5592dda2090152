"""A state of any Python containers, taken apart into a skeleton of JSON and the tensors it refers to.

Nothing is lost: types of containers, keys that are no strings, the order of dictionaries and their attributes come back
as they were. Tensors lie in nested dictionaries under the keys that led to them, so that they are found by name.
Objects are taken apart by the :class:`Kind` of their class; what has none is an error.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from outlast.checkpoint.format.dtypes import check_storable, dtype_name, dtype_of
from outlast.checkpoint.format.names import encode_key
from outlast.errors import CheckpointError

TAG = "outlast_kind"
"""Key of a JSON object that stands for something else than a dictionary."""
_RESERVED = {TAG, "outlast_float"}


@dataclass(frozen=True)
class Kind:
    """How objects of one class, not of subclasses, are taken apart, and made again."""

    name: str
    cls: type
    take: Callable[[Any], Any]
    make: Callable[[Any], Any]


@dataclass(frozen=True)
class TakenApart:
    """A state taken apart."""

    skeleton: Any
    """JSON, but for floats that are not finite."""
    tensors: dict[str, Any]
    """Nested; those that stay as they are until the next update."""
    changing: dict[str, Any]
    """Nested; those that may change at once."""


def kind_of_fields(name: str, cls: type) -> Kind:
    """The kind of a class whose objects are what their attributes say."""

    def make(fields: dict[str, Any]) -> Any:
        item: Any = object.__new__(cls)
        vars(item).update(fields)
        return item

    return Kind(name, cls, lambda item: dict(vars(item)), make)


def _dtype(name: str) -> torch.dtype:
    found = dtype_of(name)
    if found is None:
        raise CheckpointError(f"the checkpoint names a data type {name!r}", "read it with the outlast that wrote it")
    return found


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
) -> TakenApart:
    """Take a state apart; the tensors are not copied.

    Args:
        state: dictionaries, lists, what PLAIN and ``kinds`` name, tensors, strings, numbers, True, False and None.
        where: its name, for errors.
        kinds: beyond PLAIN.
        stays: whether a tensor, by the keys that lead to it, stays as it is until the next update.

    Raises:
        CheckpointError: something that cannot be stored; names the keys that lead to it.
    """
    taking = _Taking(where, (*PLAIN, *kinds), stays)
    return TakenApart(taking.value(state, ()), taking.tensors, taking.changing)


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
        skeleton: as it was.
        tensors: nested.
        changing: nested.
        kinds: beyond PLAIN.
        device: where the tensors shall be; one that is there already is not copied.
        where: the state's name, for errors.

    Raises:
        CheckpointError: the skeleton names a kind that is not known, or a tensor that is not there.
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
                f"{where} holds a {name!r}, which this outlast cannot make", "read it with the outlast that wrote it"
            )
        return makers[name](value(node["value"]))

    def tensor(node: dict[str, Any]) -> torch.Tensor:
        found: Any = changing if node["changing"] else tensors
        for key in node["at"]:
            found = found.get(key) if isinstance(found, Mapping) else None
        if not isinstance(found, torch.Tensor):
            raise CheckpointError(f"{where} refers to the tensor {'/'.join(node['at'])!r}, which is not there")
        found = found.to(device)
        return torch.nn.Parameter(found, requires_grad=node["requires_grad"]) if node[TAG] == "parameter" else found

    return value(skeleton)


class _Taking:
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
        """Its skeleton; its tensors are put where they belong."""
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
            "store tensors, numbers, strings, None, True, False, and lists, tuples, sets and dictionaries of these; of "
            "an object store what its state_dict() gives",
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
        # type(): a subclass of str would not come back as such.
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
        check_storable(value, self._name(path))
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise CheckpointError(
                f"{self._name(path)} is a {type(value).__module__}.{type(value).__qualname__}, no plain tensor",
                "store the plain tensors it consists of",
            )
        stays = self._stays(path, value)
        same = (value.data_ptr(), value.device, value.dtype, value.shape, value.stride(), stays)
        place = self._seen.get(same) if value.numel() else None
        if place is None:
            self._insert(self.tensors if stays else self.changing, path or ("(all)",), value.detach())
            place = self._seen[same] = {"at": list(path or ("(all)",)), "changing": not stays}
        if isinstance(value, torch.nn.Parameter):
            return {TAG: "parameter", **place, "requires_grad": value.requires_grad}
        return {TAG: "tensor", **place}

    def _insert(self, tree: dict[str, Any], path: tuple[str, ...], value: torch.Tensor) -> None:
        for key in path:
            encode_key(key)  # raises here, where the name is known to be too long for a file
        for key in path[:-1]:
            tree = tree.setdefault(key, {})
        if path[-1] in tree:
            raise CheckpointError(f"{self._name(path)}: two tensors have this name", "rename a key")
        tree[path[-1]] = value

    @contextmanager
    def _once(self, value: object, path: tuple[str, ...]) -> Iterator[None]:
        """What holds itself has no end."""
        if id(value) in self._inside:
            raise CheckpointError(f"{self._name(path)} holds itself", "store a tree")
        self._inside.add(id(value))
        try:
            yield
        finally:
            self._inside.discard(id(value))

    def _name(self, path: tuple[str, ...]) -> str:
        return f"{self._where}: {'/'.join(path) or 'the state'}"
