"""What a setting names by ``package.module:name``: found, checked against its arguments, and called.

A check needs the module's import, but calls nothing, so that wrong settings are found before anything is made.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from outlast.config import nearest
from outlast.config_tables import Table
from outlast.errors import ConfigError

_KINDS = inspect.Parameter


def search_beside(config_file: Path) -> None:
    """Have modules found in the current folder first, and in the config file's folder last, as well as elsewhere."""
    for folder, at in ((os.getcwd(), 0), (str(config_file.absolute().parent), len(sys.path) + 1)):
        if folder not in sys.path:
            sys.path.insert(at, folder)


class Factory:
    """A function or class that a setting names.

    Args:
        key: of the setting, for messages.
        path: its value, ``package.module:name``; the name may have dots, ``module:Class.method``.
        arguments: what it is called with, by name; a table with ``factory`` is itself made by one.
        offered: names of further arguments that are passed if the function has parameters of these names, unless
            ``arguments`` has them.
        positional: how many arguments precede these.
        made_once: a class gets these arguments alone, and what it makes gets the others.
        shown: where the user wrote the arguments, for messages; None: a table beside ``key``.

    Raises:
        ConfigError: the module cannot be imported, has nothing of this name (the nearest that it has is named) or what
            it has cannot be called; or the arguments do not fit, with the nearest one that the function takes.
    """

    def __init__(
        self,
        key: str,
        path: str,
        arguments: Table,
        *,
        offered: tuple[str, ...] = (),
        positional: int = 0,
        made_once: bool = False,
        shown: str | None = None,
    ) -> None:
        self.key = key
        self.path = path
        self.target = _find(key, path)
        table = shown or f"{key.rpartition('.')[0]}.arguments"
        self._arguments = {name: _prepared(value, f"{table}.{name}") for name, value in arguments.items()}
        self._signature = _signature(self.target)
        named = {} if self._signature is None else self._signature.parameters
        known = {name for name, one in named.items() if one.kind in (_KINDS.POSITIONAL_OR_KEYWORD, _KINDS.KEYWORD_ONLY)}
        self.takes = frozenset(name for name in offered if name in known and name not in arguments)
        """Which of the offered arguments it is called with."""
        if self._signature is not None:
            self._check(self._signature, known, table, 0 if made_once and inspect.isclass(self.target) else positional)

    def __call__(self, *positional: Any, **offered: Any) -> Any:
        """Call it with its arguments, and those of ``offered`` that it takes; what it raises is raised."""
        arguments = {name: value() if isinstance(value, Factory) else value for name, value in self._arguments.items()}
        return self.target(*positional, **{name: offered[name] for name in sorted(self.takes)}, **arguments)

    def __str__(self) -> str:
        return f"{self.key} = {self.path!r}"

    def _check(self, signature: inspect.Signature, known: set[str], table: str, positional: int) -> None:
        parameters = signature.parameters.values()
        anything = any(one.kind is _KINDS.VAR_KEYWORD for one in parameters)
        for name in self._arguments:
            if name not in known and not anything:
                raise ConfigError(f"{table}: {self.path} has no argument {name!r}", _nearest_argument(name, known))
        try:
            signature.bind(*[None] * positional, **dict.fromkeys(self.takes), **self._arguments)
        except TypeError as error:
            raise ConfigError(
                f"{table}: {self.path} cannot be called with {sorted(self._arguments) or 'no arguments'}: {error}",
                f"its signature: {self.path.rpartition(':')[2]}{signature}",
            ) from error


def _nearest_argument(name: str, known: set[str]) -> str:
    return nearest(name, sorted(known)) if known else "it takes none"


def _prepared(value: Any, key: str) -> Any:
    """A factory in place of a table that names one, also inside lists and tables."""
    if isinstance(value, Mapping) and "factory" in value:
        extra = sorted(set(value) - {"factory", "arguments"})
        if extra:
            raise ConfigError(
                f"{key} has a factory, and {', '.join(extra)} beside it",
                f"arguments of the factory belong in {key}.arguments",
            )
        arguments = value.get("arguments", {})
        if not isinstance(arguments, Mapping) or not isinstance(value["factory"], str):
            raise ConfigError(f"{key} is not {{factory = 'package.module:name', arguments = {{...}}}}: {dict(value)!r}")
        return Factory(f"{key}.factory", value["factory"], arguments)
    return value


def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):  # some that are written in C have none
        return None


def _find(key: str, path: str) -> Callable[..., Any]:
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"{key} = {path!r} names no function", "write package.module:name")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise ConfigError(
                f"{key} = {path!r}: there is no module {missing}",
                f"install it, or put it into the current folder ({os.getcwd()}) or beside the config file",
            ) from error
        raise ConfigError(f"{key} = {path!r}: {module_name} imports {missing}, which is missing") from error
    except Exception as error:  # a module's own code may raise anything
        raise ConfigError(
            f"{key} = {path!r}: importing {module_name} failed: {type(error).__name__}: {error}",
            f"try: python -c 'import {module_name}'",
        ) from error
    where = module_name
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            known = [one for one in dir(found) if one[0] != "_" and callable(getattr(found, one, None))]
            raise ConfigError(
                f"{key} = {path!r}: {where} has no {part!r}",
                nearest(part, known) if known else "it has no functions or classes",
            ) from error
        where = f"{where}.{part}"
    if not callable(found):
        raise ConfigError(f"{key} = {path!r} is a {type(found).__name__}, which cannot be called", "name a function")
    made: Callable[..., Any] = found
    return made
