"""A ring buffer of the newest collectives in shared memory, readable while its writer runs and after it was killed.

A file of ``HEADER_BYTES`` followed by ``capacity`` records of ``RECORD_BYTES``; all numbers are native 64-bit words::

    header   magic  version  capacity  rank  pid  entered          (entered: collectives entered so far)
    record   opened  seq  nbytes  step  entered_ns  completed_ns  group_seq  op[24 bytes]  label[48 bytes]
             group[32 bytes]  closed

Collective ``seq`` (counted from 0) is in record ``seq % capacity``. The writer sets ``closed`` to 0, then ``opened``
to ``seq + 1``, then the body, then ``closed`` to ``seq + 1``; each guard is one aligned 8-byte store. A record is
complete if both guards agree before and after its body is read; otherwise it is torn: its writer was stopped or killed
while writing it. The completion time is a single word, so it needs no guard.

On x86-64 other processes see stores in program order. On other architectures the lock released at the end of every call
orders them, and only a read at the very moment of a write can miss a torn record.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from outlast.diagnostics.live.shm import WORD_BYTES, create_mapped, map_for_reading, publish
from outlast.errors import DiagnosticsError

MAGIC = int.from_bytes(b"OUTLRING", "little")
VERSION = 2
HEADER_BYTES = 64
RECORD_BYTES = 192
OP_BYTES = 24
LABEL_BYTES = 48
GROUP_BYTES = 32
_HEADER_WORDS = HEADER_BYTES // WORD_BYTES
_WORDS = RECORD_BYTES // WORD_BYTES
_TEXT_AT = 7 * WORD_BYTES
_TEXT_BYTES = OP_BYTES + LABEL_BYTES + GROUP_BYTES
_CLOSED = _WORDS - 1
_READ_TRIES = 5
_TRY_PAUSE_S = 0.0002


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of one rank. Times are CLOCK_MONOTONIC seconds of its machine."""

    seq: int
    """How many collectives this rank entered before; the same on all ranks that run the same program."""
    op: str
    label: str
    nbytes: int
    step: int
    entered_s: float
    completed_s: float | None
    """None while it is in progress."""
    group: str = ""
    """The process group, if whoever recorded it tells groups apart."""
    group_seq: int = 0
    """With a group: its position there, the same on all ranks of the group."""

    @property
    def number(self) -> int:
        """What tells it apart from others on all ranks: its position in its group, or in its process."""
        return self.group_seq if self.group else self.seq


@dataclass(frozen=True, slots=True)
class Ring:
    """The newest collectives of a rank, oldest first, as :func:`read_ring` returns them."""

    rank: int
    pid: int
    capacity: int
    entered: int
    """Collectives entered since the recorder was created, including overwritten ones."""
    records: tuple[Collective, ...]
    torn: tuple[int, ...]
    """Sequence numbers of records that are incomplete because the writer stopped while writing them."""

    @property
    def pending(self) -> tuple[Collective, ...]:
        """Collectives entered and not completed, oldest first."""
        return tuple(record for record in self.records if record.completed_s is None)


