"""Finds ranks that make no progress, from the heartbeats and rings they keep in shared memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from outlast.diagnostics.live import (
    Beat,
    Culprit,
    Observation,
    Ring,
    StallRules,
    heartbeat_path,
    judge,
    observe,
    process_state,
    read_heartbeat,
    read_ring,
    remove_if_empty,
    ring_path,
    shm_directory,
)
from outlast.diagnostics.live.suspects import Suspect, find_suspects
from outlast.diagnostics.live.unwatched import is_unwatched, mark_watched
from outlast.diagnostics.monitor import Accused
from outlast.diagnostics.syndromes.restraint import Watcher
from outlast.errors import DiagnosticsError, RunDirectoryError
from outlast.launch.activity import INTERVAL_S as ACTIVITY_S
from outlast.launch.activity import Activity
from outlast.launch.config import LaunchConfig

_GRAIN_S = 1.0
"""The kernel's start times, and the clock that they are counted from, are coarse."""
_SETUP_S = 30.0
"""A set-up that is shorter than this is nothing to write about."""
_SOON_S = 1.0
"""When a rank has been silent for so long, it is looked at so often whether it does anything."""
_NO_TIME_S = 1e-9
"""Replaces a median step that is not known yet, so that the floor is the limit."""


class WatchClock:
    """How long the watch itself did not run: its launcher was stopped, or its machine suspended, paused or overloaded.

    The ranks had no chance to beat then, or nobody looked at their beats, so that time is no silence. While a machine
    is suspended CLOCK_MONOTONIC stands still, and nothing needs to be excused; in a paused virtual machine it may not.

    Args:
        interval_s: the time between two ticks, when all is well.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self.begin()

    def begin(self) -> None:
        """The ranks start anew."""
        self._watcher = Watcher(interval_s=self._interval_s, last_s=time.monotonic())

    def tick(self) -> None:
        """The watch runs."""
        self._watcher = self._watcher.tick(time.monotonic())

    def lost_s(self, since_s: float) -> float:
        """Seconds since ``since_s``, CLOCK_MONOTONIC, in which the watch did not run."""
        return self._watcher.lost_s(since_s)


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
            alone_limit_s=config.alone_limit_s,
            together_limit_s=config.together_limit_s,
            patience=config.patience,
        )
        self.waiting = ""
        """What the watch waits for, and for how long, while ranks make no progress and none is to blame; else empty."""
        self.suspects: tuple[Suspect, ...] = ()
        """Ranks of this node that keep others of it waiting, at the last look."""
        self.newest: tuple[Observation, ...] = ()
        """How the ranks did at the last look; empty while none is silent for long."""
        self.ended: dict[int, int] = {}
        """By rank, the process that has ended while the one that the launcher started for it, a wrapper, still runs."""
        self._alive: set[int] = set()
        self._recheck_s = config.recheck_s
        self._suspect_after_s = config.told_after_s
        self._clock = WatchClock(config.monitor_interval_s)
        self._activity = Activity()
        self._stopped_until_s: dict[int, float] = {}
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
        self._clock.begin()
        self._activity = Activity()
        self._stopped_until_s = {}
        self._alive = set()
        self.ended = {}
        self.waiting = ""
        self.suspects = ()
        self.newest = ()
        self._started_s = time.monotonic()

    def close(self, ranks: tuple[int, ...]) -> None:
        """Remove what ``ranks`` left, and the folder unless other processes of this machine still use it."""
        self._remove_files(tuple(rank for rank in ranks if rank not in self._others(ranks)))
        remove_if_empty(self.shm_dir)

    def ended_early(self, ended: Iterable[int]) -> dict[int, str]:
        """Where those of these ranks were that had not said that they finish; their processes have ended."""
        beats = {rank: self._beat_of(rank) for rank in ended}
        return {
            rank: f"in phase {beat.phase} of step {beat.step}"
            for rank, beat in beats.items()
            if beat is not None and beat.phase != "finish"
        }

    def left_peers(self, ended: Iterable[int]) -> dict[int, str]:
        """After which step those of these ranks ended that had been in collectives with others."""
        left = {}
        for rank in ended:
            beat = self._beat_of(rank)
            if beat is None:
                continue
            with suppress(DiagnosticsError):
                if beat.step or read_ring(ring_path(self.shm_dir, rank)).entered:
                    left[rank] = f"after step {beat.step}" if beat.step else "before its first step"
        return left

    def last_rings(self, ranks: Iterable[int], newest: int | None = None) -> list[Ring]:
        """The newest collectives that these ranks have left in this start, ended or not; all, or so many of each."""
        found = []
        for rank in ranks:
            beat = self._beat_of(rank)
            if beat is not None:
                with suppress(DiagnosticsError):
                    ring = read_ring(ring_path(self.shm_dir, rank), newest)
                    found += [ring] if ring.pid == beat.pid else []
        return found

    def is_stuck(self, pids: Mapping[int, int]) -> bool:
        """Whether one of these ranks waits inside a collective for longer than it may be silent."""
        now_s = time.monotonic()
        return any(one.pending and one.silent_s(now_s) > one.limit_s(self.rules) for one in self.observe(pids))

    def steps_begun(self, ranks: tuple[int, ...]) -> bool:
        """Whether one of these ranks has left set-up."""
        for rank in ranks:
            with suppress(DiagnosticsError):  # not set up at all
                if read_heartbeat(heartbeat_path(self.shm_dir, rank)).phase != "setup":
                    return True
        return False

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

    def furthest_step(self, ranks: tuple[int, ...]) -> int:
        """The furthest step that one of ``ranks`` has begun in this start; 0 in set-up."""
        beats = [self._beat_of(rank) for rank in ranks]
        return max((beat.step for beat in beats if beat is not None), default=0)

    def find_hung(
        self, pids: Mapping[int, int], *, alone: bool, accused: Sequence[Accused] = ()
    ) -> tuple[Culprit, ...]:
        """The ranks to kill now; usually none.

        Args:
            pids: the running ranks of this node and the process started for each. A rank that has exited must not be
                among them: it would be silent for ever.
            alone: whether there are no other nodes.
            accused: ranks that are at fault as all nodes' launchers see it together, of this node or others. One of
                this node is named if it still does what it was accused of.
        """
        self._clock.tick()
        watched = {rank: pid for rank, pid in pids.items() if not is_unwatched(self.shm_dir, rank)}
        alone, pids = alone and watched.keys() == pids.keys(), watched  # of the others as little is known as elsewhere
        beats = self._observe_heartbeats(pids)
        now_s = time.monotonic()
        silent = any(one.silent_s(now_s) > _SOON_S for one in beats)
        self._activity.look(
            {one.rank: one.pid for one in beats if one.is_program}, now_s, _SOON_S if silent else ACTIVITY_S
        )
        for one in beats:  # who was stopped until now has had no chance to beat
            if one.state == "stopped":
                self._stopped_until_s[one.rank] = now_s
        self.ended = {
            one.rank: one.beat.pid
            for one in beats
            if one.state == "dead" and one.beat is not None and one.silent_s(now_s) > self.rules.floor_s
        }
        if not any(one.silent_s(now_s) > self._first_limit_s(one) for one in beats):
            self.waiting = ""
            self.suspects = ()
            self.newest = ()
            return ()
        seen, culprits = self._judge(pids, alone, accused)
        self.newest = tuple(seen)
        self.suspects = find_suspects(seen, self._suspect_after_s, time.monotonic(), whole=alone)
        if not culprits:
            return ()
        time.sleep(self._recheck_s)
        again, culprits = self._judge(pids, alone, accused)
        before = {one.rank: one for one in seen}
        moved = {one.rank for one in again if one.has_moved_since(before[one.rank])}
        return tuple(one for one in culprits if one.rank not in moved)

    def _judge(
        self, pids: Mapping[int, int], alone: bool, accused: Sequence[Accused] = ()
    ) -> tuple[list[Observation], tuple[Culprit, ...]]:
        """What is seen now, and whom it convicts."""
        seen = [_stopped_in_step(one) for one in self.observe(pids)]
        now_s = time.monotonic()
        verdict = judge(seen, replace(self.rules, one_node=alone), now_s)
        culprits = tuple(
            one for one in verdict.culprits if not one.weak or self._nobody_else_is_busy(seen, now_s, alone)
        )
        if not culprits or any(one.weak for one in culprits):
            culprits = tuple(_as_accused(seen, accused, now_s)) or culprits
        silent = [one for one in seen if one.silent_s(now_s) > self._told_after_s(one) and one.state != "dead"]
        self.waiting = "" if culprits or not silent else self._describe_wait(silent, now_s, alone, accused)
        return seen, culprits

    def _describe_wait(self, silent: list[Observation], now_s: float, alone: bool, accused: Sequence[Accused]) -> str:
        longest = max(silent, key=lambda one: one.silent_s(now_s))
        limit_s = max(self._patience_s(one, alone) for one in silent)
        return (
            f"no progress for {longest.silent_s(now_s):.0f} s: {', '.join(one.where for one in silent[:4])}"
            f"{' …' if len(silent) > 4 else ''}; {_blame(accused)}; waiting up to {limit_s:.0f} s, then "
            f"the ranks at fault, or else those furthest behind, are killed"
        )

    def _told_after_s(self, one: Observation) -> float:
        """From when on a silent rank is worth a line."""
        is_set_up = one.beat is not None and one.beat.phase != "setup"
        if one.is_program and not one.pending:  # until steps come, it imports, compiles, reads: who knows
            is_set_up = one.beat is not None and one.beat.median_step_s > 0
        return self.rules.floor_s if is_set_up else max(self.rules.floor_s, _SETUP_S)

    def _patience_s(self, one: Observation, alone: bool) -> float:
        """How long a silent rank is waited for at most."""
        if not one.pending:
            return max(one.limit_s(self.rules), self.rules.together_limit_s)
        return max(self.rules.patience * one.limit_s(self.rules), 0.0 if alone else self.rules.startup_limit_s)

    def _first_limit_s(self, one: Observation) -> float:
        """From when on a look at the rings is worth it: phases with long limits count, because their peers may wait."""
        return min(one.limit_s(self.rules), self.rules.floor_s, self.rules.alone_limit_s, self._suspect_after_s)

    def observe(self, pids: Mapping[int, int]) -> list[Observation]:
        """Heartbeats, process states and collectives of these ranks now."""
        found = [observe(self.shm_dir, rank=rank, pid=pid, started_s=self._started_s) for rank, pid in pids.items()]
        true = [self._excused(self._with_true_state(one, pids[one.rank])) for one in found]
        now_s = time.monotonic()
        return [replace(one, idle_s=self._activity.idle_s(one.rank, now_s)) for one in true]

    def _with_true_state(self, one: Observation, started_pid: int) -> Observation:
        """A process that was never seen alive may live in another PID namespace; then its wrapper's state has to do."""
        if one.state != "dead":
            self._alive.add(one.pid)
            return one
        return one if one.pid in self._alive else replace(one, state=process_state(started_pid))

    def _excused(self, one: Observation) -> Observation:
        """With the time that does not count: in which the watch did not run, or it saw the rank stopped."""
        since_s = one.beat.t_s if one.beat is not None else one.started_s
        excused_s = self._clock.lost_s(since_s)
        if one.state == "running":
            excused_s = max(excused_s, self._stopped_until_s.get(one.rank, since_s) - since_s)
        return replace(one, excused_s=excused_s)

    def _remove_files(self, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            heartbeat_path(self.shm_dir, rank).unlink(missing_ok=True)
            ring_path(self.shm_dir, rank).unlink(missing_ok=True)
            mark_watched(self.shm_dir, rank)

    def _nobody_else_is_busy(self, seen: list[Observation], now_s: float, alone: bool) -> bool:
        """Whether ranks that wait for others may be blamed.

        Not while one of those others may be in a slow phase, such as a checkpoint. The phases of ranks on other nodes
        are unknown, so these get the limit of slow phases.
        """
        limits_s = [one.limit_s(self.rules) if alone else self.rules.startup_limit_s for one in seen]
        return all(one.silent_s(now_s) > limit_s for one, limit_s in zip(seen, limits_s, strict=True))

    def _beat_of(self, rank: int) -> Beat | None:
        """The newest beat of this start, also if its process has ended."""
        try:
            beat = read_heartbeat(heartbeat_path(self.shm_dir, rank))
        except DiagnosticsError:
            return None
        return beat if beat.t_s >= self._started_s else None

    def _observe_heartbeats(self, pids: Mapping[int, int]) -> list[Observation]:
        """Heartbeats and process states only, which is cheap, and enough while every rank beats in time."""
        seen = []
        for rank, pid in pids.items():
            beat = self._beat_of(rank)  # if there is none yet, silence counts from the start
            own = beat.pid if beat is not None else pid
            one = Observation(rank=rank, pid=own, state=process_state(own), started_s=self._started_s, beat=beat)
            seen.append(_stopped_in_step(self._excused(self._with_true_state(one, pid))))
        return seen


def _blame(accused: Sequence[Accused]) -> str:
    if not accused:
        return "nobody is to blame yet"
    return "to blame: " + ", ".join(f"rank {one.rank} on node {one.node} ({one.host})" for one in accused[:4])


def _as_accused(seen: Iterable[Observation], accused: Sequence[Accused], now_s: float) -> Iterator[Culprit]:
    """Those of this node's ranks that are accused, and have not moved since."""
    by_rank = {one.rank: one for one in accused}
    for one in seen:
        told = by_rank.get(one.rank)
        if (
            told is not None
            and one.state != "dead"
            and (told.pid, told.step, told.entered) == (one.pid, one.step, one.entered)
            and (told.inside or not one.pending)
            and one.silent_s(now_s) > told.limit_s
        ):
            yield Culprit(
                rank=one.rank,
                pid=one.pid,
                step=one.step,
                silent_s=one.silent_s(now_s),
                limit_s=told.limit_s,
                evidence=f"{told.evidence}; judged from the ranks of all nodes",
                weak=False,
            )


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
