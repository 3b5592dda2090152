"""Values of the state as JSON: exact, strict JSON, nothing converted silently.

Numbers keep their value bit for bit (Python writes the shortest text that reads back as the same float). What JSON does
not have is an object with one of three keys: ``{"outlast_float": "NaN"}`` and the infinities, ``{"outlast_tuple":
[...]}``, and ``{"outlast_type": KIND, ...}`` for all other types. A value of a type that is not known is an error.
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import numpy as np
import torch

from outlast.checkpoint.format.classes import (
    ENUM,
    NAMED_TUPLE,
    Unloaded,
    is_named_tuple,
    make_member,
    make_named_tuple,
    take_member,
    take_named_tuple,
)
from outlast.checkpoint.format.kinds import PLAIN, CannotStore, Kind, make_scalar, take_scalar
from outlast.errors import CheckpointError

TAG = "outlast_type"
_ODD = "outlast_float"
_TUPLE = "outlast_tuple"
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_SCALAR = "numpy.scalar"
_INT = "int"
_INT_BITS = 4096
"""Longer integers are written in hexadecimal: Python refuses to read them in decimal."""
MAX_DEPTH = 100
"""Of containers in one another."""
DICTIONARIES: dict[type, str] = {
    dict: "dict",
    OrderedDict: "OrderedDict",
    Counter: "Counter",
    defaultdict: "defaultdict",
}
_FACTORIES: dict[str, Any] = {
    cls.__name__: cls for cls in (int, float, complex, bool, str, bytes, list, tuple, set, dict, OrderedDict, Counter)
}
Path = tuple[Any, ...]
"""Keys and indices from the top of a value."""
Elsewhere = Callable[[Any, Path], Any]
"""The JSON for an object that is stored elsewhere, a tensor for example; NotImplemented for any other."""


def key_text(key: Any) -> str:
    """A key for people."""
    try:
        return str(key)
    except ValueError:  # an integer too long for decimal digits, somewhere in it
        return f"({type(key).__name__})"


class UnknownKind(Exception):
    """JSON that names a kind of value which this version does not know."""


def to_json(value: object, where: str) -> Any:
    """A copy of ``value`` that :func:`json.dumps` writes as strict JSON.

    Args:
        value: see the module.
        where: its name, for errors.

    Raises:
        CheckpointError: something could not be given back as it was; names it.
    """
    return VALUES.encode(value, lambda path: f"the state at {'/'.join([where, *map(key_text, path)])!r}")


def from_json(value: Any, *, stand_ins: bool = False) -> Any:
    """The inverse of :func:`to_json`.

    Args:
        value: what it returned.
        stand_ins: for objects of classes that are not loaded, return an :class:`Unloaded`.

    Raises:
        StateMismatch: the value needs a class that is not loaded, or that has changed.
        UnknownKind: a later version wrote it.
        LookupError, RecursionError, RuntimeError, TypeError, ValueError: :func:`to_json` did not write it.
    """
    return VALUES.decode(value, stand_ins=stand_ins)


class Codec:
    """One way to write values as JSON.

    Args:
        tag: key of the objects that stand for what JSON does not have.
        kinds: in addition to PLAIN.
        final: whether the result is written as it is; without this, floats, integers and tuples are left to another
            codec.
    """

    def __init__(self, tag: str, kinds: Iterable[Kind] = (), *, final: bool = True) -> None:
        self._tag = tag
        self._final = final
        self._reserved = {tag, _ODD, _TUPLE} if final else {tag}
        self._kinds = {kind.cls: kind for kind in (*PLAIN, *kinds)}
        self._makers = {kind.name: kind.make for kind in self._kinds.values()}

    def encode(self, value: Any, name: Callable[[Path], str], elsewhere: Elsewhere | None = None) -> Any:
        """The JSON of a value.

        Args:
            value: any.
            name: the name of a part of it, for errors.
            elsewhere: asked first for each object that is not a string, a number, True, False or None.

        Raises:
            CheckpointError: a part cannot be stored; names it.
        """
        return _Encoding(self, name, elsewhere).value(value)

    def decode(
        self, value: Any, elsewhere: Callable[[dict[str, Any]], Any] | None = None, *, stand_ins: bool = False
    ) -> Any:
        """The inverse of :meth:`encode`; raises as :func:`from_json` does.

        Args:
            value: JSON.
            elsewhere: makes the object of each node that is of no kind.
            stand_ins: see :func:`from_json`.
        """
        if isinstance(value, list):
            return [self.decode(item, elsewhere, stand_ins=stand_ins) for item in value]
        if not isinstance(value, dict):
            return value

        def inner(item: Any) -> Any:
            return self.decode(item, elsewhere, stand_ins=stand_ins)

        if self._tag not in value:
            if len(value) == 1 and self._final:
                if _ODD in value:
                    return _WORDS[value[_ODD]]
                if _TUPLE in value:
                    return tuple(inner(value[_TUPLE]))
            return {key: inner(item) for key, item in value.items()}
        kind = value[self._tag]
        if kind in DICTIONARIES.values():
            return self._make_dictionary(kind, value, inner)
        if kind == ENUM:
            return make_member(value, stand_in=stand_ins)
        if kind == NAMED_TUPLE:
            return make_named_tuple(value, inner(value["items"]), stand_in=stand_ins)
        if kind == _SCALAR:
            return make_scalar(value["value"])
        if kind == _INT:
            return int(value["value"], 16)
        if kind in self._makers:
            return self._makers[kind](inner(value["value"]))
        if elsewhere is not None:
            return elsewhere(value)
        raise UnknownKind(f"a value of the kind {kind!r}")

    def _make_dictionary(self, kind: str, node: dict[str, Any], inner: Callable[[Any], Any]) -> Any:
        pairs: Any = node["items"].items() if "items" in node else ((inner(key), item) for key, item in node["pairs"])
        made = new_dictionary(kind, node)
        # update() of a Counter adds.
        for key, item in pairs:
            dict.__setitem__(made, key, inner(item)) if kind != "OrderedDict" else made.__setitem__(key, inner(item))
        set_attributes(made, inner(node.get("attributes", {})))
        return made


def new_dictionary(kind: str, node: dict[str, Any]) -> Any:
    """An empty dictionary of a kind; raises LookupError."""
    if kind == "defaultdict":
        factory = node["factory"]
        return defaultdict(None if factory is None else _FACTORIES[factory])
    return {name: cls for cls, name in DICTIONARIES.items()}[kind]()


def describe_dictionary(value: dict[Any, Any]) -> dict[str, Any]:
    """What belongs to a dictionary besides its items: nothing, or the factory of a default; raises CannotStore."""
    if type(value) is not defaultdict:
        return {}
    factory: Any = value.default_factory
    name = None if factory is None else getattr(factory, "__name__", "")
    if factory is not None and _FACTORIES.get(str(name)) is not factory:
        raise CannotStore(
            f"is a defaultdict with the factory {factory!r}", f"store dict(value); factories: {', '.join(_FACTORIES)}"
        )
    return {"factory": name}


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes that were set on a dictionary, as ``Module.state_dict`` sets ``_metadata``."""
    return dict(getattr(value, "__dict__", {}))


