"""Checkpoints at any fsspec URL: object stores, and file systems that behave like one.

Objects appear whole and are durable once written, as object stores promise. Transient failures are retried by
:mod:`outlast.checkpoint.storage.retry` alone: the two retry layers of S3's client are turned off.
"""

from __future__ import annotations

import errno
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec
import numpy as np
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from outlast.checkpoint.format.fields import MAX_DOCUMENT_BYTES
from outlast.checkpoint.format.names import COMMIT
from outlast.checkpoint.storage.base import FileTooLarge
from outlast.checkpoint.storage.retry import retry

if TYPE_CHECKING:
    from outlast.checkpoint.memory.pages import Buffer
    from outlast.checkpoint.storage.base import Bytes

_log = logging.getLogger("outlast.checkpoint")
T = TypeVar("T")

_BUCKETS = {"s3", "s3a", "gs", "gcs"}
"""Protocols without directories. Making one would create the bucket, but a mistyped name must be an error."""
_S3 = ("s3", "s3a")
_OBJECT_CLIENTS = {"s3fs", "gcsfs"}
"""Clients for whose storage there are neither folders nor pipes nor links, only objects."""
_AT_ONCE_BYTES = 64 << 20
"""Objects up to this size are read without asking for their size before; of larger ones so much is read in vain."""

ANSWER_S = 30.0
"""How long a write of no bytes may take."""
_LEAST_BYTES_PER_S = 250_000
"""A write that is slower than this is abandoned. S3's client has no limit for writes: while the server accepts no data,
it waits forever, whatever its timeouts say."""


