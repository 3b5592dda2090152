"""Modules that are imported on first access as an attribute of their package (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType


def lazy_modules(package: str, names: Sequence[str]) -> Callable[[str], ModuleType]:
    """A ``__getattr__`` for ``package`` that imports its modules ``names`` on first use."""

    def getattr_(name: str) -> ModuleType:
        if name in names:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattr_
