"""Reads settings from the command line, a TOML file and the environment into frozen dataclasses.

Each package owns the dataclass of its own settings; the trainer joins them into one whose fields are the sections of
the TOML file. A value is taken from the first of these that has one:

1. the command line, ``--section.key VALUE`` (dashes and underscores are alike),
2. the TOML file, ``key = value`` under ``[section]``,
3. the environment, ``OUTLAST_SECTION_KEY=value``,
4. the dataclass's default.

The command line is parsed once, by :func:`split_overrides`; :func:`load` then joins all four and builds each dataclass
once. A dataclass checks its own ranges in ``__post_init__`` and raises :class:`~outlast.errors.OutOfRange`
(:func:`require` does it in one line).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import os
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from outlast.config_tables import is_table, join_tables, nested, parse_value, to_table
from outlast.errors import ConfigError, OutOfRange, UnknownKey

T = TypeVar("T")

Overrides = Mapping[str, str]
"""Settings from the command line: ``section.key`` to the text of its value; commas separate the items of a list."""


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise :class:`OutOfRange` unless ``ok``; e.g. ``require(0 < d <= 1, "comm.density", d, "0 < density <= 1")``."""
    if not ok:
        raise OutOfRange(f"{key} = {value!r} is out of range", f"allowed: {allowed}")


def nearest(word: str, known: Sequence[str]) -> str:
    """``did you mean 'x'?`` for the closest known word, else the list of all known ones."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(sorted(known))}"


class _Setting(NamedTuple):
    """One value before it is converted, and where it comes from."""

    section: str
    key: str
    value: Any
    source: str


def load(
    kind: type[T],
    file: Path | str | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Overrides | None = None,
) -> T:
    """Resolve settings of ``kind``, whose fields are sections (themselves dataclasses), from every source.

    Args:
        kind: the joined dataclass.
        file: a TOML file, or None for none.
        environ: where ``OUTLAST_SECTION_KEY`` is looked up; None takes ``os.environ``.
        overrides: from the command line, as :func:`split_overrides` returns them.

    Raises:
        UnknownKey: a section or key that does not exist, with the nearest one that does.
        OutOfRange: a value its dataclass refuses.
        ConfigError: the file cannot be read or parsed, or a value is of the wrong type.
    """
    sections = get_type_hints(kind)
    settings = [
        *_from_environment(sections, os.environ if environ is None else environ),
        *(_from_file(Path(file), sections) if file is not None else ()),
        *_from_command_line(overrides or {}, sections),
    ]
    chosen: dict[tuple[str, str], _Setting] = {}
    for one in settings:  # the last source wins, of a table's keys each for itself
        key = one.section, one.key
        if key in chosen and is_table(get_type_hints(sections[one.section])[one.key]):
            name = ".".join(key)
            tables = [to_table(each.value, name, each.source) for each in (chosen[key], one)]
            one = one._replace(value=join_tables(*tables))
        chosen[key] = one
    joined = {}
    for section, cls in sections.items():
        hints = get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {
            key: _convert(one.value, hints[key], f"{section}.{key}", one.source, _unknown(fields[key]))
            for (owner, key), one in chosen.items()
            if owner == section
        }
        missing = [f.name for f in fields.values() if _required(f) and f.name not in values]
        if missing:
            raise ConfigError(
                f"no value for {', '.join(f'{section}.{name}' for name in missing)}", "set it in the file"
            )
        joined[section] = cls(**values)
    return kind(**joined)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate ``--section.key VALUE`` and ``--section.key=VALUE`` from all other arguments.

    Returns:
        The other arguments, in order; and the settings, as :func:`load` takes them. The last of a repeated one wins.

    Raises:
        ConfigError: a setting without a value.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    queue = iter(arguments)
    for argument in queue:
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--") or "." not in flag:
            rest.append(argument)
            continue
        if not equals:
            following = next(queue, None)
            if following is None:
                raise ConfigError(f"{flag} has no value", f"give one: {flag} VALUE")
            value = following
        overrides[flag[2:].replace("-", "_")] = value
    return rest, overrides


def override_arguments(overrides: Overrides) -> list[str]:
    """``--section.key=VALUE`` for each setting, for the command line of a child process."""
    return [f"{_flag(name)}={value}" for name, value in overrides.items()]


def to_toml(config: object, *, explain: bool = False) -> str:
    """The joined dataclass as TOML that :func:`load` reads back to an equal one; a key that is None is left out.

    Args:
        config: the joined dataclass.
        explain: also write, as comments, what each setting means, its type or choices, and the keys that are None.
    """
    out: list[str] = []
    for section in dataclasses.fields(config):  # type: ignore[arg-type]
        part = getattr(config, section.name)
        hints, docs = get_type_hints(type(part)), _field_docs(type(part)) if explain else {}
        out.append(f"[{section.name}]")
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if explain:
                out += ["", *textwrap.wrap(docs[field.name], 100, initial_indent="# ", subsequent_indent="# ")]
                out.append(f"# values: {_type_name(hints[field.name])}")
            if value is not None:
                out.append(f"{field.name} = {to_toml_value(value)}")
            elif explain:
                out.append(f"# {field.name} is not set")
        out.append("")
    return "\n".join(out)


def _field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, which Python itself does not keep; without reST's backticks."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for field, after in itertools.pairwise(node.body):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.replace("``", "").split())
    return docs


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _unknown(field: dataclasses.Field[Any]) -> type[ConfigError]:
    """The error of a value that the field's Literal does not list; a field may name its own in its metadata."""
    error: type[ConfigError] = field.metadata.get("unknown", OutOfRange)
    return error


