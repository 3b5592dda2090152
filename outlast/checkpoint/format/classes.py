"""Enumerations and named tuples of a program: stored by the name of their class, found again only where it is loaded.

A checkpoint must not have anything imported, nor call what it names. So a class is looked up among the modules that
the program has imported itself, without attribute access that a module could answer with an import; of an
enumeration its members are looked up by name, and a named tuple is made without calling its class.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum, Flag
from functools import reduce
from operator import or_
from typing import Any

from outlast.checkpoint.format.kinds import CannotStore
from outlast.errors import StateMismatch

ENUM, NAMED_TUPLE = "enum", "namedtuple"


@dataclass(frozen=True)
class Unloaded:
    """An object of a class that this process has not imported, as the tools see it."""

    kind: str
    """``"enum"`` or ``"namedtuple"``."""
    class_name: str
    """``module:qualified.name``."""
    fields: tuple[str, ...]
    """Of an enumeration's member: its name, or those of the flags it consists of. Of a named tuple: its fields."""
    values: tuple[Any, ...] = ()
    """Of a named tuple: its items."""


def is_named_tuple(cls: type) -> bool:
    """Whether a class is one that ``namedtuple`` or ``NamedTuple`` made; its subclasses are not."""
    fields = vars(cls).get("_fields")
    return cls.__bases__ == (tuple,) and isinstance(fields, tuple) and all(type(name) is str for name in fields)


def name_of(cls: type) -> str:
    """``module:qualified.name``, by which :func:`loaded` finds the class.

    Raises:
        CannotStore: it would not be found, as a class made within a function is not.
    """
    name = f"{cls.__module__}:{cls.__qualname__}"
    if loaded(name) is not cls:
        raise CannotStore(
            f"is of the class {name}, which could not be found again under this name",
            "define the class at the top level of a module, or store plain values",
        )
    return name


def loaded(name: Any) -> type | None:
    """The class with such a name, if the program has imported its module; nothing is imported."""
    module, _, path = str(name).partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found if isinstance(found, type) else None


def take_member(value: Enum) -> dict[str, Any]:
    """A member of an enumeration, or a combination of flags; raises :class:`CannotStore`."""
    cls = type(value)
    names = [str(value.name)] if value.name in cls.__members__ else []
    if isinstance(value, Flag) and not names:
        names = [str(flag.name) for flag in value]
        if reduce(or_, (cls.__members__[name] for name in names), cls(0)) is not value:
            raise CannotStore(f"is {value!r}, whose bits have no names", "store its value")
    return {"class": name_of(cls), "names": names}


def make_member(node: dict[str, Any], *, stand_in: bool) -> Any:
    """The inverse of :func:`take_member`.

    Args:
        node: what it returned.
        stand_in: return an :class:`Unloaded` if the class is not loaded.

    Raises:
        StateMismatch: the class is not loaded, or no longer has the member.
        TypeError, ValueError: it is not such a node.
    """
    class_name, names = _text(node["class"]), [_text(name) for name in node["names"]]
    cls = loaded(class_name)
    if cls is None or not issubclass(cls, Enum):
        if stand_in:
            return Unloaded(ENUM, class_name, tuple(names))
        raise _not_loaded(class_name)
    if len(names) != 1 and not issubclass(cls, Flag):
        raise ValueError(f"{names} for a member of {class_name}")
    missing = [name for name in names if name not in cls.__members__]
    if missing:
        raise StateMismatch(
            f"{class_name} has no member {missing[0]!r}, which the checkpoint holds", "add it again, or restore parts"
        )
    if len(names) == 1:
        return cls.__members__[names[0]]
    member: Any = reduce(or_, (cls.__members__[name] for name in names), cls(0))
    return member


def take_named_tuple(value: Any) -> dict[str, Any]:
    """The class and fields of a named tuple; its items are taken apart by the caller. Raises :class:`CannotStore`."""
    return {"class": name_of(type(value)), "fields": list(type(value)._fields)}


def make_named_tuple(node: dict[str, Any], values: list[Any], *, stand_in: bool) -> Any:
    """The inverse of :func:`take_named_tuple`; raises as :func:`make_member` does."""
    class_name, fields = _text(node["class"]), tuple(_text(name) for name in node["fields"])
    if len(values) != len(fields):
        raise ValueError(f"{len(values)} items for the fields {fields} of {class_name}")
    cls = loaded(class_name)
    if cls is None or not is_named_tuple(cls):
        if stand_in:
            return Unloaded(NAMED_TUPLE, class_name, fields, tuple(values))
        raise _not_loaded(class_name)
    if cls._fields != fields:  # type: ignore[attr-defined]
        raise StateMismatch(
            f"{class_name} has the fields {cls._fields}, that of the checkpoint {fields}",  # type: ignore[attr-defined]
            "restore with the class as it was when the step was saved",
        )
    return tuple.__new__(cls, values)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{value!r} where a name belongs")
    return value


def _not_loaded(class_name: str) -> StateMismatch:
    return StateMismatch(
        f"the checkpoint holds an object of {class_name}, a class that this program has not imported",
        "import it before the restore; a checkpoint has nothing imported",
    )
