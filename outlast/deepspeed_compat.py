"""Whether DeepSpeed is the one outlast knows, before outlast replaces methods of its objects."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from outlast.errors import MissingDependency, OutlastError

TESTED_VERSION = "0.19.8"


def import_deepspeed(*modules: str) -> tuple[Any, ...]:
    """DeepSpeed, and modules of it by name below ``deepspeed.``.

    Raises:
        MissingDependency: one of them cannot be imported.
    """
    try:
        return tuple(import_module(name) for name in ("deepspeed", *(f"deepspeed.{module}" for module in modules)))
    except ImportError as error:
        raise MissingDependency(f"DeepSpeed cannot be imported: {error}", "pip install 'outlast[deepspeed]'") from error


def is_engine(model: Any) -> bool:
    """Whether it is a DeepSpeed engine; recognised without importing deepspeed, which has been imported if it is."""
    engine = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    return engine is not None and isinstance(model, engine)


def check_engine(engine: Any, deepspeed: Any, error_type: type[OutlastError]) -> None:
    """Raise ``error_type`` unless it is an engine of DeepSpeed's."""
    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise error_type(
            f"{type(engine).__name__} is not a DeepSpeedEngine", "pass the engine that deepspeed.initialize returns"
        )


@contextmanager
def known_attributes(deepspeed: Any, error_type: type[OutlastError]) -> Iterator[None]:
    """An ``AttributeError`` within means a DeepSpeed that outlast does not know; raise ``error_type`` for it."""
    try:
        yield
    except AttributeError as error:
        raise error_type(
            f"deepspeed {deepspeed.__version__} does not have what outlast expects: {error}",
            f"use deepspeed {TESTED_VERSION}",
        ) from error


def check_method(owner: Any, method: str, arguments: tuple[str, ...], error_type: type[OutlastError]) -> None:
    """Raise ``error_type`` unless a method takes these arguments, and is the class's own rather than replaced."""
    function = getattr(type(owner), method, None)
    signature = tuple(inspect.signature(function).parameters)[1:] if callable(function) else None
    replaced = method in vars(owner)
    if signature != arguments or replaced:
        problem = "is already replaced" if replaced else f"takes {signature}, expected {arguments}"
        raise error_type(
            f"DeepSpeed's {type(owner).__name__}.{method} {problem}",
            f"attach once; outlast is tested with deepspeed {TESTED_VERSION}",
        )
