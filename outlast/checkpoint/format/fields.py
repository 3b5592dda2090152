"""Fields of JSON that somebody else may have written: each is typed and bounded before it is used."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from outlast.checkpoint.memory.pages import Buffer

MAX_DOCUMENT_BYTES = 1 << 30
"""Of a record or a Zarr document: far more than a save writes, and little enough to parse."""
MAX_INTEGER = (1 << 63) - 1
"""What a size, a step or a rank may be at most, as a signed 64-bit integer."""
_MAX_TEXT = 4096
_MAX_TIME_S = 1 << 37
"""In the year 6325."""
_SHOWN = 60


class Malformed(ValueError):
    """A field is missing, of another type, or out of its bounds; says which, and what it has."""


def parse(data: bytes | Buffer) -> dict[str, Any]:
    """The JSON object in a file's bytes; raises :class:`Malformed`, and reads strict JSON alone."""
    if len(data) > MAX_DOCUMENT_BYTES:
        raise Malformed(f"it has {len(data)} bytes; at most {MAX_DOCUMENT_BYTES} are read")
    try:
        document = json.loads(bytes(data), parse_constant=_no_constant)
    except RecursionError as error:
        raise Malformed("it is nested too deeply") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise Malformed(f"it is not JSON: {error}") from error
    return as_mapping(document, "it")


def as_mapping(value: Any, name: str) -> dict[str, Any]:
    """A JSON object."""
    if type(value) is not dict:
        _refuse(name, value, "an object")
    return value


def as_list(value: Any, name: str) -> list[Any]:
    """A JSON array."""
    if type(value) is not list:
        _refuse(name, value, "a list")
    return value


def as_text(value: Any, name: str) -> str:
    """A string of at most 4096 characters, all of them valid Unicode."""
    if type(value) is not str or len(value) > _MAX_TEXT or not (value.isascii() or _is_unicode(value)):
        _refuse(name, value, f"a text of at most {_MAX_TEXT} characters")
    return value


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def as_count(value: Any, name: str, least: int = 0, most: int = MAX_INTEGER) -> int:
    """An integer within bounds."""
    if type(value) is not int or not least <= value <= most:
        _refuse(name, value, f"an integer from {least} to {most}")
    return value


def as_time(value: Any, name: str) -> float:
    """Unix time in seconds, of a date that a calendar has."""
    if type(value) not in (int, float) or not 0 <= value < _MAX_TIME_S:  # NaN is not
        _refuse(name, value, "a Unix time in seconds")
    return float(value)


def as_flag(value: Any, name: str) -> bool:
    """True or False."""
    if type(value) is not bool:
        _refuse(name, value, "true or false")
    return value


def member(fields: dict[str, Any], name: str) -> Any:
    """A field's value; raises :class:`Malformed` if it is missing."""
    if name not in fields:
        raise Malformed(f"it has no {name}")
    return fields[name]


def only(fields: dict[str, Any], *names: str) -> None:
    """Raise :class:`Malformed` if there are other fields than these."""
    for name in fields:
        if name not in names:
            raise Malformed(f"it has the unknown field {name[:_SHOWN]!r}")


def _refuse(name: str, value: Any, wanted: str) -> NoReturn:
    # Not the repr of the whole: it may be as long as the file.
    shown = f"{value[:_SHOWN]!r}" if isinstance(value, str) else type(value).__name__
    if type(value) in (int, float, bool, type(None)):
        shown = "larger" if type(value) is int and abs(value) > MAX_INTEGER else repr(value)
    raise Malformed(f"{name} must be {wanted}, and is {shown}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")
