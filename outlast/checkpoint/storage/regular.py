"""Opening files by names that somebody else may have placed: regular files only, and never a wait.

A pipe blocks whoever opens it until the other end is opened; a device may do anything; a link leads elsewhere.
"""

from __future__ import annotations

import errno
import os
import stat

from outlast.checkpoint.storage.base import FileTooLarge

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor to read a regular file.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    check_regular(os.lstat(path), path)  # before it is opened: that alone can have an effect on a device
    fd = os.open(path, os.O_RDONLY | _FLAGS)
    try:
        check_regular(os.fstat(fd), path)
    except OSError:
        os.close(fd)
        raise
    return fd


def check_regular(info: os.stat_result, path: str | os.PathLike[str]) -> None:
    """Raise OSError unless what was found at a path is a regular file."""
    if not stat.S_ISREG(info.st_mode):
        kind = _KINDS.get(stat.S_IFMT(info.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))


def read_regular(path: str | os.PathLike[str], at_most_bytes: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        FileTooLarge: it is larger.
        OSError: as :func:`open_regular`.
    """
    fd = open_regular(path)
    with open(fd, "rb", buffering=0) as file:
        size_bytes = os.fstat(fd).st_size
        if size_bytes > at_most_bytes:
            raise FileTooLarge(os.fspath(path), size_bytes, at_most_bytes)
        return file.read(size_bytes)  # reserves as much at once


def create_flags(extra: int = 0) -> int:
    """How to open a file for writing, new or over an older one: a link is not followed, and a pipe not waited for."""
    return os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _FLAGS | extra