def open_filesystem(url: str, protocol: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        ImportError: the package for the protocol is missing.
        ValueError: the protocol does not exist.
    """
    options: dict[str, Any] = {}
    if "::" not in protocol and fsspec.get_filesystem_class(protocol).__module__.startswith("obstore."):
        # Registered in place of fsspec's own. It takes arguments that it does not know for settings of the store.
        filesystem, root = fsspec.core.url_to_fs(url, retry_config={"max_retries": 0})
        return filesystem, str(root).rstrip("/")
    if protocol in _S3:
        # The user's settings stay. The timeouts for connecting and for an answer are s3fs's 5 s and 15 s.
        config = dict(fsspec.config.conf.get("s3", {}).get("config_kwargs") or {})
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1, "mode": "standard"}, **config}
    filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    if protocol in _S3:
        filesystem.retries = 1
    return filesystem, str(root).rstrip("/")


class FsspecStore:
    """See :class:`outlast.checkpoint.storage.base.Store`.

    Raises:
        ConnectionError: (all methods) every try failed because the storage did not answer, or not properly.
    """

    def __init__(self, url: str, filesystem: Any, root: str) -> None:
        self.url = url
        self._fs = filesystem
        self._root = root
        self._creates_exclusively = True
        """Whether the storage can reject a write because the file exists."""
        generic = AsyncFileSystem._find if isinstance(filesystem, AsyncFileSystem) else AbstractFileSystem.find
        self._lists_all = getattr(type(filesystem), generic.__name__) is not generic
        self._has_limits = isinstance(filesystem, AsyncFileSystem)
        self._reads_at_once = type(filesystem).__module__.partition(".")[0] in _OBJECT_CLIENTS
        """Whether all that can be read is an object, and a part of it can be asked for without its size."""

    def check(self) -> None:
        return

    def prepare(self) -> None:
        protocol = self._fs.protocol
        if not _BUCKETS & {protocol, *(() if isinstance(protocol, str) else protocol)}:
            self._do("", lambda: self._fs.makedirs(self._root, exist_ok=True))
        # Only a write can tell whether the storage is writable, and whether it creates files exclusively.
        probe = f".outlast-probe-{uuid.uuid4().hex}"
        self.put(probe, [b"first"])
        try:
            self._put_if_absent(probe, b"second")
            self._creates_exclusively = False
        except FileExistsError:
            pass
        except ConnectionError:
            raise
        except OSError:  # the client library does not support it
            self._creates_exclusively = False
        self.remove(probe)
        if not self._creates_exclusively:
            _log.warning(
                "%s cannot create a file exclusively: before a commit, outlast checks that no other attempt has "
                "committed the step, but another attempt could commit it between the check and the commit",
                self.url,
            )

    def put(self, path: str, parts: Sequence[Bytes]) -> None:
        data = b"".join(parts)
        self._do(path, lambda: self._fs.pipe_file(self._at(path), data, **self._within(len(data))))

    def put_block(self, path: str, block: memoryview, size_bytes: int) -> None:
        self.put(path, [block[:size_bytes]])

    def free_bytes(self) -> int | None:
        return None

    def put_atomic(self, path: str, data: bytes) -> None:
        self.put(path, [data])

    def put_new(self, path: str, data: bytes) -> None:
        try:
            if not self._creates_exclusively and self.exists(path):
                raise FileExistsError(errno.EEXIST, f"{self.url}/{path}")
            self._put_if_absent(path, data)
        except FileExistsError as error:
            # If only the answer to a write is lost, the write is retried and rejected because of itself.
            if bytes(self.read(path)) != data:
                raise FileExistsError(
                    errno.EEXIST, f"{self.url}/{path} was written by another attempt, or a late rank of one"
                ) from error

    def create(self, path: str, data: bytes) -> None:
        if not self._creates_exclusively and self.exists(path):
            raise FileExistsError(errno.EEXIST, f"{self.url}/{path}")
        try:
            self._put_if_absent(path, data)
        except FileExistsError:
            # As in put_new: the answer to a write that succeeded may have been lost.
            if bytes(self.read(path)) != data:
                raise

    def create_whole(self, path: str, data: bytes) -> None:
        self.create(path, data)

    def overwrite(self, path: str, data: bytes) -> None:
        self.put(path, [data])

    def sync_dirs(self, paths: Iterable[str]) -> None:
        del paths

    def read(self, path: str, at_most_bytes: int = MAX_DOCUMENT_BYTES) -> Buffer:
        if self._reads_at_once:
            nbytes = min(at_most_bytes, _AT_ONCE_BYTES) + 1
            data = self._read_part(path, nbytes)
            if data is not None and len(data) < nbytes:
                return np.frombuffer(bytearray(data), np.uint8)
        self._fs.invalidate_cache()
        info = self._read(path, self._fs.info)
        if info["type"] != "file":
            raise OSError(errno.EINVAL, f"it is a {info['type']}, not a file", f"{self.url}/{path}")
        if info.get("size") is not None and info["size"] > at_most_bytes:
            raise FileTooLarge(f"{self.url}/{path}", int(info["size"]), at_most_bytes)
        return np.frombuffer(bytearray(self._read(path, self._fs.cat_file)), np.uint8)

    def _read_part(self, path: str, nbytes: int) -> bytes | None:
        """An object's first bytes, in one request; None: it has none, or has no part of that size to give."""
        try:
            return bytes(self._do(path, lambda: self._fs.cat_file(self._at(path), start=0, end=nbytes)))
        except (FileNotFoundError, PermissionError, ConnectionError):
            raise
        except (OSError, ValueError):  # an empty object has no first byte
            return None

    def _read(self, path: str, ask: Callable[[str], Any]) -> Any:
        try:
            return self._do(path, lambda: ask(self._at(path)))
        except (FileNotFoundError, PermissionError, ConnectionError):
            raise
        except OSError as error:
            # Unlike on a disk, this says nothing about the file: a damaged object can be read all the same.
            raise ConnectionError(str(error)) from error

    def read_into(self, path: str, out: memoryview, seen: Callable[[memoryview], object], at_most_bytes: int) -> bytes:
        data = self.read(path, at_most_bytes).data
        count = min(len(data), len(out))
        out[:count] = data[:count]
        seen(out[:count])
        return bytes(data[count:])

    def names(self, path: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            listed = self._do(path, lambda: self._fs.ls(self._at(path), detail=False))
        except FileNotFoundError:
            return []
        return sorted({str(name).rstrip("/").rpartition("/")[2] for name in listed} - {""})

    def exists(self, path: str) -> bool:
        # Not fsspec's isfile: it reports a missing file on any error, and a step without a record is cleared away.
        self._fs.invalidate_cache()
        try:
            return bool(self._do(path, lambda: self._fs.info(self._at(path)))["type"] != "directory")
        except FileNotFoundError:
            return False

    def sizes(self, path: str) -> dict[str, int]:
        top = self._at(path)
        self._fs.invalidate_cache()
        files = self._do(path, lambda: self._fs.find(top, detail=True)) if self._lists_all else self._walk(top)
        stripped = str(self._fs._strip_protocol(top)).strip("/")
        return {str(name).strip("/").removeprefix(f"{stripped}/"): int(info["size"]) for name, info in files.items()}

    def _walk(self, top: str) -> dict[str, Any]:
        """As fsspec's generic ``find``, which silently leaves out folders that it cannot list."""
        files: dict[str, Any] = {}
        folders = [top]
        while folders:
            folder = folders.pop()
            path = folder.strip("/").removeprefix(self._root.strip("/")).strip("/")
            for entry in self._do(path, partial(self._fs.ls, folder, detail=True)):
                if entry["type"] != "directory":
                    files[entry["name"]] = entry
                elif str(entry["name"]).strip("/") != folder.strip("/"):
                    folders.append(entry["name"])
        return files

    def remove(self, path: str) -> None:
        try:
            self._do(path, lambda: self._fs.rm_file(self._at(path)))
        except FileNotFoundError:
            return

    def remove_tree(self, path: str) -> None:
        self.remove(f"{path}/{COMMIT}")
        if not self.names(path):
            return
        # Then the votes: while all of them exist, the step looks as if only its record were missing.
        for name in sorted(self.sizes(path), key=lambda name: (not name.startswith("votes/"), name)):
            self.remove(f"{path}/{name}")
        if self.names(path):
            # Storage with directories still has the empty ones.
            self._do(path, lambda: self._fs.rm(self._at(path), recursive=True))

    def move_tree(self, old: str, new: str) -> None:
        """Copy, the commit record last; then remove, the commit record first.

        At any time at least one of the two is whole, and one that is not has no record.
        """
        if self.names(new):
            raise OSError(errno.ENOTEMPTY, f"{self.url}/{new} already exists")
        sizes = self.sizes(old)
        if not sizes:
            raise FileNotFoundError(errno.ENOENT, f"{self.url}/{old} has no files")
        record_bytes = sizes.pop(COMMIT, None)
        for name in sorted(sizes):
            self._copy(f"{old}/{name}", f"{new}/{name}", sizes[name])
        copied = self.sizes(new) if sizes else {}
        if copied != sizes:
            wrong = sorted(name for name in {*sizes, *copied} if sizes.get(name) != copied.get(name))
            raise OSError(errno.EIO, f"{self.url}/{new}: {', '.join(wrong)} differ in size from those in {old}")
        if record_bytes is not None:
            self._copy(f"{old}/{COMMIT}", f"{new}/{COMMIT}", record_bytes)
        self.remove_tree(old)

    def _copy(self, old: str, new: str, size_bytes: int) -> None:
        self._do(old, lambda: self._fs.cp_file(self._at(old), self._at(new), **self._within(size_bytes)))

    def _put_if_absent(self, path: str, data: bytes) -> None:
        limit = self._within(len(data))
        if self._creates_exclusively:
            self._do(path, lambda: self._fs.pipe_file(self._at(path), data, mode="create", **limit))
        else:
            self.put(path, [data])

    def _within(self, size_bytes: int) -> dict[str, float]:
        """The client's option for how long a write of this size may take."""
        return {"timeout": ANSWER_S + size_bytes / _LEAST_BYTES_PER_S} if self._has_limits else {}

    def _do(self, path: str, call: Callable[[], T]) -> T:
        return retry(f"{self.url}/{path}" if path else self.url, call)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root
