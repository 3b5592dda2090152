"""A mount namespace per process, so that one machine can emulate the memory of several nodes."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NEW_MOUNTS = 0x20000
_BIND, _RECURSIVE, _PRIVATE = 0x1000, 0x4000, 1 << 18


@contextmanager
def memories(folder: Path, count: int) -> Iterator[list[Path]]:
    """The memory of ``count`` nodes, each a tmpfs in ``folder``, for :func:`mount_over`; needs root."""
    paths = [folder / f"node{number}" for number in range(count)]
    for path in paths:
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "outlast-node", path], check=True)
    try:
        yield paths
    finally:
        for path in paths:
            subprocess.run(["umount", path], check=True)


def mount_over(folder: str, place: str) -> None:
    """Mount ``folder`` over ``place`` for this process and its children; needs root.

    Raises:
        OSError: the process lacks the permission.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(_NEW_MOUNTS),
        libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None),
        libc.mount(folder.encode(), place.encode(), None, _BIND, None),
    ):
        if failed:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), place)
