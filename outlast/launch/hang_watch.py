"""Finds ranks that make no progress, from the heartbeats and rings they keep in shared memory."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil

from outlast.diagnostics.live import (
    Culprit,
    Observation,
    StallRules,
    heartbeat_path,
    judge,
    observe,
    process_state,
    read_heartbeat,
    ring_path,
    shm_directory,
)
from outlast.errors import DiagnosticsError, RunDirectoryError
from outlast.launch.config import LaunchConfig

_GRAIN_S = 1.0
"""The kernel's start times, and the clock that they are counted from, are coarse."""
_NO_TIME_S = 1e-9
"""Replaces a median step that is not known yet, so that the floor is the limit."""


class HangWatch:
    """Watches this node's ranks of one start after another.

    Args:
        run_dir: the run's directory, which names the shared memory.
        config: how long a rank may be silent.

    Raises:
        DiagnosticsError: there is no usable shared memory.
    """

    def __init__(self, run_dir: Path, config: LaunchConfig) -> None:
        self._run_dir = run_dir
        self.shm_dir = shm_directory(run_dir)
        self.rules = StallRules(
            floor_s=config.hang_floor_s,
            factor=config.hang_factor,
            startup_limit_s=config.startup_limit_s,
            patience=config.patience,
        )
        self._started_s = time.monotonic()

    def begin(self, ranks: tuple[int, ...]) -> None:
        """``ranks`` are about to be started: remove what their predecessors left.

        Raises:
            RunDirectoryError: processes of another job, which are alive, are these ranks of this run; nothing is
                removed.
        """
        others = self._others(ranks)
        if others:
            rank, pid = next(iter(others.items()))
            raise RunDirectoryError(
                f"the run in {self._run_dir} is being trained on this node: process {pid} is its rank {rank}",
                f"stop that job, or wait until it ends; or start elsewhere: --run.dir OTHER (if process {pid} is "
                f"something else, remove {self.shm_dir})",
            )
        self._remove_files(ranks)
        self._started_s = time.monotonic()

    def close(self, ranks: tuple[int, ...]) -> None:
        """Remove what ``ranks`` left, and the folder unless other processes of this machine still use it."""
        self._remove_files(tuple(rank for rank in ranks if rank not in self._others(ranks)))
        try:
            self.shm_dir.rmdir()
        except OSError as error:  # still in use, or already removed by another process
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise

    def _others(self, ranks: tuple[int, ...]) -> dict[int, int]:
        """The processes of those ranks whose heartbeat is that of another job's process, and alive."""
        others = {}
        for rank in ranks:
            try:
                beat = read_heartbeat(heartbeat_path(self.shm_dir, rank))
            except DiagnosticsError:
                continue
            if _is_of_others(beat.pid, beat.t_s):
                others[rank] = beat.pid
        return others

    def find_hung(self, pids: Mapping[int, int], *, alone: bool) -> tuple[Culprit, ...]:
        """The ranks to kill now; usually none.

        Args:
            pids: the running ranks of this node and the process started for each. A rank that has exited must not be
                among them: it would be silent for ever.
            alone: whether there are no other nodes.
        """
        now_s = time.monotonic()
        if not any(one.silent_s(now_s) > one.limit_s(self.rules) for one in self._observe_heartbeats(pids)):
            return ()
        seen = [_stopped_in_step(one) for one in self.observe(pids)]
        now_s = time.monotonic()
        verdict = judge(seen, self.rules, now_s)
        return tuple(one for one in verdict.culprits if not one.weak or self._nobody_else_is_busy(seen, now_s, alone))

    def observe(self, pids: Mapping[int, int]) -> list[Observation]:
        """Heartbeats, process states and collectives of these ranks now."""
        return [observe(self.shm_dir, rank=rank, pid=pid, started_s=self._started_s) for rank, pid in pids.items()]

    def _remove_files(self, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            heartbeat_path(self.shm_dir, rank).unlink(missing_ok=True)
            ring_path(self.shm_dir, rank).unlink(missing_ok=True)

    def _nobody_else_is_busy(self, seen: list[Observation], now_s: float, alone: bool) -> bool:
        """Whether ranks that wait for others may be blamed.

        Not while one of those others may be in a slow phase, such as a checkpoint. The phases of ranks on other nodes
        are unknown, so these get the limit of slow phases.
        """
        limits_s = [one.limit_s(self.rules) if alone else self.rules.startup_limit_s for one in seen]
        return all(one.silent_s(now_s) > limit_s for one, limit_s in zip(seen, limits_s, strict=True))

    def _observe_heartbeats(self, pids: Mapping[int, int]) -> list[Observation]:
        """Heartbeats and process states only, which is cheap, and enough while every rank beats in time."""
        seen = []
        for rank, pid in pids.items():
            try:
                beat = read_heartbeat(heartbeat_path(self.shm_dir, rank))
            except DiagnosticsError:
                beat = None  # none yet: silence counts from the start
            if beat is not None and beat.t_s < self._started_s:
                beat = None
            state = process_state(beat.pid if beat is not None else pid)
            seen.append(
                _stopped_in_step(Observation(rank=rank, pid=pid, state=state, started_s=self._started_s, beat=beat))
            )
        return seen


def _is_of_others(pid: int, since_s: float) -> bool:
    """Whether the process is neither this one nor started by it, and has lived since a time on the monotonic clock."""
    try:
        process = psutil.Process(pid)
        ours = os.getpid() in (pid, *(parent.pid for parent in process.parents()))
        if ours or process_state(pid) == "dead":
            return False
        # A pid may be used again.
        return bool(process.create_time() <= time.time() - (time.monotonic() - since_s) + _GRAIN_S)
    except psutil.NoSuchProcess:
        return False


def _stopped_in_step(one: Observation) -> Observation:
    """A stopped process makes no progress in any phase, so the limit of a step applies to it."""
    if one.state != "stopped" or one.beat is None:
        return one
    return replace(one, beat=replace(one.beat, phase="step", median_step_s=one.beat.median_step_s or _NO_TIME_S))
