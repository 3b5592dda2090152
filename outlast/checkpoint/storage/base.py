"""What a store of checkpoints promises: a few operations with stated durability."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from outlast.checkpoint.memory.pages import Buffer

Bytes = bytes | memoryview


class Store(Protocol):
    """What a checkpoint needs of its storage.

    Every method raises OSError: FileNotFoundError for a missing file, and ConnectionError where the storage as a whole
    does not answer, so that nothing is known about the file.
    """

    url: str

    def prepare(self) -> None:
        """Create the directory where there are such, durably, and find out whether it can be written."""

    def put(self, path: str, parts: Sequence[Bytes]) -> None:
        """Write a file; on return its bytes are durable, its name only after :meth:`sync_dirs`.

        A reader or a crash may see a part of it.
        """

    def put_block(self, path: str, block: memoryview, size_bytes: int) -> None:
        """As :meth:`put`, of the first ``size_bytes`` of a block that begins at a page and is whole pages long."""

    def free_bytes(self) -> int | None:
        """What can still be written, or None where nobody knows."""

    def put_atomic(self, path: str, data: bytes) -> None:
        """Write a file that readers see whole or not at all, before and after a crash; durable on return."""

    def put_new(self, path: str, data: bytes) -> None:
        """As :meth:`put_atomic`, where no file is; FileExistsError if there is one with other bytes.

        Object stores refuse the second of two such writes themselves; a directory is looked at before the rename.
        """

    def sync_dirs(self, paths: Iterable[str]) -> None:
        """Make the names of these files, and of all directories on the way to them, durable."""

    def read(self, path: str) -> Buffer:
        """A file's bytes, writable."""

    def read_into(self, path: str, out: memoryview, seen: Callable[[memoryview], object]) -> bytes:
        """Read a file to where its first bytes belong, and return those for which ``out`` has no room.

        ``seen`` is called with one piece of ``out`` after the other, as they come. A file that is shorter than ``out``
        leaves the rest of it as it was.
        """

    def names(self, path: str) -> list[str]:
        """What lies in a directory, sorted; empty where there is none."""

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""

    def sizes(self, path: str) -> dict[str, int]:
        """Sizes in bytes of all files below a directory, by path relative to it."""

    def remove(self, path: str) -> None:
        """Remove a file, durably; no error where there is none."""

    def remove_tree(self, path: str) -> None:
        """Remove a directory and all below; its commit record first, so that no half of it looks complete."""

    def move_tree(self, old: str, new: str) -> None:
        """Give a directory another name, which nothing has; OSError if something does.

        A crash leaves all of it under one name at least, and nothing that looks complete and is not.
        """
