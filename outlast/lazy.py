"""What is imported on first access as an attribute of its package (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_modules(package: str, names: Sequence[str], held: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """A ``__getattr__`` for ``package`` that imports its modules ``names`` on first use.

    Args:
        package: its dotted name.
        names: of its modules.
        held: names of other things, each with the module that holds it.
    """

    def getattr_(name: str) -> Any:
        if name in names:
            return import_module(f"{package}.{name}")
        if held is not None and name in held:
            return getattr(import_module(f"{package}.{held[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattr_
