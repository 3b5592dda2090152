"""Slow phases: stretches of steps in which one rank kept the others waiting, and did not in the rest of the run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from outlast.diagnostics import formatting as fmt
from outlast.diagnostics.config import DiagnosticsConfig
from outlast.diagnostics.report.incidents import Incident
from outlast.diagnostics.report.load import Floats, Steps
from outlast.diagnostics.report.node_causes import NodeCauses
from outlast.diagnostics.report.rank_causes import RankCauses
from outlast.diagnostics.report.stragglers import (
    MAD_TO_SIGMA,
    Bools,
    Hosts,
    Indices,
    StragglerRow,
    behind_peers_s,
    lateness_s,
    lost_s,
    median_steps_s,
    parts_longer,
    share_latest,
    stand_for,
    subjects_of,
)

WINDOW_STEPS = 5
"""Steps of which most are slow belong to a phase, so that one step in between that is not slow does not split it."""
RANK_SIGMAS = 4.0
"""How far the steps of a phase rank above the rest of the run, in standard errors of the Mann-Whitney statistic: that
high because the phase was picked out of all stretches of the run."""
APART_SIGMAS = 2.0
"""How far the median of a phase is above that of the rest, in standard deviations of the rest."""


@dataclass(frozen=True, kw_only=True)
class SlowPhase:
    """A stretch of steps in which one rank was slow, and was not before or after it."""

    rank: int
    host: str
    first_step: int
    last_step: int
    steps: int
    """Judged steps of it: those that the rank and all its peers took on this host, without warm-up."""
    median_lateness_ms: float
    """Median over these steps of: longest time any rank spent inside collectives, minus this rank's."""
    otherwise_ms: float
    """The same over its other steps."""
    latest_share: float
    """Share of these steps in which it was the latest rank, or nearly."""
    cost_s: float
    """Seconds that these steps took longer because of this rank alone."""
    longer: tuple[tuple[str, float], ...]
    """The parts of the step that took it longer than its median peer, in ms of the median step, largest first."""
    cause: str = ""
    """What the rank itself has seen that explains it, with its values; empty if that is not known."""
    node: str = ""
    """What its node's monitor saw at the time that explains it; empty if nothing."""

    @property
    def which(self) -> str:
        """``steps 12 to 44``."""
        return f"steps {self.first_step} to {self.last_step}"


def find_phases(
    steps: Steps,
    hosts: Hosts,
    rows: tuple[StragglerRow, ...],
    config: DiagnosticsConfig,
    causes: NodeCauses | None = None,
    own: RankCauses | None = None,
) -> tuple[SlowPhase, ...]:
    """The slow phases of all ranks, in the order of the steps.

    A phase has as many steps as a verdict needs. In it the rank is behind its median peer by what makes a straggler, is
    the latest as often as one, and its steps stand out from the rest of its own: by rank and by amount, so that noise
    of whatever shape makes none.

    Args:
        steps: the last execution of every step.
        hosts: by (attempt, generation, rank).
        rows: the verdicts over the whole run; a rank does not have to be later than stragglers.
        config: when a rank counts as a straggler.
        causes: what the nodes' monitors saw.
        own: what ranks told of themselves.
    """
    if not steps.steps or len(steps.ranks) < 2:
        return ()
    late = lateness_s(steps.values["collective_s"])
    subjects = subjects_of(steps, late, hosts, config)
    typical_s = median_steps_s(steps)
    blamed = np.zeros_like(late, dtype=np.bool_)
    stragglers = {(steps.ranks.index(row.rank), row.host) for row in rows if row.straggler}
    for subject in stragglers & subjects.keys():
        blamed[subjects[subject], subject[0]] = True
    found: dict[tuple[int, str, int], SlowPhase] = {}
    while True:  # a rank that was slow hides one that was less slow at the same time
        more = {
            (*subject, phase.first_step): (here, phase)
            for subject, at in subjects.items()
            for here, phase in _phases(steps, late, blamed, typical_s, at, *subject, config, own)
            if (*subject, phase.first_step) not in found
        }
        for (column, _, _), (here, phase) in more.items():
            blamed[here, column] = True
            found[column, phase.host, phase.first_step] = phase
        if not more:
            break
    ordered = sorted(found.values(), key=lambda phase: (phase.first_step, phase.rank))
    if causes is None:
        return tuple(ordered)
    return tuple(replace(one, node=causes.during(*_times(one, steps), one.rank, one.host)) for one in ordered)


def _times(phase: SlowPhase, steps: Steps) -> tuple[float, float]:
    """When its first step began and its last one ended, seconds since the epoch."""
    first, last = steps.steps.index(phase.first_step), steps.steps.index(phase.last_step)
    t, step_s = steps.values["t"], steps.values["step_s"]
    return float(np.nanmin(t[first])) - float(np.nanmax(step_s[first])), float(np.nanmax(t[last]))


