"""Which of this node's ranks make no progress, and which of them blocks the others.

Everything here but :func:`observe` is a pure function of observations. A collective waits for its last rank, so one
hung rank silences all of them. Two things distinguish the culprit from its victims: its process state, and its
collectives, since it never entered the one in which its peers wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from outlast.diagnostics.live.heartbeat import Beat, read_heartbeat
from outlast.diagnostics.live.recorder import Collective, Ring, read_ring
from outlast.diagnostics.live.shm import heartbeat_path, ring_path

ProcessState = Literal["running", "stopped", "dead"]

SLOW_PHASES = ("setup", "checkpoint", "finish")
"""Phases whose duration is unrelated to that of a step."""


@dataclass(frozen=True, kw_only=True)
class StallRules:
    """How long a rank may be silent. The launcher fills it from its own settings."""

    floor_s: float
    """The limit is never lower than this."""
    factor: float
    """The limit of a step, in median step durations."""
    startup_limit_s: float
    """The limit in set-up, checkpoint and finish, and until a median is known."""
    patience: float = 3.0
    """If the evidence does not distinguish the culprit from its victims, wait this many limits before naming anyone."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The state of one local rank at one moment."""

    rank: int
    pid: int
    state: ProcessState
    started_s: float
    """When the launcher started it, CLOCK_MONOTONIC seconds; silence counts from here until its first beat."""
    beat: Beat | None = None
    ring: Ring | None = None

    @property
    def step(self) -> int:
        return self.beat.step if self.beat is not None else 0

    @property
    def entered(self) -> int:
        return self.ring.entered if self.ring is not None else 0

    @property
    def pending(self) -> tuple[Collective, ...]:
        return self.ring.pending if self.ring is not None else ()

    def silent_s(self, now_s: float) -> float:
        """Seconds since its last beat."""
        return now_s - (self.beat.t_s if self.beat is not None else self.started_s)

    def limit_s(self, rules: StallRules) -> float:
        """How long it may be silent: ``max(floor, factor x median step)``, or the start-up limit."""
        if self.beat is None or self.beat.phase in SLOW_PHASES or self.beat.median_step_s <= 0.0:
            return rules.startup_limit_s
        return max(rules.floor_s, rules.factor * self.beat.median_step_s)


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """A rank that blocks the others."""

    rank: int
    pid: int
    step: int
    silent_s: float
    limit_s: float
    evidence: str
    weak: bool
    """True if it may just as well be a victim of the network or of a rank on another node."""


@dataclass(frozen=True, kw_only=True)
class StallVerdict:
    """The result of :func:`judge`: both are empty while all is well; culprits are empty while it is unclear."""

    silent: tuple[int, ...] = ()
    """Ranks that have been silent beyond their limits."""
    culprits: tuple[Culprit, ...] = ()


def observe(shm_dir: Path, *, rank: int, pid: int, started_s: float) -> Observation:
    """Observe one rank now. What an earlier process of the same rank left in shared memory is ignored.

    Args:
        shm_dir: the run's :func:`outlast.diagnostics.live.shm.shm_directory`.
        rank: the rank.
        pid: the process that the launcher started for it.
        started_s: when it did, CLOCK_MONOTONIC seconds.

    Raises:
        DiagnosticsError: a heartbeat or ring is damaged, or another version wrote it.
    """
    beat_file, ring_file = heartbeat_path(shm_dir, rank), ring_path(shm_dir, rank)
    beat = read_heartbeat(beat_file) if beat_file.exists() else None
    if beat is not None and beat.t_s < started_s:
        beat = None
    ring = None
    if beat is not None:
        pid = beat.pid  # the launcher's pid may be that of a wrapper (numactl, a shell)
        ring = read_ring(ring_file) if ring_file.exists() else None
        if ring is not None and ring.pid != pid:
            ring = None
    return Observation(rank=rank, pid=pid, state=process_state(pid), started_s=started_s, beat=beat, ring=ring)


