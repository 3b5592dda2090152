"""Files of a checkpoint inside slots: larger files of this node, in shared memory or on its disk, read or mapped.

Reading copies at once. A mapping first costs a page table entry for each 4 KiB, which takes longer than the checksum
over them (measured: 0.06 s for 768 MB).
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
from outlast.checkpoint.format.records import Fault, FileEntry, RunningChecksum, check_pieces, wrong_size
from outlast.checkpoint.memory.pages import CACHED_BYTES, Buffer, allocate
from outlast.checkpoint.storage.regular import check_regular, open_regular
from outlast.errors import CorruptCheckpoint


@dataclass(frozen=True)
class Span:
    """One copy of a file."""

    slot: Path
    offset: int
    """Of its first byte in the slot, in bytes."""
    size_bytes: int
    tier: str
    """Of the slot. One on a disk is read and never mapped: an I/O error in a mapping would kill the process."""


@dataclass(frozen=True)
class SlotFiles:
    """This node's copies of files; the first copy of each is used.

    Several threads may call the methods at once, except :meth:`drop`. They raise :class:`Fault` if a file cannot be
    read.
    """

    spans: dict[str, list[Span]]
    """By path relative to the step."""
    _maps: dict[Path, Buffer] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tier(self, path: str) -> str:
        """The tier of the copy that is used."""
        return self.spans[path][0].tier

    def drop(self, path: str) -> bool:
        """Use the next copy from now on; False, and nothing changes, if there is none."""
        if len(self.spans[path]) == 1:
            return False
        del self.spans[path][0]
        return True

    def view(self, path: str) -> Buffer:
        """A file's bytes, fewer if its slot is gone; writes to them stay in this process."""
        span = self.spans[path][0]
        if span.tier == LOCAL_DISK:
            # No memory is taken for what is not there, whatever the slot's index says.
            there = span.slot.stat().st_size if span.slot.exists() else 0
            data = allocate(max(0, min(span.size_bytes, there - span.offset)))
            seen = RunningChecksum()
            end = self.read_into(path, data.data, seen)
            return data[: seen.nbytes + len(end)]
        with self._lock:
            if span.slot not in self._maps:
                self._maps[span.slot] = _mapped(span.slot)
            return self._maps[span.slot][span.offset : span.offset + span.size_bytes]

    def read_into(self, path: str, out: memoryview, seen: Callable[[memoryview], object]) -> bytes:
        """As :meth:`outlast.checkpoint.storage.base.Store.read_into`."""
        span = self.spans[path][0]
        nbytes = min(len(out), span.size_bytes)
        pieces = (out[at : min(at + CACHED_BYTES, nbytes)] for at in range(0, nbytes, CACHED_BYTES))
        with _opened(span.slot, path) as fd:
            done = _read(fd, span.offset, pieces, seen)
            return os.pread(fd, span.size_bytes - done, span.offset + done) if done == nbytes else b""

    def check_room(self, entry: FileEntry) -> None:
        """Find whether the slot has as many bytes as the file is to have, without reading them; raises Fault."""
        span = self.spans[entry.path][0]
        try:
            info = span.slot.lstat()
            check_regular(info, span.slot)
        except FileNotFoundError:
            raise wrong_size(entry, 0) from None
        except OSError as error:
            raise Fault(CorruptCheckpoint, entry.path, f"cannot be read: {error}") from error
        if span.offset + entry.size_bytes > info.st_size:
            raise wrong_size(entry, max(0, info.st_size - span.offset))

    def check(self, entry: FileEntry) -> None:
        """Verify a file in place, without keeping its bytes; raises :class:`Fault`."""
        span, scratch = self.spans[entry.path][0], memoryview(bytearray(CACHED_BYTES))
        seen = RunningChecksum()
        pieces = (scratch[: entry.body_bytes - at] for at in range(0, entry.body_bytes, CACHED_BYTES))
        with _opened(span.slot, entry.path) as fd:
            done = _read(fd, span.offset, pieces, seen)
            end = os.pread(fd, entry.size_bytes - done, span.offset + done) if done == entry.body_bytes else b""
        check_pieces(entry, seen, end)


def _read(fd: int, offset: int, pieces: Iterable[memoryview], seen: Callable[[memoryview], object]) -> int:
    """Fill one piece after the other; returns how many bytes there were."""
    done = 0
    for piece in pieces:
        filled = 0
        while filled < len(piece):
            count = os.preadv(fd, [piece[filled:]], offset + done)
            if not count:
                return done
            filled, done = filled + count, done + count
        seen(piece)
    return done


@contextmanager
def _opened(path: Path, file: str) -> Iterator[int]:
    """A descriptor of a slot, or of an empty file if the slot is gone; ``file`` is named in the fault."""
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
        return open_regular(path)
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
