"""Records what the checkpoint room does to its directory, system call by system call, in one total order.

While a :class:`Recorder` is active, ``os`` and ``shutil`` of every module of ``outlast.checkpoint`` are proxies. They
make the real call on the real directory and log its effect: names given and taken, bytes written, sizes set, fsyncs.
What changes nothing passes. What might change something and is not known here is an error, so that no later writer
escapes unseen; and ``crash.Recording`` compares the directory with what the log says it must hold.
"""

from __future__ import annotations

import builtins
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

Tree = dict[str, bytes | None]
"""Files by path relative to the root, parents before children; None is a directory."""

ROOT = 0
"""The node of the recorded directory; its own name is durable."""

_HARMLESS = """
DirEntry PathLike access cpu_count curdir devnull environ error extsep fsdecode fsencode fspath fstat fstatvfs getcwd
getenv getpid getppid getuid linesep listdir lstat name pardir path pathconf pathsep posix_fadvise pread preadv
process_cpu_count read readlink readv scandir sched_getaffinity sep stat stat_result statvfs strerror supports_dir_fd
supports_fd supports_follow_symlinks sysconf urandom walk
"""


class Unrecorded(AssertionError):
    """Something was done that the recorder does not know."""


@dataclass(frozen=True)
class Names:
    """Names given (a node) or taken (None) at once: create, mkdir, rename, unlink, rmdir."""

    what: str
    path: str
    """Of the file, relative to the root; of a rename, the new one."""
    changes: tuple[tuple[int, str, int | None], ...]
    """(directory, name, node)."""


@dataclass(frozen=True)
class Write:
    """Bytes written."""

    path: str
    """As the file was called when it was opened."""
    node: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Resize:
    """A size set; bytes that are new are zero."""

    path: str
    node: int
    size: int
    grow_only: bool
    """As fallocate does."""


@dataclass(frozen=True)
class Sync:
    """A file's data, or a directory's names, made durable."""

    path: str
    node: int
    folder: bool


@dataclass(frozen=True)
class Mark:
    """What the program said or asked for between the operations; see ``crash.Expected``."""

    what: str
    step: int
    version: str


Op = Names | Write | Resize | Sync | Mark


@dataclass
class _Open:
    node: int
    path: str
    position: int = 0


def tree_at(root: Path) -> Tree:
    """What lies below a directory."""
    found: Tree = {}
    for path in sorted(root.rglob("*")):
        found[str(path.relative_to(root))] = None if path.is_dir() else path.read_bytes()
    return found


