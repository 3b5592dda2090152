"""The file or folder that an export writes: it appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from outlast.checkpoint.convert.dcp import METADATA
from outlast.checkpoint.storage.local import sync_dir
from outlast.errors import CheckpointError, OutlastError


def check_link(path: str) -> None:
    """Raise :class:`CheckpointError` if a target as it was given is a link to nothing: others may have put it there."""
    if os.path.islink(path) and not os.path.exists(path):
        raise CheckpointError(
            f"{path} is a symbolic link to {os.readlink(path)}, which does not exist",
            "remove the link, or pass the file that is to be made",
        )


def check_target(path: str, *, folder: bool, force: bool) -> None:
    """Raise :class:`CheckpointError` unless a target can be made, or may be replaced.

    Args:
        path: absolute, without symbolic links.
        folder: whether it will be a folder; otherwise a file.
        force: allow a file to be replaced by a file, and a ``dcp`` checkpoint by a folder.
    """
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        raise CheckpointError(f"the folder {parent} does not exist", "make it, or pass another target")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"nothing can be made in the folder {parent}", "fix its permissions, or pass another target"
        )
    if not os.path.lexists(path):
        return
    if not (os.path.isdir(path) or os.path.isfile(path)) or os.path.ismount(path):
        kind = "a mounted file system" if os.path.ismount(path) else "no regular file (a link, device, pipe or socket)"
        raise CheckpointError(f"{path} is {kind}, which an export does not replace", "pass another target")
    if not force:
        raise CheckpointError(f"{path} already exists", "pass another target, or --force to replace it")
    is_folder = os.path.isdir(path)
    if is_folder and not (folder and os.path.isfile(os.path.join(path, METADATA))):
        what = "a folder that is not a dcp checkpoint" if folder else "a folder, not a file"
    elif folder and not is_folder:
        what = "a file, not a folder"
    else:
        return
    raise CheckpointError(f"{path} is {what}; --force does not replace that", "pass another target")


@contextmanager
def new_target(path: str, *, folder: bool, force: bool) -> Iterator[str]:
    """Yield a temporary name to write the target under; on exit it is renamed, durably.

    If anything fails, what was written is removed, and an existing target is untouched.

    Raises:
        CheckpointError: something within failed; names the target.
    """
    temporary = _beside(path, "tmp")
    try:
        yield temporary
        check_target(path, folder=folder, force=force)
        _take_mode(temporary)
        _publish(temporary, path)
    except OutlastError as error:
        if isinstance(error, CheckpointError) and path not in error.what:
            raise type(error)(f"{path} cannot be written: {error.what}", error.fix) from error
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}", "check the disk and its permissions; nothing is left of the attempt"
        ) from error
    finally:
        _discard(temporary)


def size_of(path: str) -> int:
    """Size in bytes of a file, or of all files in a folder."""
    if not os.path.isdir(path):
        return os.stat(path).st_size
    return sum(os.stat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)


def _publish(temporary: str, path: str) -> None:
    old = None
    if os.path.isdir(path):
        old = _beside(path, "old")
        os.rename(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        if old is not None:
            os.rename(old, path)
        raise
    sync_dir(os.path.dirname(path))
    if old is not None:
        _discard(old)


def _take_mode(path: str) -> None:
    """Give files the mode that new ones have here (by umask, or by the folder), whatever wrote them and how."""
    probe = _beside(path, "mode")
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        os.unlink(probe)
    files = (
        [path]
        if not os.path.isdir(path)
        else [os.path.join(at, name) for at, _, names in os.walk(path) for name in names]
    )
    for file in files:
        os.chmod(file, mode)


def _beside(path: str, end: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name[:50]}.{uuid.uuid4().hex[:8]}.{end}")


def _discard(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)
