"""Files that an import reads: regular ones, found through links too (a cache of models has them), and never a wait."""

from __future__ import annotations

import os
import stat
from typing import IO

from outlast.checkpoint.storage.regular import check_regular
from outlast.errors import CorruptCheckpoint


def open_source(path: str) -> IO[bytes]:
    """A regular file, or a link to one, for reading.

    Raises:
        OSError: it cannot be opened, or is a pipe, a device, a socket or a folder.
    """
    check_regular(os.stat(path), path)  # before it is opened: that alone can have an effect on a device
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        check_regular(os.fstat(descriptor), path)
        return open(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def read_source(path: str, at_most_bytes: int) -> bytes:
    """The bytes of such a file.

    Raises:
        CorruptCheckpoint: it is larger.
        OSError: as :func:`open_source`.
    """
    with open_source(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > at_most_bytes:
            raise CorruptCheckpoint(f"{path} has {size_bytes} bytes, and at most {at_most_bytes} are read")
        return file.read(size_bytes)


def source_bytes(path: str) -> int:
    """Total size of a file, or of the regular files in a folder and below, links followed once; in bytes."""
    if not os.path.isdir(path):
        return os.stat(path).st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                info = os.stat(os.path.join(folder, name))
            except OSError:  # a link to nothing
                continue
            total += info.st_size if stat.S_ISREG(info.st_mode) else 0
    return total
