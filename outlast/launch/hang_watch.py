"""Looks for ranks that make no progress, by what they leave in shared memory."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

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
from outlast.errors import DiagnosticsError
from outlast.launch.config import LaunchConfig

_NO_TIME_S = 1e-9
"""Stands for a median that is not known yet, so that the floor is the limit."""


class HangWatch:
    """Watches this node's ranks of one start after another.

    Args:
        run_dir: the run's directory, which names the shared memory.
        config: when silence is too long.

    Raises:
        DiagnosticsError: there is no shared memory to be had.
    """

    def __init__(self, run_dir: Path, config: LaunchConfig) -> None:
        self.shm_dir = shm_directory(run_dir)
        self.rules = StallRules(
            floor_s=config.hang_floor_s,
            factor=config.hang_factor,
            startup_limit_s=config.startup_limit_s,
            patience=config.patience,
        )
        self._started_s = time.monotonic()

    def begin(self, ranks: tuple[int, ...]) -> None:
        """``ranks`` are about to be started: forget what earlier processes of theirs left."""
        self.forget(ranks)
        self._started_s = time.monotonic()

    def forget(self, ranks: tuple[int, ...]) -> None:
        """Remove what ``ranks`` left in shared memory."""
        for rank in ranks:
            heartbeat_path(self.shm_dir, rank).unlink(missing_ok=True)
            ring_path(self.shm_dir, rank).unlink(missing_ok=True)

    def close(self, ranks: tuple[int, ...]) -> None:
        """Remove what ``ranks`` left, and the folder unless others of this machine still use it."""
        self.forget(ranks)
        try:
            self.shm_dir.rmdir()
        except OSError as error:  # others of this machine still use it, or one of them was first
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise

    def look(self, pids: Mapping[int, int], *, alone: bool) -> tuple[Culprit, ...]:
        """The ranks to be killed now; mostly none.

        Args:
            pids: the running ranks of this node and the process that was started for each. A rank that ended must not
                be among them: it would be silent for ever.
            alone: whether there are no other nodes.
        """
        now_s = time.monotonic()
        if not any(one.silent_s(now_s) > one.limit_s(self.rules) for one in self._glance(pids)):
            return ()
        seen = [_in_no_phase(one) for one in self.see(pids)]
        now_s = time.monotonic()
        verdict = judge(seen, self.rules, now_s)
        return tuple(one for one in verdict.culprits if not one.weak or self._nobody_else_is_busy(seen, now_s, alone))

    def see(self, pids: Mapping[int, int]) -> list[Observation]:
        """Everything that is to be seen of these ranks now: heartbeats, process states and collectives."""
        return [observe(self.shm_dir, rank=rank, pid=pid, started_s=self._started_s) for rank, pid in pids.items()]

    def _nobody_else_is_busy(self, seen: list[Observation], now_s: float, alone: bool) -> bool:
        """Whether ranks that wait for others may be blamed: not while one of those others may be in a slow phase, such
        as a checkpoint. Of ranks on other nodes that is not known, so they are given the limit of those phases."""
        limits_s = [one.limit_s(self.rules) if alone else self.rules.startup_limit_s for one in seen]
        return all(one.silent_s(now_s) > limit_s for one, limit_s in zip(seen, limits_s, strict=True))

    def _glance(self, pids: Mapping[int, int]) -> list[Observation]:
        """Heartbeats and process states alone, which is cheap: all that is needed while everybody beats in time."""
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
                _in_no_phase(Observation(rank=rank, pid=pid, state=state, started_s=self._started_s, beat=beat))
            )
        return seen


def _in_no_phase(one: Observation) -> Observation:
    """A stopped process does nothing that takes long, whatever phase it was in: the limit of a step holds for it."""
    if one.state != "stopped" or one.beat is None:
        return one
    return replace(one, beat=replace(one.beat, phase="step", median_step_s=one.beat.median_step_s or _NO_TIME_S))