def set_attributes(made: Any, attributes: dict[str, Any]) -> None:
    """Set attributes that :func:`attributes_of` gave; raises ValueError for one that would hide a method."""
    for name, value in attributes.items():
        if not isinstance(name, str) or hasattr(type(made), name):
            raise ValueError(f"the attribute {name!r} of a {type(made).__name__}")
        vars(made)[name] = value


class _Encoding:
    """One walk through a value."""

    def __init__(self, codec: Codec, name: Callable[[Path], str], elsewhere: Elsewhere | None) -> None:
        self._codec = codec
        self._name = name
        self._elsewhere = elsewhere
        self._path: list[Any] = []
        self._inside: set[int] = set()

    def value(self, value: Any) -> Any:
        cls = type(value)
        if value is None or cls is bool or cls is str:
            return value
        if cls is int:
            short = not self._codec._final or value.bit_length() <= _INT_BITS
            return value if short else {TAG: _INT, "value": hex(value)}
        if cls is float:
            if not self._codec._final or math.isfinite(value):
                return value
            return {_ODD: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
        if self._elsewhere is not None:
            found = self._elsewhere(value, tuple(self._path))
            if found is not NotImplemented:
                return found
        if id(value) in self._inside or len(self._inside) >= MAX_DEPTH:
            why = "contains itself" if id(value) in self._inside else f"is nested deeper than {MAX_DEPTH} levels"
            raise CheckpointError(f"{self._name(tuple(self._path))} {why}", "store a tree")
        self._inside.add(id(value))
        try:
            return self._structured(value, cls)
        except CannotStore as refused:
            raise CheckpointError(f"{self._name(tuple(self._path))} {refused.what}", refused.fix) from refused
        finally:
            self._inside.discard(id(value))

    def _structured(self, value: Any, cls: type) -> Any:
        tag, final = self._codec._tag, self._codec._final
        if cls is list:
            return self._items(value)
        if cls in DICTIONARIES:
            return self._dictionary(DICTIONARIES[cls], value)
        if cls is tuple and final:
            return {_TUPLE: self._items(value)}
        kind = self._codec._kinds.get(cls)
        if kind is not None:
            parts = kind.take(value)
            encoded = self._items(parts) if type(parts) is list else self.value(parts)
            if cls in (set, frozenset):  # their order differs from process to process
                encoded = sorted(encoded, key=lambda item: json.dumps(item, sort_keys=True))
            return {tag: kind.name, "value": encoded}
        if isinstance(value, Enum):
            return {tag: ENUM, **take_member(value)}
        if isinstance(value, np.generic):
            return {tag: _SCALAR, "value": take_scalar(value)}
        if isinstance(value, tuple) and is_named_tuple(cls):
            return {tag: NAMED_TUPLE, **take_named_tuple(value), "items": self._items(list(value))}
        if cls is Unloaded:
            return self._unloaded(value)
        raise CannotStore(f"is a {cls.__module__}.{cls.__qualname__}, which cannot be stored", _hint(value))

    def _items(self, items: list[Any]) -> list[Any]:
        made = []
        for index, item in enumerate(items):
            self._path.append(index)
            made.append(self.value(item))
            self._path.pop()
        return made

    def _dictionary(self, name: str, value: dict[Any, Any]) -> Any:
        codec, more, attributes = self._codec, describe_dictionary(value), attributes_of(value)
        plain = all(type(key) is str for key in value) and not codec._reserved & value.keys()
        below = []
        for key, item in value.items():
            self._path.append(key)
            below.append((key, self.value(item)))
            self._path.pop()
        if plain and name == "dict":
            return dict(below)
        made: dict[str, Any] = {codec._tag: name, **more}
        if plain:
            made["items"] = dict(below)
        else:
            self._path.append("(key)")
            made["pairs"] = [[self.value(key), item] for key, item in below]
            self._path.pop()
        if attributes:
            self._path.append("(attributes)")
            made["attributes"] = self.value(attributes)
            self._path.pop()
        return made

    def _unloaded(self, value: Unloaded) -> dict[str, Any]:
        node: dict[str, Any] = {self._codec._tag: value.kind, "class": value.class_name}
        if value.kind == ENUM:
            return {**node, "names": list(value.fields)}
        return {**node, "fields": list(value.fields), "items": self._items(list(value.values))}


def _hint(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "a tensor may be in a dictionary, list, tuple or deque, and not in a set or a key"
    for plain in (str, bool, int, float, list, dict, tuple, set):
        if isinstance(value, plain):
            return f"store {plain.__name__}(value), which comes back as such"
    if hasattr(value, "state_dict"):
        return "store its state_dict()"
    return (
        "store tensors, numbers, strings, None, True, False, and lists, tuples, sets and dictionaries of these; the "
        "table in docs/checkpointing.md has all types"
    )


VALUES = Codec(TAG)
"""How values are written into a checkpoint."""