def _phases(
    steps: Steps,
    late: Floats,
    blamed: Bools,
    typical_s: Floats,
    at: Indices,
    column: int,
    host: str,
    config: DiagnosticsConfig,
    own: RankCauses | None,
) -> list[tuple[Indices, SlowPhase]]:
    """Of one rank on one host, each with the rows of its steps."""
    least = config.straggler_min_steps
    if len(at) < 2 * least:
        return []
    step_s = float(np.median(typical_s[at]))
    threshold_s = max(config.straggler_min_s, config.straggler_share * step_s)
    # lateness is at least what a rank is behind its peers, and cheaper
    if max(map(len, _stretches(late[at, column] >= threshold_s)), default=0) < least:
        return []
    behind = behind_peers_s(late, at, column)
    stretches = [inner for one in _stretches(behind >= threshold_s) for inner in _sharpened(behind, one, least)]
    rest = np.ones(len(at), dtype=np.bool_)
    for one in stretches:
        rest[one] = False
    if int(rest.sum()) < least:
        return []  # it was slow all the time
    found = []
    for one in stretches:
        here = at[one]
        median_s = float(np.median(behind[one]))
        latest = share_latest(late, blamed, here, column, tolerance_s=median_s / 4)
        if latest < config.straggler_latest_share or not _stands_out(behind[one], behind[rest], threshold_s):
            continue
        cause = own.of(column, here, behind[one]) if own is not None else None
        phase = SlowPhase(
            rank=steps.ranks[column],
            host=host,
            first_step=steps.steps[int(here[0])],
            last_step=steps.steps[int(here[-1])],
            steps=len(here),
            median_lateness_ms=float(np.median(late[here, column])) * 1e3,
            otherwise_ms=float(np.median(late[at[rest], column])) * 1e3,
            latest_share=latest,
            cost_s=float(lost_s(late, blamed, here, column) @ stand_for(steps, here, column)),
            longer=parts_longer(steps, here, column),
            cause=cause.words if cause is not None else "",
        )
        found.append((here, phase))
    return found


def _stretches(slow: Bools) -> list[Indices]:
    """Unbroken stretches in which most steps of every window are slow, from a slow step to a slow step."""
    near = np.convolve(slow, np.ones(WINDOW_STEPS), mode="same") > WINDOW_STEPS / 2
    found = []
    for is_slow, group in itertools.groupby(range(len(slow)), key=lambda index: bool(near[index])):
        if is_slow:
            inside = np.fromiter(group, dtype=np.int64)
            late = np.flatnonzero(slow[inside])
            if len(late):
                found.append(inside[late[0] : late[-1] + 1])
    return found


def _sharpened(behind: Floats, stretch: Indices, least: int) -> list[Indices]:
    """What is left of a stretch, or of its parts, without steps that are less than half as late as its median step.

    On a busy machine many a step is a little late, and would make a phase begin too early and end too late.
    """
    if len(stretch) < least:
        return []
    parts = [stretch[0] + one for one in _stretches(behind[stretch] >= float(np.median(behind[stretch])) / 2)]
    if len(parts) == 1 and len(parts[0]) == len(stretch):
        return [stretch]
    return [inner for one in parts for inner in _sharpened(behind, one, least)]


def _stands_out(phase: Floats, rest: Floats, threshold_s: float) -> bool:
    """Whether the steps of a phase are unlike the rest: later by the threshold, by noise, and step by step."""
    usual = float(np.median(rest))
    noise = MAD_TO_SIGMA * float(np.median(np.abs(rest - usual)))
    if float(np.median(phase)) - usual < max(threshold_s, APART_SIGMAS * noise):
        return False
    m, n = len(phase), len(rest)
    ordered = np.sort(rest)
    below = np.searchsorted(ordered, phase, side="left") + np.searchsorted(ordered, phase, side="right")
    statistic = float(below.sum()) / 2  # pairs in which the phase's step is the later one; ties count half
    error = (m * n * (m + n + 1) / 12) ** 0.5
    return bool(statistic - m * n / 2 >= RANK_SIGMAS * error)


def phase_incidents(phases: tuple[SlowPhase, ...], steps: Steps, begin_t: float) -> tuple[Incident, ...]:
    """One incident for each slow phase, at the time when it began."""
    found = []
    for phase in phases:
        began_t, _ = _times(phase, steps)
        detail = described(phase)
        found.append(
            Incident(
                at_s=max(0.0, began_t - begin_t),
                kind="slow_phase",
                severity="warn",
                title=f"rank {phase.rank} on {phase.host} was slow in {phase.which}",
                detail=f"{detail}; {phase.otherwise_ms:.1f} ms late in its other steps",
                step=phase.first_step,
                rank=phase.rank,
                cause=f"rank {phase.rank} on {phase.host} was slow in {phase.which}: {detail}",
                cost_s=phase.cost_s,
            )
        )
    return tuple(found)


def described(phase: SlowPhase) -> str:
    """How late the rank was, how often it was the latest, what it cost, and in which part of the step it was slow."""
    part = f", longer in {phase.longer[0][0]} (+{phase.longer[0][1]:.1f} ms)" if phase.longer else ""
    causes = "".join(f"; {one}" for one in (phase.cause, phase.node) if one)
    return (
        f"{phase.median_lateness_ms:.1f} ms late in their median, the latest in {fmt.share(phase.latest_share)} of "
        f"them{part}; {fmt.duration(phase.cost_s)} lost{causes}"
    )
