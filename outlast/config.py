"""Reads settings from the command line, a TOML file and the environment into frozen dataclasses.

Each room owns the dataclass of its own settings; the trainer joins them into one whose fields are the sections of the
TOML file. A value is taken from the first of these that has one:

1. the command line, ``--section.key VALUE`` (dashes and underscores are alike), read by tyro,
2. the TOML file, ``key = value`` under ``[section]``,
3. the environment, ``OUTLAST_SECTION_KEY=value``,
4. the dataclass's default.

A dataclass checks its own ranges in ``__post_init__`` and raises :class:`~outlast.errors.OutOfRange`
(:func:`require` says it in one line).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from outlast.errors import ConfigError, OutOfRange, UnknownKey

T = TypeVar("T")


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise :class:`OutOfRange` unless ``ok``; e.g. ``require(0 < d <= 1, "comm.density", d, "0 < density <= 1")``."""
    if not ok:
        raise OutOfRange(f"{key} = {value!r} is out of range", f"allowed: {allowed}")


def nearest(word: str, known: Sequence[str]) -> str:
    """``did you mean 'x'?`` for the closest known word, else the list of all known ones."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(sorted(known))}"


def load(
    kind: type[T],
    file: Path | str | None = None,
    environ: Mapping[str, str] | None = None,
) -> T:
    """Resolve settings of ``kind``, whose fields are sections (themselves dataclasses), from file and environment.

    Args:
        kind: the joined dataclass.
        file: a TOML file, or None for none.
        environ: where ``OUTLAST_SECTION_KEY`` is looked up; None takes ``os.environ``.

    Raises:
        UnknownKey: a section or key that does not exist, with the nearest one that does.
        OutOfRange: a value its dataclass refuses.
        ConfigError: the file cannot be read or parsed, or a value is of the wrong type.
    """
    sections = get_type_hints(kind)
    raw: dict[str, dict[str, Any]] = {section: {} for section in sections}
    where: dict[str, str] = {}
    _merge(raw, where, _from_environment(sections, os.environ if environ is None else environ), sections)
    if file is not None:
        _merge(raw, where, [(s, k, v, str(file)) for s, k, v in _from_file(Path(file), sections)], sections)
    joined = {}
    for section, cls in sections.items():
        hints = get_type_hints(cls)
        unknown = {field.name: _unknown(field) for field in dataclasses.fields(cls)}
        values = {
            key: _convert(value, hints[key], f"{section}.{key}", where[f"{section}.{key}"], unknown[key])
            for key, value in raw[section].items()
        }
        missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in values]
        if missing:
            raise ConfigError(
                f"no value for {', '.join(f'{section}.{name}' for name in missing)}", "set it in the file"
            )
        joined[section] = cls(**values)
    return kind(**joined)


def override(config: T, arguments: Sequence[str], prog: str) -> T:
    """``config`` with ``--section.key VALUE`` arguments put over it; ``--help`` among them lists every setting.

    An argument that tyro cannot take (unknown, or of the wrong type) is printed with the nearest right one, and the
    process exits with status 2, as command-line programs do.

    Raises:
        ConfigError: a value that its Literal does not list, or that its dataclass refuses.
    """
    kind = type(config)
    _check_choices(kind, arguments)
    return tyro.cli(kind, prog=prog, default=config, args=list(arguments), config=(tyro.conf.FlagConversionOff,))


def _check_choices(kind: type, arguments: Sequence[str]) -> None:
    """Refuse what a Literal does not list and name the nearest choice, where tyro would name all of them.

    Raises:
        ConfigError: the first of them.
    """
    sections = get_type_hints(kind)
    for flag, value in pairwise(arguments):
        section, _, key = flag.removeprefix("--").replace("-", "_").partition(".")
        for field in dataclasses.fields(sections[section]) if section in sections else ():
            hint = get_type_hints(sections[section])[field.name]
            if field.name == key and get_origin(hint) is typing.Literal:
                _convert(value, hint, f"{section}.{key}", "command line", _unknown(field))


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """All arguments but ``--section.key VALUE`` and ``--section.key=VALUE``; and those, each value a word of its own.

    A value with commas is a list's items: ``--data.files a.txt,b.txt``.

    Raises:
        ConfigError: a setting without a value.
    """
    rest: list[str] = []
    overrides: list[str] = []
    queue = list(arguments)
    while queue:
        flag, equals, value = queue[0].partition("=")
        if not flag.startswith("--") or "." not in flag:
            rest.append(queue.pop(0))
            continue
        queue.pop(0)
        if not equals:
            if not queue:
                raise ConfigError(f"{flag} has no value", f"give one: {flag} VALUE")
            value = queue.pop(0)
        overrides += [flag, *value.split(",")]
    return rest, overrides


def to_toml(config: object) -> str:
    """The joined dataclass as TOML that :func:`load` reads back to an equal one; a key that is None is left out."""
    out: list[str] = []
    for section in dataclasses.fields(config):  # type: ignore[arg-type]
        part = getattr(config, section.name)
        out.append(f"[{section.name}]")
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if value is not None:
                out.append(f"{field.name} = {_toml_value(value)}")
        out.append("")
    return "\n".join(out)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _unknown(field: dataclasses.Field[Any]) -> type[ConfigError]:
    """The error of a value that the field's Literal does not list; a field may name its own in its metadata."""
    error: type[ConfigError] = field.metadata.get("unknown", OutOfRange)
    return error


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON leaves DEL as it is
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    raise ConfigError(f"{value!r} of type {type(value).__name__} cannot be written as TOML")


