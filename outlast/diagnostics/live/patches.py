"""Changing a module of the program's own, as soon as the program has imported it, and no sooner."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class AfterImport(MetaPathFinder):
    """Calls a function with a module once: at once if it is imported, else right after, in the thread that imports it.

    Args:
        name: of the module.
        then: what to call.
    """

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._then = then

    def install(self) -> None:
        """Call it, or begin to look out for the import."""
        module = sys.modules.get(self._name)
        if module is not None:
            self._then(module)
        else:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Do not look out any more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's spec, with a loader that calls the function too; None for any other module."""
        if fullname != self._name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        spec.loader = _ThenCall(spec.loader, self._call)
        return spec

    def _call(self, module: ModuleType) -> None:
        self.remove()
        self._then(module)


class _ThenCall(Loader):
    def __init__(self, loader: Loader, then: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._then = then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._then(module)


def hide_from_compile(*functions: Any) -> None:
    """torch.compile shall leave these, and what they call, as they are. Nothing of it is imported for this."""
    frames = importlib.import_module("torch._C._dynamo.eval_frame")
    try:
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        for one in functions:
            one._torchdynamo_disable = True
            frames.set_code_exec_strategy(one.__code__, skip)
    except AttributeError:  # another version of torch, which compiles them, to the same results
        return
