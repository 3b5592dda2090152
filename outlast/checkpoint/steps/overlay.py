"""Steps as a restore would find them if an interrupted overwrite were undone, without changing anything."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

from outlast.checkpoint.format.fields import MAX_DOCUMENT_BYTES
from outlast.checkpoint.format.names import COMMIT, parse_step, replaced_name, step_name
from outlast.checkpoint.memory.pages import Buffer
from outlast.checkpoint.steps.catalog import Scan, scan
from outlast.checkpoint.storage.base import Store

T = TypeVar("T")


def scan_readable(store: Store) -> Scan:
    """As :func:`scan`, but a step whose overwrite was interrupted counts by its older commit.

    Raises:
        OSError: the storage cannot be read.
    """
    scanned = scan(store)
    kept = [
        step
        for step in scanned.replaced
        if step not in scanned.committed and store.exists(f"{replaced_name(step)}/{COMMIT}")
    ]
    return Scan(
        tuple(sorted({*scanned.committed, *kept})),
        tuple(step for step in scanned.uncommitted if step not in kept),
        tuple(kept),
    )


def overlay(store: Store, replaced: Collection[int]) -> Store:
    """The same store, in which some steps are read from where an interrupted overwrite has left their older commit.

    Args:
        store: to read from; what else is done goes to it unchanged.
        replaced: the steps; once they are back in their own folders, they are read from there.
    """
    return cast(Store, _Overlay(store, frozenset(replaced))) if replaced else store


class _Overlay:
    def __init__(self, store: Store, replaced: frozenset[int]) -> None:
        self._store = store
        self._replaced = replaced

    def read(self, path: str, at_most_bytes: int = MAX_DOCUMENT_BYTES) -> Buffer:
        return self._first(path, lambda there: self._store.read(there, at_most_bytes))

    def read_into(self, path: str, out: memoryview, seen: Callable[[memoryview], object], at_most_bytes: int) -> bytes:
        return self._first(path, lambda there: self._store.read_into(there, out, seen, at_most_bytes))

    def exists(self, path: str) -> bool:
        kept = self._kept(path)
        return self._store.exists(path) if kept is None else self._store.exists(kept) or self._store.exists(path)

    def sizes(self, path: str) -> dict[str, int]:
        kept = (self._kept(path) or path).rstrip("/")
        return self._store.sizes(kept if self._store.exists(f"{kept}/{COMMIT}") else path)

    def _kept(self, path: str) -> str | None:
        """The path in the older commit; None if the step has none."""
        folder, _, rest = path.partition("/")
        step = parse_step(folder)
        return f"{replaced_name(step)}/{rest}" if step in self._replaced and step is not None else None

    def _first(self, path: str, read: Callable[[str], T]) -> T:
        kept = self._kept(path)
        if kept is None:
            return read(path)
        try:
            return read(kept)
        except FileNotFoundError:
            # It may be back where it belongs; what the interrupted overwrite has written must not be mixed with it.
            step = parse_step(path.partition("/")[0])
            if step is None or not self._store.exists(f"{step_name(step)}/{COMMIT}"):
                raise
            return read(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)
