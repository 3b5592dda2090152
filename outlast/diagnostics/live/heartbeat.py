"""A rank's heartbeat in shared memory: its current phase and step, since when, and how long its steps usually take.

A file of three 64-byte lines: a header (magic, version, rank, pid) and two beats that are written in turn, each
``opened phase step t_ns median_ns closed`` in native 64-bit words. ``opened`` and ``closed`` are guards as in
:mod:`outlast.diagnostics.live.recorder`. A writer that is killed in the middle of a beat leaves the previous one
intact.
"""

from __future__ import annotations

import bisect
import mmap
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from outlast.diagnostics.live.shm import create_mapped, map_for_reading, publish
from outlast.errors import DiagnosticsError

Phase = Literal["setup", "step", "eval", "checkpoint", "finish", "data", "program"]
"""``program``: of a program that does not tell what it does, so that it may be anything."""
PHASES: tuple[str, ...] = get_args(Phase)

MAGIC = int.from_bytes(b"OUTLBEAT", "little")
VERSION = 1
LINE_WORDS = 8
FILE_BYTES = 3 * LINE_WORDS * 8
WINDOW_STEPS = 32
LEAST_STEPS = 3
_READ_TRIES = 5
_TRY_PAUSE_S = 0.0002


@dataclass(frozen=True, slots=True)
class Beat:
    """The newest beat of a rank."""

    rank: int
    pid: int
    phase: str
    step: int
    t_s: float
    """CLOCK_MONOTONIC seconds."""
    median_step_s: float
    """Median duration of the last 32 steps; 0.0 until there are 3."""


class Heartbeat:
    """Shows the launcher that this rank makes progress. The constructor writes the first beat (``setup``, step 0).

    A step lasts from its first beat in phase ``step`` (or ``program``) to the next step's first beat in that phase. A
    step that includes evaluation or set-up does not count towards the median; time spent on checkpoints and on waiting
    for data does.

    Args:
        path: as :func:`outlast.diagnostics.live.shm.heartbeat_path` returns it; an existing file is replaced.
        rank: written into the header.
        is_private: keep it in this process's own memory, where nobody sees it.

    Raises:
        SharedMemoryFull: there is no room for the file.
        DiagnosticsError: it cannot be created.
    """

    def __init__(self, path: Path, *, rank: int, is_private: bool = False) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._map = mmap.mmap(-1, FILE_BYTES) if is_private else create_mapped(self.path, FILE_BYTES)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("q")
        self._closed = False
        self._count = 0
        self._step_began: tuple[int, int] | None = None  # (step, ns) of the first beat of the running step
        self._newest: deque[int] = deque()
        self._sorted: list[int] = []
        for index, value in enumerate((MAGIC, VERSION, rank, os.getpid())):
            self._words[index] = value
        self.beat("setup", 0)
        if not is_private:
            publish(self.path)

    def beat(self, phase: str, step: int) -> None:
        """Report that this rank has entered ``phase`` of ``step``, or makes progress in it.

        Raises:
            DiagnosticsError: an unknown phase, or the heartbeat is closed.
        """
        if phase not in PHASES:
            raise DiagnosticsError(f"no phase {phase!r}", f"phases are: {', '.join(PHASES)}")
        with self._lock:
            if self._closed:
                raise DiagnosticsError(f"{self.path}: beat after the heartbeat was closed")
            now = time.monotonic_ns()
            self._count_step(phase, step, now)
            self._count += 1
            words = self._words
            at = LINE_WORDS * (1 + self._count % 2)
            words[at + 5] = 0
            words[at] = self._count
            words[at + 1] = PHASES.index(phase)
            words[at + 2] = step
            words[at + 3] = now
            words[at + 4] = self._median_ns()
            words[at + 5] = self._count

    @property
    def median_step_s(self) -> float:
        """Median duration of the last 32 steps; 0.0 until there are 3."""
        return self._median_ns() / 1e9

    def _count_step(self, phase: str, step: int, now: int) -> None:
        if phase in ("checkpoint", "data"):
            return
        if phase not in ("step", "program"):
            self._step_began = None
            return
        if self._step_began is not None:
            before, began = self._step_began
            if step == before:
                return
            if step == before + 1:
                self._newest.append(now - began)
                bisect.insort(self._sorted, now - began)
                if len(self._newest) > WINDOW_STEPS:
                    oldest = self._newest.popleft()
                    del self._sorted[bisect.bisect_left(self._sorted, oldest)]
        self._step_began = (step, now)

    def _median_ns(self) -> int:
        count = len(self._sorted)
        if count < LEAST_STEPS:
            return 0
        return (self._sorted[(count - 1) // 2] + self._sorted[count // 2]) // 2

    def close(self, unlink: bool = False) -> None:
        """Unmap the file, and with ``unlink`` remove it; closing twice is harmless."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._words.release()
                self._bytes.release()
                self._map.close()
        if unlink:
            self.path.unlink(missing_ok=True)


def read_heartbeat(path: Path) -> Beat:
    """The newest complete beat at ``path``, whether its process is running, stopped or dead.

    Raises:
        DiagnosticsError: there is no heartbeat, or another version wrote it.
    """
    path = Path(path)
    mapped = map_for_reading(path, magic=MAGIC, version=VERSION, least_bytes=FILE_BYTES, what="heartbeat")
    try:
        with memoryview(mapped) as raw, raw[:FILE_BYTES] as part, part.cast("q") as words:
            for attempt in range(_READ_TRIES):
                if attempt:
                    time.sleep(_TRY_PAUSE_S)
                beats = [beat for slot in (1, 2) if (beat := _read_slot(words, slot * LINE_WORDS)) is not None]
                if beats:
                    _, phase, step, t_ns, median_ns = max(beats)
                    return Beat(words[2], words[3], PHASES[phase], step, t_ns / 1e9, median_ns / 1e9)
    finally:
        mapped.close()
    raise DiagnosticsError(f"heartbeat {path} has no complete beat", "the file is damaged; remove it")


def _read_slot(words: memoryview, at: int) -> tuple[int, int, int, int, int] | None:
    """Count, phase, step, t_ns, median_ns of a beat; None if it is incomplete."""
    closed = words[at + 5]
    body = (words[at], words[at + 1], words[at + 2], words[at + 3], words[at + 4])
    whole = closed == body[0] == words[at] == words[at + 5] and closed > 0 and 0 <= body[1] < len(PHASES)
    return body if whole else None
