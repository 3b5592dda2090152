"""A rank's sign of life in shared memory: what it does now, since when, and how long its steps usually take.

A file of three 64-byte lines: a header (magic, version, rank, pid) and two beats that are written in turn, each
``opened phase step t_ns median_ns closed`` in native 64-bit words, with guards as
:mod:`outlast.diagnostics.live.recorder` has them. A writer that is killed in the middle of a beat leaves the one before
whole.
"""

from __future__ import annotations

import bisect
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from outlast.diagnostics.live.shm import create_mapped, map_for_reading, publish
from outlast.errors import DiagnosticsError

Phase = Literal["setup", "step", "eval", "checkpoint", "finish"]
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
    """The newest sign of life of a rank."""

    rank: int
    pid: int
    phase: str
    step: int
    t_s: float
    """When it was given, CLOCK_MONOTONIC seconds."""
    median_step_s: float
    """Median duration of the last 32 steps; 0.0 until 3 are known."""


class Heartbeat:
    """Tells the launcher that this rank makes progress. The first beat (``setup``, step 0) is given at once.

    A step lasts from the first beat of one step in phase ``step`` to the first beat of the next step in that phase;
    it does not count if an evaluation or set-up came between. The time that a checkpoint takes counts.

    Args:
        path: where it lies, :func:`outlast.diagnostics.live.shm.heartbeat_path`; a file that is there is replaced.
        rank: written into the header.

    Raises:
        DiagnosticsError: the file cannot be made.
    """

    def __init__(self, path: Path, *, rank: int) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._map = create_mapped(self.path, FILE_BYTES)
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
        publish(self.path)

    def beat(self, phase: str, step: int) -> None:
        """This rank has just come to ``phase`` of ``step``, or is making progress in it.

        Raises:
            DiagnosticsError: an unknown phase, or the heartbeat is closed.
        """
        if phase not in PHASES:
            raise DiagnosticsError(f"no phase {phase!r}", f"known are: {', '.join(PHASES)}")
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

    def _count_step(self, phase: str, step: int, now: int) -> None:
        if phase == "checkpoint":
            return
        if phase != "step":
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
    """The newest whole beat at ``path``, whether its process runs, is stopped or is dead.

    Raises:
        DiagnosticsError: there is no heartbeat there, or it was written by another version.
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
    raise DiagnosticsError(f"heartbeat {path} holds no whole beat", "its file is damaged; remove it")


def _read_slot(words: memoryview, at: int) -> tuple[int, int, int, int, int] | None:
    """Count, phase, step, t_ns, median_ns of a whole beat."""
    closed = words[at + 5]
    body = (words[at], words[at + 1], words[at + 2], words[at + 3], words[at + 4])
    whole = closed == body[0] == words[at] == words[at + 5] and closed > 0 and 0 <= body[1] < len(PHASES)
    return body if whole else None
