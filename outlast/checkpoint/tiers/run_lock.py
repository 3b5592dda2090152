"""Whether a run uses this node's memory: each Checkpointer has a lock, which the kernel releases when the process dies.

The lock is on the folder itself, so there is no lock file to remove when a run ends.
"""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outlast.checkpoint.tiers.folders import SHM_ROOT, memory_folder
from outlast.errors import CheckpointError

_LOCKS = Path("/proc/locks")
_SHARE_S = 60.0
_PAUSE_S = 0.01
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class RunLock:
    """Marks the memory for the checkpoints at ``url`` as in use, until it is closed or collected, or its process dies.

    Args:
        url: of the checkpoints.
        root: of shared memory.
        name: see :func:`memory_folder`.

    Attributes:
        folder: of this node's memory; it is made if it is missing.

    Raises:
        CheckpointError: see :func:`memory_folder`.
    """

    def __init__(self, url: str, root: Path = SHM_ROOT, name: str | None = None) -> None:
        while True:
            self.folder = memory_folder(url, root, name)
            try:
                fd = os.open(self.folder, _OPEN)
            except FileNotFoundError:  # just removed, at the end of a run or by hand
                continue
            try:
                _share(fd, self.folder)
            except BaseException:
                os.close(fd)
                raise
            if _is_at(fd, self.folder):
                break
            os.close(fd)
        self.close = weakref.finalize(self, os.close, fd)


def _share(fd: int, folder: Path) -> None:
    """Lock it with others; whoever has it locked alone only removes files."""
    deadline = time.monotonic() + _SHARE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                pids = ", ".join(map(str, _holders(fd)))
                raise CheckpointError(
                    f"{folder} has been locked for {_SHARE_S:g} s by processes that remove what is in it ({pids})",
                    "wait until `outlast ckpt memory` there has ended, or end it",
                ) from error
            time.sleep(_PAUSE_S)
        else:
            return


def is_used(folder: Path) -> bool:
    """Whether a run uses the memory in a folder."""
    with _opened(folder) as fd:
        return fd is not None and not _locked(fd)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make sure that no run uses the memory in a folder, nor begins to use it while the context lasts.

    Raises:
        CheckpointError: a run uses it; names its processes.
    """
    with _opened(folder) as fd:
        if fd is not None and not _locked(fd):
            pids = ", ".join(map(str, _holders(fd)))
            raise CheckpointError(
                f"{folder} is in use by a run" + (f" (processes {pids})" if pids else ""),
                "nothing was removed; stop the run, or let it finish: it gives back itself what is in storage, too",
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
    """Lock it for this process alone; False: others have it locked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, folder: Path) -> bool:
    """Whether the open folder is still the one of that name."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), status)


def _holders(fd: int) -> list[int]:
    """The processes that have it locked, as far as the kernel lists them."""
    status = os.fstat(fd)
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = [line.split() for line in _LOCKS.read_text().splitlines()]
    except FileNotFoundError:
        return []
    return sorted({int(words[4]) for words in lines if words[1] == "FLOCK" and words[5] == inode and int(words[4]) > 0})