def _from_file(path: Path, sections: Mapping[str, type]) -> list[tuple[str, str, Any]]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no config file at {path}", "ready-to-run ones are in configs/") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    found = []
    for section, keys in table.items():
        if not isinstance(keys, dict):
            raise UnknownKey(f"{path}: {section!r} stands outside a section", f"sections are: {', '.join(sections)}")
        if section not in sections:
            raise UnknownKey(f"{path}: no section [{section}]", nearest(section, list(sections)))
        found += [(section, key, value) for key, value in keys.items()]
    return found


def _from_environment(sections: Mapping[str, type], environ: Mapping[str, str]) -> list[tuple[str, str, Any, str]]:
    found = []
    for section, cls in sections.items():
        for field in dataclasses.fields(cls):
            name = f"OUTLAST_{section}_{field.name}".upper()
            if name in environ:
                found.append((section, field.name, environ[name], name))
    return found


def _merge(
    raw: dict[str, dict[str, Any]],
    where: dict[str, str],
    found: Sequence[tuple[str, str, Any, str]],
    sections: Mapping[str, type],
) -> None:
    for section, key, value, source in found:
        known = [field.name for field in dataclasses.fields(sections[section])]
        if key not in known:
            every = {f.name: s for s, cls in sections.items() for f in dataclasses.fields(cls)}
            hint = f"did you mean {every[key]}.{key}?" if key in every else nearest(key, known)
            raise UnknownKey(f"{source}: no setting {section}.{key}", hint)
        raw[section][key] = value
        where[f"{section}.{key}"] = source


def _words(hint: Any) -> str:
    """A type for people: ``int``, or the values of a Literal."""
    return ", ".join(map(repr, get_args(hint))) if get_origin(hint) is typing.Literal else str(hint.__name__)


def _convert(value: Any, hint: Any, name: str, source: str, unknown: type[ConfigError] = OutOfRange) -> Any:
    """``value`` as the type ``hint``; text from the environment is parsed, TOML values must already fit.

    Raises:
        ConfigError: it does not fit; ``unknown`` where a Literal does not list it.
    """
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [arm for arm in get_args(hint) if arm is not type(None)]
        if len(inner) < len(get_args(hint)) and isinstance(value, str) and value.lower() == "none":
            return None
        refusals = []
        for arm in inner:
            try:
                return _convert(value, arm, name, source, unknown)
            except ConfigError as error:
                refusals.append(error)
        if len(inner) == 1:
            raise refusals[0]
        raise ConfigError(f"{source}: {name} = {value!r} is none of: {', '.join(map(_words, inner))}") from refusals[-1]
    if origin is typing.Literal:
        if value not in get_args(hint):
            options = [str(option) for option in get_args(hint)]
            raise unknown(
                f"{source}: {name} = {value!r} is not one of {', '.join(options)}", nearest(str(value), options)
            )
        return value
    if origin is tuple:
        (item, *_) = get_args(hint)
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise ConfigError(f"{source}: {name} = {value!r} is not a list")
        return tuple(_convert(part, item, name, source) for part in items)
    wrong = ConfigError(f"{source}: {name} = {value!r} is not of type {hint.__name__}")
    if hint is bool:
        if isinstance(value, str) and value.lower() in ("true", "false", "1", "0", "yes", "no"):
            return value.lower() in ("true", "1", "yes")
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, bool) or (hint is str and not isinstance(value, str)):
        raise wrong
    if hint is int and isinstance(value, float):
        raise wrong
    try:
        return hint(value)
    except (TypeError, ValueError) as error:
        raise wrong from error
