"""Where a run's shared memory is, and how a file in it is mapped.

Shared memory is a folder of plain files on ``/dev/shm``: the launcher finds its ranks' files by name, they stay
readable when a process is stopped or killed, and they cause no disk traffic. Times in them are ``CLOCK_MONOTONIC``,
which all processes of one machine share.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import socket
import stat
import struct
from pathlib import Path

from outlast.diagnostics.live.run_key import KEY_FILE, run_key
from outlast.errors import DiagnosticsError, SharedMemoryFull

SHM_ROOT = Path("/dev/shm")
WORD_BYTES = 8
NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)


def shm_directory(run_dir: Path | str) -> Path:
    """The folder of shared memory that belongs to ``run_dir``: ``/dev/shm/outlast-<uid>-<hash>``.

    The hash is of the path, of a random key in the run's directory that only this user can read, and of the machine:
    ``/dev/shm`` is open to everyone, and whoever could guess the name could make the folder first. It is created with
    mode 0700 if it does not exist. An existing folder is used only if it is a real directory, owned by this user, and
    closed to others.

    Raises:
        DiagnosticsError: there is no ``/dev/shm``, the folder is a link, another user's, or open to others, or the key
            can be neither read nor made.
    """
    folder = _folder(Path(run_dir).resolve())
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass  # checked below
    except OSError as error:
        raise DiagnosticsError(
            f"shared memory folder {folder} cannot be created: {error.strerror}",
            f"make sure {SHM_ROOT} is a writable tmpfs; in a container, mount one (docker: --shm-size=1g)",
        ) from error
    _refuse_foreign(folder)
    return folder


def find_shm_directory(run_dir: Path | str) -> Path | None:
    """The same, if this machine has it; nothing is made, not even the key.

    Raises:
        DiagnosticsError: the folder is a link, another user's, or open to others, or the key cannot be read.
    """
    resolved = Path(run_dir).resolve()
    if not os.path.lexists(resolved / KEY_FILE):
        return None
    folder = _folder(resolved)
    if not os.path.lexists(folder):
        return None
    _refuse_foreign(folder)
    return folder


def _folder(resolved: Path) -> Path:
    named = f"{resolved}\n{run_key(resolved)}\n{_boot_id()}"
    return SHM_ROOT / f"outlast-{os.getuid()}-{hashlib.sha256(named.encode()).hexdigest()[:16]}"


def _boot_id() -> str:
    """Differs between machines that share a run's directory: a name seen on one does not tell that on another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def remove_if_empty(folder: Path) -> None:
    """Remove a run's folder of shared memory, unless a peer has done so or has something in it still."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise


def _refuse_foreign(folder: Path) -> None:
    info = folder.lstat()
    fix = f"inspect it with ls -ld {folder}, and remove it if it is a leftover"
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
    """Remove all rings and heartbeats, and the folder unless it has other files. The folder need not exist.

    Raises:
        DiagnosticsError: the folder is a link, another user's, or open to others.
    """
    if not os.path.lexists(shm_dir):
        return
    _refuse_foreign(shm_dir)
    for pattern in ("ring_*", "heartbeat_*", "unwatched_*", "new_*"):
        for path in shm_dir.glob(pattern):
            path.unlink(missing_ok=True)
    remove_if_empty(shm_dir)


def create_mapped(path: Path, size_bytes: int) -> mmap.mmap:
    """A new zeroed file of ``size_bytes``, mapped for writing; :func:`publish` then renames it to ``path``.

    The file is new even if one exists: readers that have mapped the old one keep it, and no reader sees an incomplete
    header. The memory is reserved at once, because on a full tmpfs a later write would kill the process with SIGBUS.

    Raises:
        SharedMemoryFull: there is no room.
        DiagnosticsError: it cannot be created.
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
        kind = SharedMemoryFull if error.errno in NO_ROOM else DiagnosticsError
        raise kind(
            f"cannot allocate {size_bytes} bytes of shared memory at {path}: {error.strerror}",
            f"free space on {path.parent}, or lower diagnostics.ring_capacity",
        ) from error


def publish(path: Path) -> None:
    """Rename the file of :func:`create_mapped` to ``path``, where readers find it."""
    os.replace(_temporary(path), path)


def _temporary(path: Path) -> Path:
    return path.with_name(f"new_{path.name}_{os.getpid()}")


def map_for_reading(path: Path, *, magic: int, version: int, least_bytes: int, what: str) -> mmap.mmap:
    """Map an existing file whose first two words are ``magic`` and ``version``.

    Raises:
        DiagnosticsError: it does not exist, cannot be read, is too short, or is not ``what`` of this version.
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
        raise DiagnosticsError(f"{path} is not a {what}: it has {size_bytes} bytes, expected at least {least_bytes}")
    header = struct.unpack("=QQ", mapped[: 2 * WORD_BYTES])
    if header != (magic, version):
        mapped.close()
        if header[0] == magic:
            raise DiagnosticsError(f"{path}: {what} of version {header[1]}; this version of outlast reads {version}")
        raise DiagnosticsError(f"{path} is not a {what}: it starts with {header[0]:#018x}, not {magic:#018x}")
    return mapped
