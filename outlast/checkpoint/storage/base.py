"""What a store of checkpoints promises: a few operations with stated durability."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from outlast.checkpoint.format.fields import MAX_DOCUMENT_BYTES
from outlast.checkpoint.memory.pages import Buffer

Bytes = bytes | memoryview


class FileTooLarge(OSError):
    """A file has more bytes than it may have.

    Args:
        path: of the file.
        size_bytes: that it has.
        at_most_bytes: that it may have.
    """

    def __init__(self, path: str, size_bytes: int, at_most_bytes: int) -> None:
        super().__init__(errno.EFBIG, f"it has {size_bytes} bytes; at most {at_most_bytes} are read", path)
        self.size_bytes = size_bytes


class Store(Protocol):
    """What a checkpoint needs from its storage.

    Paths are relative to the store's URL, with ``/`` between components; ``""`` is the URL itself. Methods may be
    called from several threads. On failure they raise OSError: FileNotFoundError for a missing file, ConnectionError if
    the storage as a whole does not answer, which says nothing about the file. A buffer that is passed in may be reused
    once the method returns.
    """

    url: str

    def check(self) -> None:
        """Check that the directory exists or can be made, as far as that can be told without writing."""

    def prepare(self) -> None:
        """Create the directory durably, where the storage has directories, and check that it can be written."""

    def put(self, path: str, parts: Sequence[Bytes]) -> None:
        """Write a file; its bytes are durable on return, its name only after :meth:`sync_dirs`.

        Readers, and a restart after a crash, may see a part of it.
        """

    def put_block(self, path: str, block: memoryview, size_bytes: int) -> None:
        """As :meth:`put`, for the first ``size_bytes`` of a block that is page-aligned and whole pages long."""

    def free_bytes(self) -> int | None:
        """How much can still be written, or None if that is unknown."""

    def put_atomic(self, path: str, data: bytes) -> None:
        """Write a file that readers see whole or not at all, before and after a crash; durable on return."""

    def put_new(self, path: str, data: bytes) -> None:
        """As :meth:`put_atomic`, for a new file; raises FileExistsError if one with other bytes exists.

        Object stores reject the second of two such writes themselves; a local directory is checked before the rename.
        """

    def create(self, path: str, data: bytes) -> None:
        """Write a small file that did not exist; raises FileExistsError if it does, whatever is in it.

        Of several that create the same file at once, one succeeds. Readers may see a part of it, or nothing in it, for
        a moment. Not durable: it says what is so while its writer lives.
        """

    def create_whole(self, path: str, data: bytes) -> None:
        """As :meth:`create`, but readers see the file whole or not at all, and it is durable on return.

        Raises:
            FileExistsError: it exists with other bytes. One with the same bytes is taken for this very write, whose
                answer was lost, so what is written should be unlike what anybody else writes.
        """

    def overwrite(self, path: str, data: bytes) -> None:
        """Write a small file again, with as many bytes as it has; raises FileNotFoundError if its folder is gone.

        Needs no room on a disk. Not durable, and readers may see a part of it.
        """

    def sync_dirs(self, paths: Iterable[str]) -> None:
        """Make the names of these files, and of all directories that lead to them, durable."""

    def read(self, path: str, at_most_bytes: int = MAX_DOCUMENT_BYTES) -> Buffer:
        """A file's bytes, writable.

        Raises:
            FileTooLarge: it is larger; nothing is read, and no memory taken.
            OSError: see the class, and where the name is a link, a pipe, a device or a folder.
        """

    def read_into(self, path: str, out: memoryview, seen: Callable[[memoryview], object], at_most_bytes: int) -> bytes:
        """Read the first bytes of a file into ``out``, and return the rest; raises as :meth:`read` does.

        ``seen`` is called with each piece of ``out`` in turn, as soon as it is read. If the file is shorter than
        ``out``, the rest of ``out`` is unchanged.
        """

    def names(self, path: str) -> list[str]:
        """The names in a directory, sorted; empty if it does not exist."""

    def exists(self, path: str) -> bool:
        """Whether there is a file, or what is taken for one until it is read: a link, a pipe."""

    def sizes(self, path: str) -> dict[str, int]:
        """Sizes in bytes of all files below a directory, by path relative to it."""

    def remove(self, path: str) -> None:
        """Remove a file, durably; no error if it does not exist."""

    def remove_tree(self, path: str) -> None:
        """Remove a directory and everything below it; the commit record first, so that no part looks complete.

        Links are removed, and never followed.
        """

    def move_tree(self, old: str, new: str) -> None:
        """Rename a directory; raises OSError if the new name exists.

        After a crash all of it has at least one of the names, and nothing looks complete that is not.
        """
