"""Settings that are tables of a user's own: the arguments of a factory, which outlast hands over as they are.

They come from several sources, as other settings do, and are joined key by key: ``--model.arguments.n_layer 4``
replaces one key of ``[model.arguments]`` in the file.
"""

from __future__ import annotations

import collections.abc
import datetime
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, get_origin

from outlast.errors import ConfigError

Table = Mapping[str, Any]
"""The type of such a setting's field: strings, numbers, booleans, lists and tables, by key."""


def is_table(hint: Any) -> bool:
    """Whether a field of this type is a table."""
    return get_origin(hint) is collections.abc.Mapping


def parse_value(text: str) -> Any:
    """A value from the command line or the environment: TOML where it is TOML, else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"] if "\n" not in text else text
    except tomllib.TOMLDecodeError:
        return text


def nested(path: Sequence[str], value: Any) -> Any:
    """``value`` in tables of one key each: ``nested(["a", "b"], 1)`` is ``{"a": {"b": 1}}``."""
    for key in reversed(path):
        value = {key: value}
    return value


def join_tables(below: Table, above: Table) -> dict[str, Any]:
    """``above`` over ``below``, key by key, also in tables inside them."""
    joined = dict(below)
    for key, value in above.items():
        old = joined.get(key)
        joined[key] = join_tables(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return joined


def to_table(value: Any, name: str, source: str) -> dict[str, Any]:
    """``value`` as a table; text is parsed as an inline table, ``{n_layer = 4}``.

    Raises:
        ConfigError: it is none, or holds a date or time, which settings cannot.
    """
    table = parse_value(value) if isinstance(value, str) else value
    if not isinstance(table, Mapping):
        raise ConfigError(
            f"{source}: {name} = {value!r} is not a table",
            f"write [{name}] with a key per line, or {name}.KEY = VALUE, or {{KEY = VALUE}}",
        )
    _refuse_times(table, name, source)
    return dict(table)


def _refuse_times(value: Any, name: str, source: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_times(inner, f"{name}.{key}", source)
    elif isinstance(value, list):
        for inner in value:
            _refuse_times(inner, name, source)
    elif isinstance(value, (datetime.date, datetime.time)):
        raise ConfigError(f"{source}: {name} = {value} is a date or time, which no setting can be", "write it as text")