class Recorder:
    """Records when this rank enters and completes each collective, in a ring buffer in shared memory.

    It implements :class:`outlast.comm.CollectiveObserver`. An existing file is replaced, not reused. A recorder is
    thread-safe; a process forked from its owner must not use it.

    Args:
        path: as :func:`outlast.diagnostics.live.shm.ring_path` returns it.
        rank: written into the header.
        capacity: collectives kept; the oldest are overwritten.
        is_private: keep them in this process's own memory, where nobody sees them.

    Raises:
        SharedMemoryFull: there is no room for the file.
        DiagnosticsError: it cannot be created.
    """

    def __init__(self, path: Path, *, rank: int, capacity: int = 4096, is_private: bool = False) -> None:
        if capacity < 1:
            raise DiagnosticsError(f"a recorder ring cannot have a capacity of {capacity}", "it must be at least 1")
        self.path = Path(path)
        self.capacity = capacity
        self.step = 0
        """Written into every record; the training loop sets it."""
        self._seq = 0
        self._lock = threading.Lock()
        self._texts: dict[tuple[str, str, str], bytes] = {}
        size_bytes = HEADER_BYTES + capacity * RECORD_BYTES
        self._map = mmap.mmap(-1, size_bytes) if is_private else create_mapped(self.path, size_bytes)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("q")
        self._closed = False
        for index, value in enumerate((MAGIC, VERSION, capacity, rank, os.getpid(), 0)):
            self._words[index] = value
        if not is_private:
            publish(self.path)

    def enter(self, op: str, nbytes: int, label: str) -> int:
        """Record that a collective is about to be issued; returns the token for :meth:`complete`.

        ``op`` is truncated to 24 and ``label`` to 48 bytes of UTF-8.

        Raises:
            DiagnosticsError: the recorder is closed.
        """
        with self._lock:
            if self._closed:
                raise DiagnosticsError(f"{self.path}: {op} entered after the recorder was closed")
            seq = self._seq
            self._write(seq, nbytes, self.step, time.monotonic_ns(), 0, 0, self._text(op, label, ""))
        return seq

    def copy(self, collective: Collective) -> None:
        """Record a collective that something else has recorded, with its times; a later copy of it replaces it.

        A recorder is filled either by :meth:`enter` and :meth:`complete`, or by this.

        Raises:
            DiagnosticsError: the recorder is closed.
        """
        with self._lock:
            if self._closed:
                raise DiagnosticsError(f"{self.path}: {collective.op} copied after the recorder was closed")
            self._write(
                collective.seq,
                collective.nbytes,
                collective.step,
                round(collective.entered_s * 1e9),
                0 if collective.completed_s is None else max(1, round(collective.completed_s * 1e9)),
                collective.group_seq,
                self._text(collective.op, collective.label, collective.group),
            )

    def count(self, entered: int) -> None:
        """Tell how many collectives were entered, if they are to be copied later.

        Raises:
            DiagnosticsError: the recorder is closed.
        """
        with self._lock:
            if self._closed:
                raise DiagnosticsError(f"{self.path}: counted after the recorder was closed")
            self._seq = max(self._seq, entered)
            self._words[5] = self._seq

    def forget(self) -> None:
        """Remove the copies: what was pending in them may have completed. How many were entered stays.

        Raises:
            DiagnosticsError: the recorder is closed.
        """
        with self._lock:
            if self._closed:
                raise DiagnosticsError(f"{self.path}: to be emptied after the recorder was closed")
            for at in range(_HEADER_WORDS, len(self._words), _WORDS):
                self._words[at + _CLOSED] = 0
                self._words[at] = 0

    def _write(
        self, seq: int, nbytes: int, step: int, entered_ns: int, completed_ns: int, group_seq: int, text: bytes
    ) -> None:
        words = self._words
        at = _HEADER_WORDS + (seq % self.capacity) * _WORDS
        words[at + _CLOSED] = 0
        words[at] = seq + 1
        words[at + 1] = seq
        words[at + 2] = nbytes
        words[at + 3] = step
        words[at + 4] = entered_ns
        words[at + 5] = completed_ns
        words[at + 6] = group_seq
        start = at * WORD_BYTES + _TEXT_AT
        self._bytes[start : start + _TEXT_BYTES] = text
        words[at + _CLOSED] = seq + 1
        self._seq = max(self._seq, seq + 1)
        words[5] = self._seq

    def complete(self, token: int) -> None:
        """Record that the collective of ``token`` has completed on this rank.

        Has no effect if the record was overwritten, or the collective was already completed.

        Raises:
            DiagnosticsError: the recorder is closed.
        """
        with self._lock:
            if self._closed:
                raise DiagnosticsError(f"{self.path}: collective #{token} completed after the recorder was closed")
            words = self._words
            at = _HEADER_WORDS + (token % self.capacity) * _WORDS
            if words[at] == token + 1 and words[at + 5] == 0:
                words[at + 5] = time.monotonic_ns()

    def close(self, unlink: bool = False) -> None:
        """Unmap the ring, and with ``unlink`` remove its file; closing twice is harmless."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._words.release()
                self._bytes.release()
                self._map.close()
        if unlink:
            self.path.unlink(missing_ok=True)

    def _text(self, op: str, label: str, group: str) -> bytes:
        text = self._texts.get((op, label, group))
        if text is None:
            text = _cut(op, OP_BYTES) + _cut(label, LABEL_BYTES) + _cut(group, GROUP_BYTES)
            if len(self._texts) < 4096:  # labels that vary with the step must not grow without bound
                self._texts[op, label, group] = text
        return text


def _cut(text: str, size_bytes: int) -> bytes:
    raw = text.encode()
    if len(raw) > size_bytes:
        raw = raw[:size_bytes].decode(errors="ignore").encode()
    return raw.ljust(size_bytes, b"\0")


def read_ring(path: Path, newest: int | None = None) -> Ring:
    """The newest collectives in the ring at ``path``, whether its process is running, stopped or dead.

    Args:
        path: of the ring.
        newest: how many to read at most; None reads all that it holds.

    Raises:
        DiagnosticsError: there is no recorder ring, or another version wrote it.
    """
    path = Path(path)
    mapped = map_for_reading(
        path, magic=MAGIC, version=VERSION, least_bytes=HEADER_BYTES + RECORD_BYTES, what="recorder ring"
    )
    try:
        return _read(mapped, path, newest)
    finally:
        mapped.close()


def _read(mapped: mmap.mmap, path: Path, newest: int | None) -> Ring:
    with memoryview(mapped) as raw:
        if len(raw) % WORD_BYTES:
            raise DiagnosticsError(f"{path} is not a recorder ring: it has {len(raw)} bytes")
        with raw.cast("q") as words:
            capacity, rank, pid, entered = words[2], words[3], words[4], words[5]
            if capacity < 1 or len(raw) != HEADER_BYTES + capacity * RECORD_BYTES:
                raise DiagnosticsError(
                    f"{path} is not a recorder ring: it has {len(raw)} bytes for a capacity of {capacity}"
                )
            records: list[Collective] = []
            torn: list[int] = []
            slots: Sequence[int] = range(min(capacity, entered + 1))  # one more: it may be torn before it is counted
            if newest is not None and newest < len(slots):
                opened = [words[_HEADER_WORDS + slot * _WORDS] for slot in slots]
                slots = sorted(slots, key=opened.__getitem__)[-newest:]
            for slot in slots:
                record = _read_record(words, raw, slot)
                if isinstance(record, Collective):
                    records.append(record)
                elif record is not None:
                    torn.append(record)
    records.sort(key=lambda record: record.seq)
    return Ring(rank, pid, capacity, entered, tuple(records), tuple(sorted(torn)))


def _read_record(words: memoryview, raw: memoryview, slot: int) -> Collective | int | None:
    """The record in ``slot``; its sequence number if it is torn; None if it was never written."""
    at = _HEADER_WORDS + slot * _WORDS
    for attempt in range(_READ_TRIES):
        if attempt:
            time.sleep(_TRY_PAUSE_S)  # a live writer has finished by then
        closed = words[at + _CLOSED]
        start = at * WORD_BYTES
        body = bytes(raw[start : start + RECORD_BYTES])
        opened = words[at]
        if closed == opened == words[at + _CLOSED]:
            if opened == 0:
                return None
            if words[at + 1] == opened - 1:
                return _decode(body)
    return max(int(words[at]), int(words[at + _CLOSED])) - 1


def _decode(body: bytes) -> Collective:
    numbers = memoryview(body)[:_TEXT_AT].cast("q")
    op, label, group = (
        body[start : start + size].rstrip(b"\0").decode(errors="replace")
        for start, size in (
            (_TEXT_AT, OP_BYTES),
            (_TEXT_AT + OP_BYTES, LABEL_BYTES),
            (_TEXT_AT + OP_BYTES + LABEL_BYTES, GROUP_BYTES),
        )
    )
    return Collective(
        seq=numbers[1],
        op=op,
        label=label,
        nbytes=numbers[2],
        step=numbers[3],
        entered_s=numbers[4] / 1e9,
        completed_s=numbers[5] / 1e9 if numbers[5] else None,
        group=group,
        group_seq=numbers[6],
    )
