"""Which of this node's ranks make no progress, and which of them blocks the others.

Everything here but :func:`observe` is a pure function of observations. A collective waits for its last rank, so one
hung rank silences all of them. Two things distinguish the culprit from its victims: its process state, and its
collectives, since it never entered the one in which its peers wait. What all ranks do at once is no hang but a phase:
they evaluate, wait for the same storage, or were suspended with their machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from outlast.diagnostics.live.desync import find_desync
from outlast.diagnostics.live.heartbeat import Beat, read_heartbeat
from outlast.diagnostics.live.recorder import Collective, Ring, read_ring
from outlast.diagnostics.live.shm import heartbeat_path, ring_path

ProcessState = Literal["running", "stopped", "dead"]

SLOW_PHASES = ("setup", "eval", "data", "checkpoint", "finish")
"""Phases whose duration is unrelated to that of a step."""
SHARED_PHASES = ("eval", "data")
"""Phases that all ranks enter together and leave at about the same time: a rank that its peers wait for is late."""
AWAITED_SHARE = 0.5
"""A rank is blamed for what its peers wait in only once they have waited for this share of its limit."""
LONGEST_AWAITED_S = 60.0
"""A limit beyond this counts as this there: peers inside a collective do not wait half of a phase's long limit."""


@dataclass(frozen=True, kw_only=True)
class StallRules:
    """How long a rank may be silent. The launcher fills it from its own settings."""

    floor_s: float
    """The limit is never lower than this."""
    factor: float
    """The limit of a step, in median step durations."""
    startup_limit_s: float
    """The limit in set-up, evaluation, data wait, checkpoint and finish, and until a median is known."""
    alone_limit_s: float = 60.0
    """How long its peers wait for a rank that evaluates or waits for data."""
    together_limit_s: float = 90.0
    """The limit of a step while all ranks are outside collectives: they do the same, which takes this long today."""
    patience: float = 3.0
    """If the evidence does not distinguish the culprit from its victims, wait this many limits before naming anyone."""

    one_node: bool = False
    """Whether all ranks of the job are on this node, so that no other one can be at fault."""

    @property
    def idle_limit_s(self) -> float:
        """How long its peers wait for a rank of a program that tells no phases and does nothing."""
        return self.patience * self.alone_limit_s


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
    excused_s: float = 0.0
    """Seconds since its last beat that do not count: the watcher did not run, or saw the process stopped until then."""
    idle_s: float = 0.0
    """Seconds for which its process and those it started have computed, read and written next to nothing."""

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
        """Seconds since its last beat that count."""
        return now_s - (self.beat.t_s if self.beat is not None else self.started_s) - self.excused_s

    def waited_s(self, now_s: float) -> float:
        """Seconds for which it has been inside its oldest pending collective; 0 if it is in none."""
        return min(now_s - self.pending[0].entered_s, self.silent_s(now_s)) if self.pending else 0.0

    def limit_s(self, rules: StallRules) -> float:
        """How long it may be silent: ``max(floor, factor x median step)``, or the start-up limit.

        A program that tells no phases may be doing anything; but inside a collective it waits for others.
        """
        if self.is_program and self.pending:
            return max(self.step_limit_s(rules), rules.alone_limit_s)
        if self.beat is None or self.is_program or self.beat.phase in SLOW_PHASES or self.beat.median_step_s <= 0.0:
            return rules.startup_limit_s
        return self.step_limit_s(rules)

    def step_limit_s(self, rules: StallRules) -> float:
        """The limit of a step, which also holds for a stopped process in any phase."""
        return max(rules.floor_s, rules.factor * (self.beat.median_step_s if self.beat is not None else 0.0))

    def has_moved_since(self, earlier: Observation) -> bool:
        """Whether it has beaten, or entered or left a collective, or been continued or ended, since it was observed."""
        return (self.pid, self.state, self.beat, self.entered, self.pending) != (
            earlier.pid,
            earlier.state,
            earlier.beat,
            earlier.entered,
            earlier.pending,
        )

    @property
    def is_program(self) -> bool:
        """Whether it runs a program that does not tell what it does."""
        return self.beat is not None and self.beat.phase == "program"

    def may_be_busy(self, rules: StallRules) -> bool:
        """Whether it may be at work that nobody waits for: a program that computes, or has never had peers."""
        return self.is_program and (self.entered == 0 or self.idle_s <= rules.startup_limit_s)

    @property
    def where(self) -> str:
        """``rank 1 in all_gather #12 of step 3``, or ``rank 1 in phase data of step 3``."""
        if self.pending:
            return f"rank {self.rank} in {self.pending[0].op} #{self.pending[0].number} of step {self.step}"
        phase = self.beat.phase if self.beat is not None else "setup"
        return f"rank {self.rank} in phase {phase} of step {self.step}"


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

    No rank is named until one is silent beyond its limit, or has been awaited for ``alone_limit_s`` while it evaluates
    or waits for data, or for ``patience x alone_limit_s`` while it does nothing, though its program tells no phases. A
    process that is dead is never named, because that is a crash. The culprits are the first of these:

    1. ranks whose process is stopped;
    2. silent ranks outside any collective, if other ranks have waited inside one for at least half the limit;
    3. the ranks that are silent and furthest behind, if none is inside a collective: after ``together_limit_s``,
       because all may wait for the same thing; of programs that tell no phases, only those that do nothing;
    4. no rank, while the silent ranks wait for a local rank that is outside any collective and within its own limit,
       for example because it writes a checkpoint;
    5. if all ranks are silent inside collectives that cannot meet, the rank that left the common order first
       (:func:`~outlast.diagnostics.live.desync.find_desync`);
    6. after ``patience`` limits, the silent ranks furthest behind by (step, collectives entered). The evidence is weak:
       all of them wait, so the network or a rank on another node may be at fault.

    Args:
        ranks: all ranks of this node.
        rules: how long a rank may be silent.
        now_s: when they were observed, CLOCK_MONOTONIC seconds.
    """
    ranks = [one for one in ranks if one.state != "dead"]
    longest_s = {one.rank: max((p.waited_s(now_s) for p in ranks if p is not one), default=0.0) for one in ranks}
    late = [one for one in ranks if _is_late_for_peers(one, longest_s[one.rank], rules)]
    silent = [one for one in ranks if one in late or one.silent_s(now_s) > one.limit_s(rules)]
    if not silent:
        return StallVerdict()

    def verdict(culprits: Sequence[Observation], *, weak: bool, why: str = "") -> StallVerdict:
        return StallVerdict(
            silent=tuple(one.rank for one in silent),
            culprits=tuple(
                Culprit(
                    rank=one.rank,
                    pid=one.pid,
                    step=one.step,
                    silent_s=one.silent_s(now_s),
                    limit_s=_late_limit_s(one, rules) if one in late else one.limit_s(rules),
                    evidence=why or _evidence(one, ranks, now_s, weak=weak, one_node=rules.one_node),
                    weak=weak,
                )
                for one in culprits
            ),
        )

    halted = [one for one in ranks if one.state == "stopped" and one.silent_s(now_s) > one.step_limit_s(rules)]
    if halted:
        return verdict(halted, weak=False)
    outside = [one for one in silent if not one.pending]
    awaited = [
        one
        for one in outside
        if one in late or longest_s[one.rank] >= AWAITED_SHARE * min(one.limit_s(rules), LONGEST_AWAITED_S)
    ]
    if awaited:
        return verdict(awaited, weak=False)
    if outside and not any(one.pending for one in ranks):
        patient = [
            one
            for one in outside
            if one.silent_s(now_s) > max(rules.together_limit_s, one.limit_s(rules)) and not one.may_be_busy(rules)
        ]
        return verdict(_furthest_behind(patient), weak=False)
    if any(not one.pending for one in ranks):
        return verdict([], weak=True)
    if len(silent) == len(ranks) and (found := find_desync([one.ring for one in ranks if one.ring is not None])):
        return verdict([one for one in ranks if one.rank == found.first], weak=False, why=found.evidence)
    patient = [one for one in silent if one.silent_s(now_s) > rules.patience * one.limit_s(rules)]
    return verdict(_furthest_behind(patient), weak=True)


def _is_late_for_peers(one: Observation, waited_s: float, rules: StallRules) -> bool:
    """Whether it evaluates or waits for data, and its peers have long finished doing so; or does nothing at all."""
    if one.is_program:
        return not one.pending and min(waited_s, one.idle_s) > rules.idle_limit_s
    return (
        one.beat is not None and one.beat.phase in SHARED_PHASES and not one.pending and waited_s > rules.alone_limit_s
    )


def _late_limit_s(one: Observation, rules: StallRules) -> float:
    return rules.idle_limit_s if one.is_program else rules.alone_limit_s


def _furthest_behind(ranks: Sequence[Observation]) -> list[Observation]:
    if not ranks:
        return []
    least = min((one.step, one.entered) for one in ranks)
    return [one for one in ranks if (one.step, one.entered) == least]


def _evidence(culprit: Observation, ranks: Sequence[Observation], now_s: float, *, weak: bool, one_node: bool) -> str:
    parts = [_describe_state(culprit, now_s), _describe_collective(culprit, now_s)]
    peers = _describe_waiting_peers([one for one in ranks if one.rank != culprit.rank], now_s)
    text = ", ".join(part for part in parts if part)
    if peers:
        text += f"; {peers}"
    if weak:
        who = "the connections between the ranks" if one_node else "the network or a rank on another node"
        text += f"; weak evidence: {who} may be at fault"
    return text


def _describe_state(one: Observation, now_s: float) -> str:
    if one.state == "stopped":
        return "stopped (state T)"
    if one.beat is None:
        return f"no heartbeat {one.silent_s(now_s):.1f} s after its start"
    return f"running, silent for {one.silent_s(now_s):.1f} s in phase {one.beat.phase} of step {one.step}"


def _describe_collective(one: Observation, now_s: float) -> str:
    if one.ring is None:
        return "no recorder"
    if one.pending:
        oldest = one.pending[0]
        return f"inside {oldest.op} #{oldest.number} of step {oldest.step} for {now_s - oldest.entered_s:.1f} s"
    if not one.ring.records:
        if one.ring.torn:
            return f"its collective #{one.ring.torn[-1]} is torn"
        return f"has entered {one.entered} collectives" if one.entered else "has not entered a collective"
    last = one.ring.records[-1]
    return f"last entered {last.op} #{last.number} in step {last.step}, completed"


def _describe_waiting_peers(peers: Sequence[Observation], now_s: float) -> str:
    """``3 peers have been waiting 9.1 s in all_gather #1235``, grouped by where they wait."""
    groups: dict[tuple[str, int], list[float]] = {}
    for one in peers:
        if one.pending:
            oldest = one.pending[0]
            groups.setdefault((oldest.op, oldest.number), []).append(now_s - oldest.entered_s)
    parts = []
    for (op, seq), waits in sorted(groups.items(), key=lambda item: item[0][1]):
        noun = "1 peer has" if len(waits) == 1 else f"{len(waits)} peers have"
        parts.append(f"{noun} been waiting {max(waits):.1f} s in {op} #{seq}")
    return " and ".join(parts)
