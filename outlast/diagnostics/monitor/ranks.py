"""This node's ranks as the system sees them: process states, CPU time, and when they last beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from outlast.diagnostics.live.heartbeat import Beat, read_heartbeat
from outlast.diagnostics.live.recorder import read_ring
from outlast.diagnostics.live.shm import heartbeat_path, ring_path
from outlast.errors import DiagnosticsError

BUSY_SHARE = 0.2
"""A process that uses more than this share of a core is busy, however many others want the core too."""


@dataclass(frozen=True, slots=True)
class RankUse:
    """Of one rank in one interval."""

    rank: int
    pid: int
    """Of the process that beats; that of its wrapper until it does."""
    state: str
    """psutil's name of the process' state."""
    cpu_s: float
    """CPU seconds of its process and its threads."""
    total_cpu_s: float
    """... since it began."""
    cores: frozenset[int]
    """It may run there."""
    phase: str
    step: int
    silent_s: float
    """Seconds since its last heartbeat; 0 before the first."""
    median_step_s: float
    inside_collective: bool | None
    """None if nobody looked, because it is not silent."""
    delayed_s: float | None = None
    """Seconds for which its slowest thread waited for a core; None if not known."""


class Ranks:
    """Compares counters of one look with those of the look before.

    Args:
        shm_dir: of the run; None if there is no shared memory.
    """

    def __init__(self, shm_dir: Path | None) -> None:
        self._shm_dir = shm_dir
        self._processes: dict[int, psutil.Process] = {}
        self._cpu_s: dict[int, float] = {}

    def look(self, pids: Mapping[int, int], now_s: float, quiet_s: float, since_s: float) -> tuple[RankUse, ...]:
        """The ranks whose processes exist.

        Args:
            pids: the process that was started for each.
            now_s: CLOCK_MONOTONIC seconds.
            quiet_s: of a rank that has been silent for longer, the ring is read too.
            since_s: when they were started; older beats are not theirs.
        """
        found = []
        for rank, started in pids.items():
            beat = self._beat_of(rank, since_s)
            pid = beat.pid if beat is not None else started
            try:
                process = self._processes.get(pid) or psutil.Process(pid)
                with process.oneshot():
                    state, times = process.status(), process.cpu_times()
                cores = frozenset(process.cpu_affinity())
            except psutil.Error:
                self._processes.pop(pid, None)
                continue
            self._processes[pid] = process
            total_s = times.user + times.system
            silent_s = max(0.0, now_s - beat.t_s) if beat is not None else 0.0
            found.append(
                RankUse(
                    rank=rank,
                    pid=pid,
                    state=state,
                    cpu_s=max(0.0, total_s - self._cpu_s.get(pid, total_s)),
                    total_cpu_s=total_s,
                    cores=cores,
                    phase=beat.phase if beat is not None else "setup",
                    step=beat.step if beat is not None else 0,
                    silent_s=silent_s,
                    median_step_s=beat.median_step_s if beat is not None else 0.0,
                    inside_collective=self._is_inside(rank, pid) if silent_s > quiet_s else None,
                )
            )
        self._cpu_s = {one.pid: one.total_cpu_s for one in found}
        self._processes = {pid: one for pid, one in self._processes.items() if pid in self._cpu_s}
        return tuple(found)

    def _beat_of(self, rank: int, since_s: float) -> Beat | None:
        if self._shm_dir is None:
            return None
        try:
            beat = read_heartbeat(heartbeat_path(self._shm_dir, rank))
        except DiagnosticsError:
            return None
        return beat if beat.t_s >= since_s else None

    def _is_inside(self, rank: int, pid: int) -> bool | None:
        if self._shm_dir is None:
            return None
        try:
            ring = read_ring(ring_path(self._shm_dir, rank))
        except DiagnosticsError:
            return None
        return bool(ring.pending) if ring.pid == pid else None
