"""Files of a checkpoint that lie within larger ones of this node, in shared memory or on its disk: read or mapped.

Reading copies at once; a mapping costs a page table entry for each 4 KiB first, which is more than the checksum over
them (measured: 0.06 s for 768 MB).
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from outlast.checkpoint.format.names import LOCAL_DISK
from outlast.checkpoint.format.records import Fault, FileEntry, RunningChecksum, check_pieces
from outlast.checkpoint.memory.pages import CACHED_BYTES, Buffer, allocate
from outlast.errors import CorruptCheckpoint


@dataclass(frozen=True)
class Span:
    """Where one file lies."""

    within: Path
    at: int
    size_bytes: int
    tier: str
    """Of what it lies in. A disk's is read, and never mapped: an error of the disk would end the process."""


@dataclass(frozen=True)
class SlotFiles:
    """Files by path relative to the step, each in one place or several, of which the first is taken.

    But for :meth:`drop`, the methods may be called from several threads. They raise :class:`Fault` where a file cannot
    be read.
    """

    spans: dict[str, list[Span]]
    _maps: dict[Path, Buffer] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tier(self, path: str) -> str:
        """Where a file is taken from."""
        return self.spans[path][0].tier

    def drop(self, path: str) -> bool:
        """Never take a file from where it would be taken; False, and nothing done, if it lies nowhere else."""
        if len(self.spans[path]) == 1:
            return False
        del self.spans[path][0]
        return True

    def view(self, path: str) -> Buffer:
        """A file's bytes, fewer where what it lies in is gone; writes to them stay in this process."""
        span = self.spans[path][0]
        if span.tier == LOCAL_DISK:
            data = allocate(span.size_bytes)
            seen = RunningChecksum()
            end = self.read_into(path, data.data, seen)
            return data[: seen.nbytes + len(end)]
        with self._lock:
            if span.within not in self._maps:
                self._maps[span.within] = _mapped(span.within)
            return self._maps[span.within][span.at : span.at + span.size_bytes]

    def read_into(self, path: str, out: memoryview, seen: Callable[[memoryview], object]) -> bytes:
        """As :meth:`outlast.checkpoint.storage.base.Store.read_into`."""
        span = self.spans[path][0]
        wanted = min(len(out), span.size_bytes)
        pieces = (out[at : min(at + CACHED_BYTES, wanted)] for at in range(0, wanted, CACHED_BYTES))
        with _opened(span.within, path) as fd:
            done = _read(fd, span.at, pieces, seen)
            return os.pread(fd, span.size_bytes - done, span.at + done) if done == wanted else b""

    def check(self, entry: FileEntry) -> None:
        """Verify a file where it lies; raises :class:`Fault`."""
        span, scratch = self.spans[entry.path][0], memoryview(bytearray(CACHED_BYTES))
        seen = RunningChecksum()
        pieces = (scratch[: entry.body_bytes - at] for at in range(0, entry.body_bytes, CACHED_BYTES))
        with _opened(span.within, entry.path) as fd:
            done = _read(fd, span.at, pieces, seen)
            end = os.pread(fd, entry.size_bytes - done, span.at + done) if done == entry.body_bytes else b""
        check_pieces(entry, seen, end)


def _read(fd: int, at: int, pieces: Iterable[memoryview], seen: Callable[[memoryview], object]) -> int:
    """Fill one piece after the other; how many bytes there were."""
    done = 0
    for piece in pieces:
        have = 0
        while have < len(piece):
            count = os.preadv(fd, [piece[have:]], at + done)
            if not count:
                return done
            have, done = have + count, done + count
        seen(piece)
    return done


@contextmanager
def _opened(path: Path, file: str) -> Iterator[int]:
    """A descriptor to read a file by; of an empty one where what it lies in is gone."""
    try:
        fd = _open(path)
        try:
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise Fault(CorruptCheckpoint, file, f"cannot be read: {error}") from error


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def _mapped(path: Path) -> Buffer:
    fd = _open(path)
    try:
        size_bytes = os.fstat(fd).st_size
        if not size_bytes:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(fd, size_bytes, access=mmap.ACCESS_COPY), np.uint8)
    finally:
        os.close(fd)
