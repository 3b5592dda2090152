"""Whether processes do anything: what they, and those they started, compute, read and write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import psutil

INTERVAL_S = 5.0
"""Between two looks at the same rank; its children are looked at too, which takes milliseconds."""
IDLE_CPU_SHARE = 0.05
"""Below this share of one core a rank does nothing; watching itself takes about 0.01."""
AT_WORK = (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
"""What a process is that computes, or would if it got a core, or waits for a disk."""
IDLE_BYTES_PER_S = 10_000.0
"""... and reads and writes less than this, network included where the system counts it."""


@dataclass(frozen=True, slots=True)
class _Look:
    at_s: float
    cpu_s: float
    io_bytes: int
    at_work: bool
    pids: frozenset[int]


class Activity:
    """Since when ranks have been idle. Times are CLOCK_MONOTONIC seconds."""

    def __init__(self) -> None:
        self._looks: dict[int, _Look] = {}
        self._busy_at_s: dict[int, float] = {}

    def look(self, pids: Mapping[int, int], now_s: float, interval_s: float = INTERVAL_S) -> None:
        """Look at the processes of ranks, each at most once in ``interval_s``. A rank is busy until seen twice."""
        for rank, pid in pids.items():
            before = self._looks.get(rank)
            if before is not None and now_s - before.at_s < interval_s:
                continue
            look = _look_at(pid, now_s)
            self._looks[rank] = look
            if before is None or _was_busy(before, look):
                self._busy_at_s[rank] = now_s

    def idle_s(self, rank: int, now_s: float) -> float:
        """Seconds since the rank was last seen busy; 0 if it was never looked at."""
        return max(0.0, now_s - self._busy_at_s.get(rank, now_s))


def _was_busy(before: _Look, after: _Look) -> bool:
    seconds = max(after.at_s - before.at_s, 1e-3)
    if after.at_work or before.pids != after.pids:  # it has started a process, or one has ended
        return True
    cpu_share = (after.cpu_s - before.cpu_s) / seconds
    return cpu_share > IDLE_CPU_SHARE or (after.io_bytes - before.io_bytes) / seconds > IDLE_BYTES_PER_S


def _look_at(pid: int, now_s: float) -> _Look:
    cpu_s, io_bytes, at_work, pids = 0.0, 0, False, set()
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        try:
            with process.oneshot():
                times = process.cpu_times()
                cpu_s += times.user + times.system
                at_work |= process.status() in AT_WORK
                counters = process.io_counters()
            io_bytes += counters.read_chars + counters.write_chars
            pids.add(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return _Look(now_s, cpu_s, io_bytes, at_work, frozenset(pids))
