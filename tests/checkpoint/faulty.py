"""A store like an object store whose operations a test can watch, delay and let fail, or replay up to any of them.

``faulty://PLACE/...`` keeps its objects in fsspec's memory file system. Each operation of the client goes through the
place's :class:`Place`, which tests set up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

CHANGES = ("pipe_file", "cp_file", "rm_file", "rm")

Around = Callable[[str, str, Callable[[], Any]], Any]
"""Called with an operation's name, the path (of a copy the new one) and what does it; its result is the operation's."""


PLACES: dict[str, Place] = {}
"""By name, for the URL to find."""


class Place:
    """Objects, and what happens around each operation on them.

    Attributes:
        url: of a checkpoint there.
        around: what happens.
        conditional: whether a write that asks for it is refused where there is an object.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = f"faulty://{name}/run"
        self.around: Around = lambda name, path, do: do()
        self.conditional = True
        self.lock = threading.RLock()
        PLACES[name] = self
        fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)

    def files(self) -> dict[str, bytes]:
        """All objects by path."""
        memory = MemoryFileSystem()
        with self.lock:
            return {path: memory.cat_file(path) for path in memory.find(f"/{self.name}")}

    def fill(self, files: dict[str, bytes]) -> None:
        """Have these objects and no others."""
        self.clear()
        memory = MemoryFileSystem()
        for path, data in files.items():
            memory.pipe_file(path, data)

    def clear(self) -> None:
        """Have none."""
        memory = MemoryFileSystem()
        if memory.exists(f"/{self.name}"):
            memory.rm(f"/{self.name}", recursive=True)


class FaultyFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """What fsspec makes of the URL. ``find`` and the like are fsspec's own, made of these."""

    protocol = "faulty"
    cachable = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._memory = MemoryFileSystem()

    def _do(self, name: str, path: str, *args: Any, **options: Any) -> Any:
        path = str(self._strip_protocol(path))
        place = PLACES[path.partition("/")[0]]
        full = [f"/{path}", *args]
        return place.around(name, path.partition("/")[2], lambda: getattr(self._memory, name)(*full, **options))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> Any:
        place = PLACES[str(self._strip_protocol(path)).partition("/")[0]]
        return self._do("pipe_file", path, bytes(value), mode=mode if place.conditional else "overwrite")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        return self._do("cat_file", path, start, end)

    def info(self, path: str, **options: Any) -> Any:
        found = self._do("info", path)
        return {**found, "name": found["name"].lstrip("/")}

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        found = [{**entry, "name": entry["name"].lstrip("/")} for entry in self._do("ls", path, detail=True)]
        return found if detail else [entry["name"] for entry in found]

    def cp_file(self, path1: str, path2: str, **options: Any) -> Any:
        path2 = str(self._strip_protocol(path2))
        place = PLACES[path2.partition("/")[0]]
        old = f"/{self._strip_protocol(path1)}"
        return place.around(
            "cp_file", path2.partition("/")[2], lambda: self._memory.pipe_file(f"/{path2}", self._memory.cat_file(old))
        )

    def rm_file(self, path: str) -> Any:
        return self._do("rm_file", path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> Any:
        return self._do("rm", path, recursive=recursive)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        del path, exist_ok
