"""Where a run's shared memory lies, and how a file in it is mapped.

Shared memory is a folder of plain files on ``/dev/shm``: the launcher finds the files of its ranks by name, a process
that is stopped or killed leaves them readable, and they cost no disk traffic. Times in them are ``CLOCK_MONOTONIC``,
which all processes of one machine share.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import struct
from pathlib import Path

from outlast.errors import DiagnosticsError

SHM_ROOT = Path("/dev/shm")
WORD_BYTES = 8


def shm_directory(run_dir: Path | str) -> Path:
    """The folder of shared memory that belongs to ``run_dir``: ``/dev/shm/outlast-<uid>-<hash of the path>``.

    It is created with mode 0700 if it does not exist. The name can be guessed and ``/dev/shm`` is open to everyone, so
    an existing one is used only if it is a real directory, ours, and closed to others.

    Raises:
        DiagnosticsError: there is no ``/dev/shm``, or the folder is a link, someone else's, or open to others.
    """
    resolved = str(Path(run_dir).resolve())
    folder = SHM_ROOT / f"outlast-{os.getuid()}-{hashlib.sha256(resolved.encode()).hexdigest()[:16]}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass  # judged below, as one that was just made is
    except OSError as error:
        raise DiagnosticsError(
            f"shared memory folder {folder} cannot be made: {error.strerror}",
            f"{SHM_ROOT} must be a writable tmpfs; in a container mount one (docker: --shm-size=1g)",
        ) from error
    _refuse_foreign(folder)
    return folder


def _refuse_foreign(folder: Path) -> None:
    info = folder.lstat()
    fix = f"look at it (ls -ld {folder}); if it is a leftover, remove it"
    if not stat.S_ISDIR(info.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(info.st_mode) else "not a directory"
        raise DiagnosticsError(f"shared memory folder {folder} is {kind}, refused", fix)
    if info.st_uid != os.getuid():
        raise DiagnosticsError(
            f"shared memory folder {folder} belongs to user {info.st_uid}, not {os.getuid()}; refused", fix
        )
    if info.st_mode & 0o077:
        mode = stat.S_IMODE(info.st_mode)
        raise DiagnosticsError(
            f"shared memory folder {folder} has mode {mode:04o}, open to others; refused", f"chmod 700 {folder}"
        )


def ring_path(shm_dir: Path, rank: int) -> Path:
    """The file of ``rank``'s recorder."""
    return shm_dir / f"ring_{rank:05d}"


def heartbeat_path(shm_dir: Path, rank: int) -> Path:
    """The file of ``rank``'s heartbeat."""
    return shm_dir / f"heartbeat_{rank:05d}"


def clear(shm_dir: Path) -> None:
    """Remove all rings and heartbeats and the folder itself; one that does not exist is fine.

    Files of other names are left alone, and the folder with them.

    Raises:
        DiagnosticsError: the folder is a link, someone else's, or open to others.
    """
    if not os.path.lexists(shm_dir):
        return
    _refuse_foreign(shm_dir)
    for pattern in ("ring_*", "heartbeat_*", "new_*"):
        for path in shm_dir.glob(pattern):
            path.unlink(missing_ok=True)
    if not any(shm_dir.iterdir()):
        shm_dir.rmdir()


def create_mapped(path: Path, size_bytes: int) -> mmap.mmap:
    """A new zeroed file of ``size_bytes``, mapped for writing; :func:`publish` then names it ``path``.

    The file is new even if one exists: readers that have the old one mapped keep it, and no reader ever sees a header
    that is being written. The memory is reserved now, since a full tmpfs would otherwise kill the process with SIGBUS
    on a later write.

    Raises:
        DiagnosticsError: it cannot be made, or the shared memory is full.
    """
    temporary = _temporary(path)
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
            return mmap.mmap(fd, size_bytes)
        finally:
            os.close(fd)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DiagnosticsError(
            f"{size_bytes} bytes of shared memory at {path} cannot be had: {error.strerror}",
            f"free some space on {path.parent}, or lower diagnostics.ring_capacity",
        ) from error


def publish(path: Path) -> None:
    """Give the file made by :func:`create_mapped` its name; from here on readers find it."""
    os.replace(_temporary(path), path)


def _temporary(path: Path) -> Path:
    return path.with_name(f"new_{path.name}_{os.getpid()}")


def map_for_reading(path: Path, *, magic: int, version: int, least_bytes: int, what: str) -> mmap.mmap:
    """Map an existing file whose first two words are ``magic`` and ``version``.

    Raises:
        DiagnosticsError: it does not exist, cannot be read, is too short, or is not a ``what`` of this version.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            size_bytes = os.fstat(fd).st_size
            mapped = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ) if size_bytes >= least_bytes else None
        finally:
            os.close(fd)
    except OSError as error:
        raise DiagnosticsError(f"{what} {path} cannot be read: {error.strerror}") from error
    if mapped is None:
        raise DiagnosticsError(f"{path} is no {what}: {size_bytes} bytes, at least {least_bytes} expected")
    found = struct.unpack("=QQ", mapped[: 2 * WORD_BYTES])
    if found != (magic, version):
        mapped.close()
        if found[0] == magic:
            raise DiagnosticsError(f"{path}: {what} of version {found[1]}, this outlast reads {version}")
        raise DiagnosticsError(f"{path} is no {what}: it begins with {found[0]:#018x}, not {magic:#018x}")
    return mapped