def to_toml_value(value: object) -> str:
    """A setting's value as TOML.

    Raises:
        ConfigError: it is of a type that no setting has.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON leaves DEL as it is
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(to_toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {to_toml_value(item)}" for key, item in value.items()) + "}"
    raise ConfigError(f"{value!r} of type {type(value).__name__} cannot be written as TOML")


def _toml_key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else to_toml_value(key)


def _from_file(path: Path, sections: Mapping[str, type]) -> Iterator[_Setting]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no config file at {path}", "ready-to-run ones are in configs/") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for section, keys in table.items():
        if not isinstance(keys, dict):
            raise UnknownKey(f"{path}: {section!r} is outside any section", f"sections are: {', '.join(sections)}")
        if section not in sections:
            raise UnknownKey(f"{path}: no section [{section}]", nearest(section, list(sections)))
        known = [field.name for field in dataclasses.fields(sections[section])]
        for key, value in keys.items():
            if key not in known:
                owners = {f.name: s for s, cls in sections.items() for f in dataclasses.fields(cls)}
                hint = f"did you mean {owners[key]}.{key}?" if key in owners else nearest(key, known)
                raise UnknownKey(f"{path}: no setting {section}.{key}", hint)
            yield _Setting(section, key, value, str(path))


def _from_environment(sections: Mapping[str, type], environ: Mapping[str, str]) -> Iterator[_Setting]:
    for section, cls in sections.items():
        for field in dataclasses.fields(cls):
            name = f"OUTLAST_{section}_{field.name}".upper()
            if name in environ:
                yield _Setting(section, field.name, environ[name], name)


def _from_command_line(overrides: Overrides, sections: Mapping[str, type]) -> Iterator[_Setting]:
    known = [f"{section}.{field.name}" for section, cls in sections.items() for field in dataclasses.fields(cls)]
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        key, *inside = key.split(".")
        if inside and f"{section}.{key}" in known and is_table(get_type_hints(sections[section])[key]):
            yield _Setting(section, key, nested(inside, parse_value(value)), "command line")
            continue
        key = ".".join([key, *inside])
        if name not in known:
            namesakes = [one for one in known if one.endswith(f".{key}")]
            close = namesakes or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {_flag(close[0])}?" if close else f"sections are: {', '.join(sections)}"
            raise UnknownKey(f"no setting {_flag(name)}", hint)
        yield _Setting(section, key, value, "command line")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _type_name(hint: Any) -> str:
    """A type as people write it: ``int``, ``list of str``, the values of a Literal, or alternatives of these."""
    origin, arms = get_origin(hint), get_args(hint)
    if origin is typing.Literal:
        return ", ".join(map(repr, arms))
    if origin is tuple:
        return f"list of {_type_name(arms[0])}"
    if is_table(hint):
        return "table"
    if origin in (typing.Union, types.UnionType):
        return ", ".join("not set" if arm is type(None) else _type_name(arm) for arm in arms)
    return str(hint.__name__)


def _convert(value: Any, hint: Any, name: str, source: str, unknown: type[ConfigError] = OutOfRange) -> Any:
    """``value`` as the type ``hint``; text (from the environment or the command line) is parsed.

    Raises:
        ConfigError: it does not fit; ``unknown`` where a Literal does not list it.
    """
    origin = get_origin(hint)
    if is_table(hint):
        return to_table(value, name, source)
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
        raise ConfigError(
            f"{source}: {name} = {value!r} is none of: {', '.join(map(_type_name, inner))}"
        ) from refusals[-1]
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
