"""Containers that hold tensors: opened into keys and items, and closed again as what they were.

One table for all: dictionaries (with their order and attributes), lists, tuples, named tuples, deques, and tensors that
wrap other tensors (``__tensor_flatten__``). Containers without a tensor in them are values, and written as JSON.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from outlast.checkpoint.format.classes import NAMED_TUPLE, Unloaded, is_named_tuple, make_named_tuple, take_named_tuple
from outlast.checkpoint.format.json_values import (
    DICTIONARIES,
    attributes_of,
    describe_dictionary,
    from_json,
    new_dictionary,
    set_attributes,
)
from outlast.checkpoint.state.wrappers import WRAPPER, close_wrapper, is_wrapper, open_wrapper

_SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple", deque: "deque"}
_LEAVES = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class Opened:
    """A container that was opened."""

    shape: dict[str, Any]
    """JSON: its type, and what belongs to it besides its items."""
    items: list[tuple[Any, Any]]
    """Keys and items, in order."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """That were set on a dictionary, not encoded."""

    @property
    def numbered(self) -> bool:
        """Whether the keys are 0, 1, 2, ..."""
        return "length" in self.shape


def open_container(value: Any) -> Opened | None:
    """The parts of a container; None if it is none.

    Raises:
        CannotStore: it could not be given back as it was; says why.
    """
    cls = type(value)
    if cls in DICTIONARIES:
        return Opened({"type": DICTIONARIES[cls], **describe_dictionary(value)}, [*value.items()], attributes_of(value))
    if cls in _SEQUENCES:
        shape: dict[str, Any] = {"type": _SEQUENCES[cls], "length": len(value)}
        if cls is deque:
            shape["maxlen"] = value.maxlen
        return Opened(shape, [*enumerate(value)])
    if isinstance(value, tuple) and is_named_tuple(cls):
        return Opened({"type": NAMED_TUPLE, **take_named_tuple(value)}, [*zip(cls._fields, value, strict=True)])
    if cls is Unloaded and value.kind == NAMED_TUPLE:
        shape = {"type": NAMED_TUPLE, "class": value.class_name, "fields": list(value.fields)}
        return Opened(shape, [*zip(value.fields, value.values, strict=True)])
    if isinstance(value, torch.Tensor) and is_wrapper(value):
        described, inner = open_wrapper(value)
        return Opened({"type": WRAPPER, **described}, [*inner.items()])
    return None


def close_container(shape: dict[str, Any], items: dict[Any, Any], like: torch.Tensor | None, *, stand_ins: bool) -> Any:
    """The inverse of :func:`open_container`.

    Args:
        shape: its type, and what belongs to it.
        items: by key, in order.
        like: of a wrapper: the running one. None gives a dictionary of its inner tensors.
        stand_ins: see :func:`~outlast.checkpoint.format.json_values.from_json`.

    Raises:
        StateMismatch, LookupError, TypeError, ValueError: as :func:`from_json`.
    """
    kind = shape["type"]
    if kind in DICTIONARIES.values():
        made = new_dictionary(kind, shape)
        for key, item in items.items():
            made[key] = item
        if "attributes" in shape:
            set_attributes(made, from_json(shape["attributes"], stand_ins=stand_ins))
        return made
    if kind == WRAPPER:
        return close_wrapper(items, like)
    values = list(items.values())
    if kind == NAMED_TUPLE:
        return make_named_tuple(shape, values, stand_in=stand_ins)
    if kind == "deque":
        return deque(values, shape["maxlen"])
    return {name: cls for cls, name in _SEQUENCES.items()}[kind](values)


def holds_tensor(value: Any) -> bool:
    """Whether a value is a tensor, or a container with a tensor in it, at any depth."""
    return _holds_tensor(value, set())


def _holds_tensor(value: Any, seen: set[int]) -> bool:
    cls = type(value)
    if cls in _LEAVES:
        return False
    if isinstance(value, torch.Tensor):
        return True
    if cls is Unloaded:
        value = value.values
        cls = tuple
    if not (cls in DICTIONARIES or cls in _SEQUENCES or (isinstance(value, tuple) and is_named_tuple(cls))):
        return False
    if id(value) in seen:
        return False
    seen.add(id(value))
    items = value.values() if isinstance(value, Mapping) else value
    return any(_holds_tensor(item, seen) for item in items)