def process_state(pid: int) -> ProcessState:
    """Whether the process is running (or sleeping), stopped by a signal or a tracer, or dead (or a zombie)."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "dead"
    if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return "stopped"
    return "dead" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else "running"


def judge(ranks: Sequence[Observation], rules: StallRules, now_s: float) -> StallVerdict:
    """Which ranks are stalled and which caused it, as far as this node can tell.

    No rank is named until one is silent beyond its limit. Then the culprits are the first of these:

    1. ranks whose process is stopped or dead;
    2. silent ranks outside any collective, if other ranks wait inside one, or if every rank of the node is silent (then
       only the ranks furthest behind);
    3. no rank, while the silent ranks wait for a local rank that is outside any collective and within its own limit,
       for example because it writes a checkpoint;
    4. after ``patience`` limits, the silent ranks furthest behind by (step, collectives entered). The evidence is weak:
       all of them wait, so the network or a rank on another node may be at fault.

    Args:
        ranks: all ranks of this node.
        rules: how long a rank may be silent.
        now_s: when they were observed, CLOCK_MONOTONIC seconds.
    """
    silent = [one for one in ranks if one.silent_s(now_s) > one.limit_s(rules)]
    if not silent:
        return StallVerdict()

    def verdict(culprits: Sequence[Observation], *, weak: bool) -> StallVerdict:
        return StallVerdict(
            silent=tuple(one.rank for one in silent),
            culprits=tuple(
                Culprit(
                    rank=one.rank,
                    pid=one.pid,
                    step=one.step,
                    silent_s=one.silent_s(now_s),
                    limit_s=one.limit_s(rules),
                    evidence=_evidence(one, ranks, now_s, weak=weak),
                    weak=weak,
                )
                for one in culprits
            ),
        )

    halted = [one for one in ranks if one.state != "running"]
    if halted:
        return verdict(halted, weak=False)
    outside = [one for one in silent if not one.pending]
    if outside and any(one.pending for one in ranks):
        return verdict(outside, weak=False)
    if outside and len(silent) == len(ranks):
        return verdict(_furthest_behind(outside), weak=False)
    if not outside and any(not one.pending for one in ranks):
        return verdict([], weak=True)
    patient = [one for one in silent if one.silent_s(now_s) > rules.patience * one.limit_s(rules)]
    return verdict(_furthest_behind(patient), weak=True)


def _furthest_behind(ranks: Sequence[Observation]) -> list[Observation]:
    if not ranks:
        return []
    least = min((one.step, one.entered) for one in ranks)
    return [one for one in ranks if (one.step, one.entered) == least]


def _evidence(culprit: Observation, ranks: Sequence[Observation], now_s: float, *, weak: bool) -> str:
    parts = [_describe_state(culprit, now_s), _describe_collective(culprit, now_s)]
    peers = _describe_waiting_peers([one for one in ranks if one.rank != culprit.rank], now_s)
    text = ", ".join(part for part in parts if part)
    if peers:
        text += f"; {peers}"
    if weak:
        text += "; weak evidence: the network or a rank on another node may be at fault"
    return text


def _describe_state(one: Observation, now_s: float) -> str:
    if one.state == "stopped":
        return "stopped (state T)"
    if one.state == "dead":
        return f"process {one.pid} is dead"
    if one.beat is None:
        return f"no heartbeat {one.silent_s(now_s):.1f} s after its start"
    return f"running, silent for {one.silent_s(now_s):.1f} s in phase {one.beat.phase} of step {one.step}"


def _describe_collective(one: Observation, now_s: float) -> str:
    if one.ring is None:
        return "no recorder"
    if one.pending:
        oldest = one.pending[0]
        return f"inside {oldest.op} #{oldest.seq} of step {oldest.step} for {now_s - oldest.entered_s:.1f} s"
    if not one.ring.records:
        return "has not entered a collective" if one.entered == 0 else f"its collective #{one.entered - 1} is torn"
    last = one.ring.records[-1]
    return f"last entered {last.op} #{last.seq} in step {last.step}, completed"


def _describe_waiting_peers(peers: Sequence[Observation], now_s: float) -> str:
    """``3 peers have been waiting 9.1 s in all_gather #1235``, grouped by where they wait."""
    groups: dict[tuple[str, int], list[float]] = {}
    for one in peers:
        if one.pending:
            oldest = one.pending[0]
            groups.setdefault((oldest.op, oldest.seq), []).append(now_s - oldest.entered_s)
    parts = []
    for (op, seq), waits in sorted(groups.items(), key=lambda item: item[0][1]):
        noun = "1 peer has" if len(waits) == 1 else f"{len(waits)} peers have"
        parts.append(f"{noun} been waiting {max(waits):.1f} s in {op} #{seq}")
    return " and ".join(parts)
