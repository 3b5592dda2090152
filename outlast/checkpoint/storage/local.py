"""Checkpoints in a local directory, or one that a network file system mounts."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from outlast.checkpoint.format.fields import MAX_DOCUMENT_BYTES
from outlast.checkpoint.format.names import COMMIT
from outlast.checkpoint.memory.pages import CACHED_BYTES, Buffer, allocate
from outlast.checkpoint.storage.base import Bytes, FileTooLarge
from outlast.checkpoint.storage.regular import create_flags, open_regular

DIRECT_FROM_BYTES = 1 << 20
"""Blocks of at least this size bypass the page cache, where the file system supports it."""
_DIRECT_BYTES = 16 << 20
"""Size of one such write."""


class LocalStore:
    """See :class:`outlast.checkpoint.storage.base.Store`.

    A file is fsynced before its name, and a name before anything that refers to it.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(os.path.expanduser(root))
        self.url = self.root
        self._direct = True

    def check(self) -> None:
        path = Path(self.root)
        while not os.path.lexists(path):
            path = path.parent
        if not path.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.root)
        if str(path) != self.root:
            _check_writable(str(path), self.root)

    def prepare(self) -> None:
        missing = []
        path = Path(self.root)
        while not path.exists():
            missing.append(path)
            path = path.parent
        os.makedirs(self.root, exist_ok=True)
        for made in missing:
            sync_dir(str(made.parent))
        _check_writable(self.root, self.root)

    def put(self, path: str, parts: Sequence[Bytes]) -> None:
        _write(self._at(path), parts)

    def put_block(self, path: str, block: memoryview, size_bytes: int) -> None:
        full = self._at(path)
        if self._direct and size_bytes >= DIRECT_FROM_BYTES:
            try:
                _write_direct(full, block, size_bytes)
                return
            except OSError as error:
                # tmpfs and some network file systems do not support O_DIRECT.
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._direct = False
        _write(full, [block[:size_bytes]])

    def free_bytes(self) -> int | None:
        info = os.statvfs(self.root)
        return info.f_bavail * info.f_frsize

    def put_atomic(self, path: str, data: bytes) -> None:
        final = self._at(path)
        folder, temporary = os.path.dirname(final), _beside(final)
        try:
            _write(temporary, [data])
            os.replace(temporary, final)
        except OSError:
            _unlink(temporary)
            raise
        sync_dir(folder)

    def put_new(self, path: str, data: bytes) -> None:
        final = self._at(path)
        if os.path.lexists(final) and bytes(self.read(path)) != data:
            raise FileExistsError(errno.EEXIST, "written by another attempt, or a late rank of one", final)
        self.put_atomic(path, data)

    def create(self, path: str, data: bytes) -> None:
        full = self._at(path)
        fd = _create(full, os.O_EXCL)
        try:
            os.pwrite(fd, data, 0)
        except OSError:
            _unlink(full)
            raise
        finally:
            os.close(fd)

    def create_whole(self, path: str, data: bytes) -> None:
        final = self._at(path)
        temporary = _beside(final)
        try:
            _write(temporary, [data])
            # Unlike a rename, a link fails if the name exists, over NFS too.
            os.link(temporary, final)
        except FileExistsError:
            if bytes(self.read(path)) != data:
                raise
        finally:
            _unlink(temporary)
        sync_dir(os.path.dirname(final))

    def overwrite(self, path: str, data: bytes) -> None:
        fd = os.open(self._at(path), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.pwrite(fd, data, 0)
        finally:
            os.close(fd)

    def sync_dirs(self, paths: Iterable[str]) -> None:
        folders = {""}
        for path in paths:
            folder = os.path.dirname(path)
            while folder and folder not in folders:
                folders.add(folder)
                folder = os.path.dirname(folder)
        # Deepest first: once a name is durable, everything below it is.
        for folder in sorted(folders, key=len, reverse=True):
            sync_dir(self._at(folder))

    def read(self, path: str, at_most_bytes: int = MAX_DOCUMENT_BYTES) -> Buffer:
        fd = self._opened(path, at_most_bytes)
        with open(fd, "rb", buffering=0) as file:
            data = allocate(os.fstat(fd).st_size)
            view, done = data.data, 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    break
                done += count
        return data[:done]

    def read_into(self, path: str, out: memoryview, seen: Callable[[memoryview], object], at_most_bytes: int) -> bytes:
        with open(self._opened(path, at_most_bytes), "rb", buffering=0) as file:
            done = 0
            while done < len(out):
                count = file.readinto(out[done : done + CACHED_BYTES])
                if not count:
                    return b""
                seen(out[done : done + count])
                done += count
            return file.read(max(0, at_most_bytes - done)) or b""

    def _opened(self, path: str, at_most_bytes: int) -> int:
        fd = open_regular(self._at(path))
        size_bytes = os.fstat(fd).st_size
        if size_bytes > at_most_bytes:
            os.close(fd)
            raise FileTooLarge(self._at(path), size_bytes, at_most_bytes)
        return fd

    def names(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(self._at(path)))
        except FileNotFoundError:
            return []

    def exists(self, path: str) -> bool:
        try:
            return not stat.S_ISDIR(os.lstat(self._at(path)).st_mode)
        except OSError:
            return False

    def sizes(self, path: str) -> dict[str, int]:
        top = self._at(path)
        sizes = {}
        for folder, _, files in os.walk(top, onerror=_raise):
            for name in files:
                full = os.path.join(folder, name)
                sizes[os.path.relpath(full, top)] = os.lstat(full).st_size
        return sizes

    def remove(self, path: str) -> None:
        full = self._at(path)
        if _unlink(full):
            sync_removal(os.path.dirname(full))

    def remove_tree(self, path: str) -> None:
        if os.path.islink(self._at(path)):  # what it leads to is somebody else's: an archive, say
            self.remove(path)
            return
        self.remove(f"{path}/{COMMIT}")
        # Then the votes: while all of them exist, the step looks as if only its record were missing, and is kept.
        shutil.rmtree(self._at(f"{path}/votes"), ignore_errors=True)
        for attempt in range(3):
            try:
                shutil.rmtree(self._at(path))
                break
            except FileNotFoundError:
                if not os.path.exists(self._at(path)):
                    break
            except OSError as error:
                # Another rank may still be writing there for an abandoned save.
                if error.errno != errno.ENOTEMPTY or attempt == 2:
                    raise
            time.sleep(0.01)
        sync_dir(self.root)

    def move_tree(self, old: str, new: str) -> None:
        folder = os.path.dirname(self._at(new))
        if folder != self.root and not os.path.isdir(folder):
            os.makedirs(folder)
        os.rename(self._at(old), self._at(new))
        if folder != self.root:
            sync_dir(folder)
        sync_dir(self.root)

    def _at(self, path: str) -> str:
        return os.path.join(self.root, path) if path else self.root


def _beside(path: str) -> str:
    """A name next to a file that no other thread or process of this host uses."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{socket.gethostname()}-{os.getpid()}-{threading.get_native_id()}.tmp")


def _create(path: str, extra_flags: int = 0) -> int:
    """An empty file, opened for writing; its directory is made if it is missing."""
    flags = create_flags(extra_flags)
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, flags, 0o666)


def _write_direct(path: str, block: memoryview, size_bytes: int) -> None:
    """Bypass the page cache: it is faster, and leaves memory bandwidth and the cache to training.

    The block is whole pages; the file is then truncated to its size.
    """
    fd = _create(path, os.O_DIRECT)
    try:
        # A full disk fails here, before anything is written.
        os.posix_fallocate(fd, 0, len(block))
        at = 0
        while at < len(block):
            at += os.pwrite(fd, block[at : at + _DIRECT_BYTES], at)
        os.ftruncate(fd, size_bytes)
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(path: str, parts: Sequence[Bytes]) -> None:
    fd = _create(path)
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_writable(folder: str, named: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number), named)


def sync_dir(path: str) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_removal(path: str) -> None:
    """As :func:`sync_dir`, after names were removed; one that somebody else has removed since took them along."""
    with suppress(FileNotFoundError):
        sync_dir(path)


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def _raise(error: OSError) -> None:
    raise error