class Recorder:
    """A context: the operations of the room below ``root`` between its begin and its end are in ``ops``.

    Calls for other paths pass unrecorded. A real call and its log entry are made under one lock, so the order of the
    log is an order in which the calls of all threads may have happened.

    Args:
        root: an existing directory.

    Attributes:
        base: what lay in it at the beginning.
        ops: what was done.
    """

    def __init__(self, root: Path) -> None:
        self.base = tree_at(root)
        self.ops: list[Op] = []
        self._root = str(root)
        self._lock = threading.RLock()
        self._fds: dict[int, _Open] = {}
        self._folders: dict[int, dict[str, int]] = {ROOT: {}}
        self._made = ROOT
        self._escaped: list[str] = []
        self._undo: list[tuple[ModuleType, str, Any]] = []
        for path, data in self.base.items():
            parent, name = self._place(path)
            self._folders[parent][name] = self._new(folder=data is None)

    def mark(self, what: str, step: int = -1, version: str = "") -> None:
        """Log what the program said or asked for."""
        with self._lock:
            self.ops.append(Mark(what, step, version))

    def __enter__(self) -> Self:
        proxies = {os: _Proxy(self, "os", _CALLS, os), shutil: _Proxy(self, "shutil", {}, shutil)}
        room = [module for name, module in sys.modules.items() if f"{name}.".startswith("outlast.checkpoint.")]
        for module in room:
            for name, value in list(vars(module).items()):
                if isinstance(value, ModuleType) and value in proxies:
                    self._set(module, name, proxies[value])
                elif callable(value) and getattr(value, "__module__", "") in ("os", "posix", "shutil"):
                    raise Unrecorded(f"{module.__name__} imports {name} from {value.__module__}: import the module")
            self._set(module, "open", self._open_to_read)
        # rmtree is the one function of shutil that is let through; it calls what is recorded.
        self._set(shutil, "os", proxies[os])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for module, name, old in reversed(self._undo):
            if old is None:
                delattr(module, name)
            else:
                setattr(module, name, old)
        if self._escaped:
            raise Unrecorded("; ".join(self._escaped)) from error

    def _set(self, module: ModuleType, name: str, value: Any) -> None:
        self._undo.append((module, name, vars(module).get(name)))
        setattr(module, name, value)

    def escape(self, what: str) -> Unrecorded:
        """The error to raise; it is raised at the end again, wherever the first one went."""
        self._escaped.append(what)
        return Unrecorded(what)

    def _open_to_read(self, file: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
        if set(mode) & set("wax+"):
            raise self.escape(f"open({file!r}, {mode!r}) writes past the recorder")
        return builtins.open(file, mode, *args, **named)

    def _new(self, *, folder: bool) -> int:
        self._made += 1
        if folder:
            self._folders[self._made] = {}
        return self._made

    def _place(self, path: str, start: int = ROOT) -> tuple[int, str]:
        """The directory's node and the name of a path relative to the node ``start``."""
        *parents, name = path.split("/")
        node = start
        for parent in parents:
            node = self._folders[node][parent]
        return node, name

    def _find(self, path: Any, dir_fd: int | None) -> tuple[int, str, str] | None:
        """Directory, name and whole path of what a call names; None outside of the root."""
        text = os.fspath(path)
        if dir_fd is not None:
            at = self._fds.get(dir_fd)
            return None if at is None else (at.node, text, f"{at.path}/{text}")
        text = os.path.abspath(text)
        if text == self._root:
            return ROOT, "", ""
        if not text.startswith(f"{self._root}/"):
            return None
        whole = text[len(self._root) + 1 :]
        try:
            return (*self._place(whole), whole)
        except KeyError:
            raise self.escape(f"{whole}: a directory on its way was made past the recorder") from None

    # The calls that are recorded. Each makes the real one first: what fails changes nothing.

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE or flags & os.O_APPEND:
            raise self.escape(f"open({path!r}, {flags:#x}): O_TMPFILE and O_APPEND are not known")
        fd = os.open(path, flags, mode, dir_fd=dir_fd)
        found = self._find(path, dir_fd)
        if found is None:
            return fd
        parent, name, whole = found
        node = self._folders[parent].get(name) if name else ROOT
        if node is None:
            if not flags & os.O_CREAT:
                raise self.escape(f"{whole} was made past the recorder")
            node = self._folders[parent][name] = self._new(folder=False)
            self.ops.append(Names("create", whole, ((parent, name, node),)))
        elif flags & os.O_TRUNC:
            self.ops.append(Resize(whole, node, 0, False))
        self._fds[fd] = _Open(node, whole)
        return fd

    def close(self, fd: int) -> None:
        self._fds.pop(fd, None)
        os.close(fd)

    def lseek(self, fd: int, position: int, whence: int, /) -> int:
        result = os.lseek(fd, position, whence)
        if fd in self._fds:
            self._fds[fd].position = result
        return result

    def write(self, fd: int, data: Any, /) -> int:
        return self._written(fd, [data], os.write(fd, data), None)

    def writev(self, fd: int, buffers: Sequence[Any], /) -> int:
        return self._written(fd, buffers, os.writev(fd, buffers), None)

    def pwrite(self, fd: int, data: Any, offset: int, /) -> int:
        return self._written(fd, [data], os.pwrite(fd, data, offset), offset)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int, flags: int = 0, /) -> int:
        return self._written(fd, buffers, os.pwritev(fd, buffers, offset, flags), offset)

    def _written(self, fd: int, buffers: Sequence[Any], count: int, offset: int | None) -> int:
        at = self._fds.get(fd)
        if at is not None and count:
            data = b"".join(bytes(memoryview(buffer)) for buffer in buffers)[:count]
            self.ops.append(Write(at.path, at.node, at.position if offset is None else offset, data))
            if offset is None:
                at.position += count
        return count

    def ftruncate(self, fd: int, size: int, /) -> None:
        os.ftruncate(fd, size)
        if (at := self._fds.get(fd)) is not None:
            self.ops.append(Resize(at.path, at.node, size, False))

    def posix_fallocate(self, fd: int, offset: int, size: int, /) -> None:
        os.posix_fallocate(fd, offset, size)
        if (at := self._fds.get(fd)) is not None:
            self.ops.append(Resize(at.path, at.node, offset + size, True))

    def fsync(self, fd: int) -> None:
        os.fsync(fd)
        if (at := self._fds.get(fd)) is not None:
            self.ops.append(Sync(at.path, at.node, at.node in self._folders))

    def fdatasync(self, fd: int) -> None:
        self.fsync(fd)

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        os.mkdir(path, mode, dir_fd=dir_fd)
        if (found := self._find(path, dir_fd)) is not None:
            parent, name, whole = found
            node = self._folders[parent][name] = self._new(folder=True)
            self.ops.append(Names("mkdir", whole, ((parent, name, node),)))

    def makedirs(self, name: Any, mode: int = 0o777, exist_ok: bool = False) -> None:
        missing, path = [], os.path.abspath(os.fspath(name))
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        if not missing and not exist_ok:
            raise FileExistsError(path)
        for path in reversed(missing):
            try:
                self.mkdir(path, mode)
            except FileExistsError:  # a file
                if not os.path.isdir(path):
                    raise

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        os.unlink(path, dir_fd=dir_fd)
        self._taken("unlink", path, dir_fd)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        os.rmdir(path, dir_fd=dir_fd)
        self._taken("rmdir", path, dir_fd)

    def _taken(self, what: str, path: Any, dir_fd: int | None) -> None:
        if (found := self._find(path, dir_fd)) is not None:
            parent, name, whole = found
            del self._folders[parent][name]
            self.ops.append(Names(what, whole, ((parent, name, None),)))

    def rename(self, src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        os.replace(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        old, new = self._find(src, src_dir_fd), self._find(dst, dst_dir_fd)
        if old is None and new is None:
            return
        if old is None or new is None:
            raise self.escape(f"rename of {src!r} to {dst!r} crosses the recorder's root")
        node = self._folders[old[0]].pop(old[1])
        self._folders[new[0]][new[1]] = node
        self.ops.append(Names("rename", new[2], ((old[0], old[1], None), (new[0], new[1], node))))


_RECORDED = """
open close lseek write writev pwrite pwritev ftruncate posix_fallocate fsync fdatasync mkdir makedirs unlink rmdir
rename
"""
_CALLS: dict[str, Callable[..., Any]] = {name: getattr(Recorder, name) for name in _RECORDED.split()}
_CALLS |= {"replace": Recorder.rename, "remove": Recorder.unlink}


class _Proxy(ModuleType):
    """A module of which only what is recorded, or changes nothing, is to be had."""

    def __init__(self, recorder: Recorder, name: str, calls: dict[str, Callable[..., Any]], real: ModuleType) -> None:
        super().__init__(name)
        self._recorder = recorder
        self._calls = calls
        self._real = real

    def __getattr__(self, name: str) -> Any:
        recorder = self._recorder
        if name in self._calls:
            call = self._calls[name]

            def locked(*args: Any, **named: Any) -> Any:
                with recorder._lock:
                    return call(recorder, *args, **named)

            return locked
        if name.isupper() or (name in _HARMLESS.split() if self._real is os else name == "rmtree"):
            return getattr(self._real, name)
        if not hasattr(self._real, name):
            raise AttributeError(name)
        raise recorder.escape(f"{self._real.__name__}.{name} is not known to the recorder: may it change a file?")
