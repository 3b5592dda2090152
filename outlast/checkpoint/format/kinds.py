"""Values that JSON does not have, each taken apart into simpler ones and made again from them.

A kind is for objects of exactly one class: those of its subclasses would come back as another type. What is made is
made of checked parts alone; nothing that a checkpoint names is imported or called.
"""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

INLINE_BYTES = 8 << 20
"""Of one NumPy array, or one ``bytes``: more belongs into a tensor."""
_NUMPY_KINDS = "biufcmMSU"
"""Of NumPy's dtypes: those whose elements are bytes and nothing else."""


class CannotStore(Exception):
    """A value of a known class that cannot be stored: why, and what to do."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what, fix)
        self.what, self.fix = what, fix


@dataclass(frozen=True)
class Kind:
    """How objects of one class, not of its subclasses, are taken apart and made again."""

    name: str
    cls: type
    take: Callable[[Any], Any]
    """To values of simpler kinds; raises :class:`CannotStore`."""
    make: Callable[[Any], Any]
    """The inverse; raises TypeError, ValueError or RuntimeError if these are not such values."""


def kind_of_fields(name: str, cls: type) -> Kind:
    """The kind of a class whose objects are fully described by their attributes."""

    def make(fields: dict[str, Any]) -> Any:
        item: Any = object.__new__(cls)
        vars(item).update(fields)
        return item

    return Kind(name, cls, lambda item: dict(vars(item)), make)


def take_scalar(value: np.generic) -> list[Any]:
    """A NumPy scalar taken apart; raises :class:`CannotStore`."""
    array = np.asarray(value)
    if array.dtype.type is not type(value):
        raise CannotStore(f"is a {type(value).__module__}.{type(value).__qualname__}", "store a plain NumPy scalar")
    if array.dtype.kind in "SU" and array[()] != value:  # NumPy drops zeros at the end
        raise CannotStore(f"is the NumPy text {value!r}, which ends in zeros", "store bytes or a plain string")
    return take_array(array)


def make_scalar(parts: Any) -> Any:
    """The inverse of :func:`take_scalar`; raises ValueError or TypeError."""
    array = make_array(parts)
    if array.shape:
        raise ValueError(f"a scalar of shape {array.shape}")
    return array[()]


def take_array(array: np.ndarray[Any, Any]) -> list[Any]:
    """Type, shape, and the elements in C order as base64; raises :class:`CannotStore`."""
    dtype = array.dtype
    text = dtype.str if np.dtype(dtype.str).char == dtype.char else dtype.char
    if dtype.kind not in _NUMPY_KINDS or np.dtype(text) != dtype or np.dtype(text).char != dtype.char:
        raise CannotStore(f"is a NumPy array of dtype {dtype}", "store an array of numbers, or its fields one by one")
    if array.nbytes > INLINE_BYTES:
        raise CannotStore(
            f"is a NumPy array of {array.nbytes} bytes; up to {INLINE_BYTES} are stored as a value",
            "store torch.from_numpy(array), which is stored as a tensor",
        )
    return [text, list(array.shape), base64.b64encode(array.tobytes()).decode()]


def make_array(parts: Any) -> np.ndarray[Any, Any]:
    """The inverse of :func:`take_array`; raises ValueError or TypeError."""
    text, shape, elements = parts
    dtype = np.dtype(str(text))
    if dtype.kind not in _NUMPY_KINDS:
        raise ValueError(f"NumPy's dtype {text!r}")
    raw = bytearray(base64.b64decode(elements, validate=True))
    array: np.ndarray[Any, Any] = np.ndarray(tuple(shape), dtype, raw)
    if array.nbytes != len(raw):
        raise ValueError(f"{len(raw)} bytes for an array of {array.nbytes}")
    return array


def _take_bytes(value: bytes | bytearray) -> str:
    if len(value) > INLINE_BYTES:
        raise CannotStore(
            f"are {len(value)} bytes; up to {INLINE_BYTES} are stored as a value",
            "store torch.frombuffer(bytearray(value), dtype=torch.uint8), which is stored as a tensor",
        )
    return base64.b64encode(value).decode()


def _make_bytes(text: Any) -> bytes:
    return base64.b64decode(text, validate=True)


def _of_torch(cls: type) -> Callable[[Any], Any]:
    """Makes what ``torch`` has under a name, if it is of a class."""

    def make(name: Any) -> Any:
        found = vars(torch).get(name)
        if type(found) is not cls:
            raise ValueError(f"torch of this version has no {cls.__name__} {name!r}")
        return found

    return make


def _name_in_torch(value: object) -> str:
    return str(value).removeprefix("torch.")


def _make_complex(parts: Any) -> complex:
    real, imaginary = parts
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError(f"{parts!r} for a complex number")
    return complex(real, imaginary)


def _make_deque(parts: Any) -> deque[Any]:
    items, longest = parts
    return deque(list(items), longest)


PLAIN: tuple[Kind, ...] = (
    Kind("tuple", tuple, list, tuple),
    Kind("set", set, list, set),
    Kind("frozenset", frozenset, list, frozenset),
    Kind("deque", deque, lambda value: [list(value), value.maxlen], _make_deque),
    Kind("range", range, lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
    Kind("complex", complex, lambda value: [value.real, value.imag], _make_complex),
    Kind("bytes", bytes, _take_bytes, _make_bytes),
    Kind("bytearray", bytearray, _take_bytes, lambda text: bytearray(_make_bytes(text))),
    Kind("numpy.ndarray", np.ndarray, take_array, make_array),
    Kind("torch.Size", torch.Size, list, torch.Size),
    Kind("torch.dtype", torch.dtype, _name_in_torch, _of_torch(torch.dtype)),
    Kind("torch.device", torch.device, str, torch.device),
    Kind("torch.layout", torch.layout, _name_in_torch, _of_torch(torch.layout)),
    Kind("torch.memory_format", torch.memory_format, _name_in_torch, _of_torch(torch.memory_format)),
)
"""The kinds that every checkpoint knows."""
