"""Whether a run uses this node's memory: each Checkpointer holds a lock, which the kernel lets go of when it dies.

The lock is on the folder itself, so that there is no file more that would have to go at a run's end.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outlast.checkpoint.tiers.slots import SHM_ROOT, memory_folder
from outlast.errors import CheckpointError

_LOCKS = Path("/proc/locks")
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class RunLock:
    """A run's use of the memory for the checkpoints at ``url``, until it is closed or let go of, or its process dies.

    Args:
        url: of the checkpoints.
        root: of shared memory.

    Attributes:
        folder: of this node's memory; made where it is missing.

    Raises:
        CheckpointError: see :func:`memory_folder`.
    """

    def __init__(self, url: str, root: Path = SHM_ROOT) -> None:
        while True:
            self.folder = memory_folder(url, root)
            try:
                fd = os.open(self.folder, _OPEN)
            except FileNotFoundError:  # removed at this moment, as in the end of a run or by hand
                continue
            fcntl.flock(fd, fcntl.LOCK_SH)
            if _is_at(fd, self.folder):
                break
            os.close(fd)
        self.close = weakref.finalize(self, os.close, fd)


def is_used(folder: Path) -> bool:
    """Whether a run uses the memory in a folder."""
    with _opened(folder) as fd:
        return fd is not None and not _locked(fd)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """See that no run uses the memory in a folder, and that none begins to.

    Raises:
        CheckpointError: one does; names its processes.
    """
    with _opened(folder) as fd:
        if fd is not None and not _locked(fd):
            pids = ", ".join(map(str, _holders(fd)))
            raise CheckpointError(
                f"{folder} is in use by a run" + (f" (processes {pids})" if pids else ""),
                "nothing was removed; end the run first, or let it end: it gives back what storage has, too",
            )
        yield


@contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    try:
        fd = os.open(folder, _OPEN)
    except FileNotFoundError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    """Lock it for this process alone; False: others hold it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, folder: Path) -> bool:
    """Whether it is still the folder of that name."""
    try:
        there = folder.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def _holders(fd: int) -> list[int]:
    """Processes that hold a lock on it, as far as the kernel tells."""
    about = os.fstat(fd)
    place = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    try:
        lines = [line.split() for line in _LOCKS.read_text().splitlines()]
    except FileNotFoundError:
        return []
    return sorted({int(words[4]) for words in lines if words[1] == "FLOCK" and words[5] == place and int(words[4]) > 0})
