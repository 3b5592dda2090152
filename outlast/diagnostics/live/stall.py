"""Which of this node's ranks make no progress, and which of them holds the others up.

Everything here but :func:`observe` is a pure function of what was observed. A collective waits for its last rank, so
one rank that hangs silences all of them; the culprit is told from its victims by its process state and by where its
collectives stand: it never entered the one its peers wait in.
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
"""Phases whose duration has nothing to do with a step's."""


@dataclass(frozen=True, kw_only=True)
class StallRules:
    """When silence is too long. The launcher fills it from its own settings."""

    floor_s: float
    """The limit is never lower than this."""
    factor: float
    """The limit of a running step, in medians of the last steps' durations."""
    startup_limit_s: float
    """The limit in set-up, checkpoint and finish, and as long as no median is known."""
    patience: float = 3.0
    """Where the evidence does not tell the culprit from its victims, wait this many limits before naming anyone."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One local rank, as seen at one moment."""

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
        """Seconds since its last sign of progress."""
        return now_s - (self.beat.t_s if self.beat is not None else self.started_s)

    def limit_s(self, rules: StallRules) -> float:
        """How long it may be silent: ``max(floor, factor x median step)``, or the start-up limit."""
        if self.beat is None or self.beat.phase in SLOW_PHASES or self.beat.median_step_s <= 0.0:
            return rules.startup_limit_s
        return max(rules.floor_s, rules.factor * self.beat.median_step_s)


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """A rank that holds the others up."""

    rank: int
    pid: int
    step: int
    silent_s: float
    limit_s: float
    evidence: str
    weak: bool
    """True where it may as well be a victim of a rank on another node, or of the network."""


@dataclass(frozen=True, kw_only=True)
class StallVerdict:
    """What :func:`judge` found; both empty while all is well, and culprits empty while it is not clear yet."""

    silent: tuple[int, ...] = ()
    """Ranks beyond their limits."""
    culprits: tuple[Culprit, ...] = ()


def observe(shm_dir: Path, *, rank: int, pid: int, started_s: float) -> Observation:
    """Look at one rank now. What an earlier process of the same rank left in shared memory is not taken for its own.

    Args:
        shm_dir: :func:`outlast.diagnostics.live.shm.shm_directory` of the run.
        rank: which.
        pid: the process that the launcher started for it.
        started_s: when that was, CLOCK_MONOTONIC seconds.

    Raises:
        DiagnosticsError: a heartbeat or ring is there but damaged, or of another version.
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
    """Whether the process runs (or sleeps), is stopped by a signal or a tracer, or is dead (a zombie included)."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "dead"
    if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return "stopped"
    return "dead" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else "running"


def judge(ranks: Sequence[Observation], rules: StallRules, now_s: float) -> StallVerdict:
    """Who is stalled, and whose fault it is, as far as this node can tell.

    Nobody is named before some rank is silent beyond its limit. Then, in this order:

    1. ranks whose process is stopped or dead;
    2. silent ranks outside any collective, while others wait inside one, or while every rank of the node is silent
       (then the one furthest behind);
    3. nobody, while the silent ranks wait for a local rank that is outside any collective and within its own limit (it
       writes a checkpoint, say);
    4. after ``patience`` limits, the silent ranks furthest behind by (step, collectives entered), on weak evidence: all
       wait for each other, so the network or a rank on another node may be at fault.

    Args:
        ranks: all ranks of this node.
        rules: when silence is too long.
        now_s: CLOCK_MONOTONIC seconds at which they were observed.
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
    parts = [_state_words(culprit, now_s), _collective_words(culprit, now_s)]
    peers = _waiting_words([one for one in ranks if one.rank != culprit.rank], now_s)
    text = ", ".join(part for part in parts if part)
    if peers:
        text += f"; {peers}"
    if weak:
        text += "; weak evidence: the network or a rank on another node may be at fault"
    return text


def _state_words(one: Observation, now_s: float) -> str:
    if one.state == "stopped":
        return "stopped (state T)"
    if one.state == "dead":
        return f"process {one.pid} is dead"
    if one.beat is None:
        return f"no heartbeat {one.silent_s(now_s):.1f} s after its start"
    return f"running, silent for {one.silent_s(now_s):.1f} s in phase {one.beat.phase} of step {one.step}"


def _collective_words(one: Observation, now_s: float) -> str:
    if one.ring is None:
        return "no recorder"
    if one.pending:
        oldest = one.pending[0]
        return f"inside {oldest.op} #{oldest.seq} of step {oldest.step} for {now_s - oldest.entered_s:.1f} s"
    if not one.ring.records:
        return "has entered no collective" if one.entered == 0 else f"its collective #{one.entered - 1} is torn"
    last = one.ring.records[-1]
    return f"last entered {last.op} #{last.seq} in step {last.step}, completed"


def _waiting_words(peers: Sequence[Observation], now_s: float) -> str:
    """``3 peers have been waiting 9.1 s in all_gather #1235``, grouped by where they wait."""
    groups: dict[tuple[str, int], list[float]] = {}
    for one in peers:
        if one.pending:
            oldest = one.pending[0]
            groups.setdefault((oldest.op, oldest.seq), []).append(now_s - oldest.entered_s)
    words = []
    for (op, seq), waits in sorted(groups.items(), key=lambda item: item[0][1]):
        noun = "1 peer has" if len(waits) == 1 else f"{len(waits)} peers have"
        words.append(f"{noun} been waiting {max(waits):.1f} s in {op} #{seq}")
    return " and ".join(words)
