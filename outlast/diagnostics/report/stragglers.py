"""Which ranks are late, without comparing clocks: in a collective, the rank that arrives last waits least."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from outlast.diagnostics.config import DiagnosticsConfig
from outlast.diagnostics.report.load import Floats, Steps
from outlast.diagnostics.report.peers import Peers, Rivals
from outlast.diagnostics.report.rank_causes import RankCauses
from outlast.diagnostics.syndromes.others import median_beside
from outlast.diagnostics.syndromes.places import whole_nodes

Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
Subjects = dict[tuple[int, str], Indices]
"""By (column, host): the steps in which a rank is judged while it was on that host."""
Hosts = Mapping[tuple[int, int, int], str]
"""By (attempt, generation, rank)."""
UNKNOWN_HOST = "unknown host"

MAD_TO_SIGMA = 1.4826
"""Standard deviation / median absolute deviation of normally distributed values."""
MEDIAN_ERROR = 1.2533
"""Standard error of a median, in standard deviations / sqrt(n)."""
CHANCE = 1e-5
"""A rank that is behind its median peer as often as it is ahead of it is late as often as observed with at most this
probability, where its noise is not considered."""


@dataclass(frozen=True, kw_only=True)
class StragglerRow:
    """How late one rank was on one host. A rank that moved to another host has a row for each."""

    rank: int
    host: str
    straggler: bool
    median_lateness_ms: float
    """Median over the judged steps of: longest time any rank spent inside collectives, minus this rank's."""
    p90_lateness_ms: float
    behind_typical_ms: float
    """Median over the judged steps of: its lateness minus that of its median peer. The verdict is based on this."""
    noise_ms: float
    """Standard deviation of it from step to step, estimated from the median absolute deviation."""
    latest_share: float
    """Share of the judged steps in which it was the latest, or within its noise of the latest, not counting stragglers
    that are later."""
    slowdown_share: float
    """How much longer steps took because of this rank alone: 0.25 is 25 % longer. 0 unless it is a straggler."""
    cost_s: float = 0.0
    """Seconds that all judged steps took longer because of this rank alone. 0 unless it is a straggler."""
    steps: int
    """Judged steps: those that it and all its peers took while it was on this host, without warm-up."""
    longer: tuple[tuple[str, float], ...]
    """The parts of the step that took it longer than its median peer, in ms of the median step, largest first."""
    evidence: str
    cause: str = ""
    """Why, in a few words, where the rank itself has seen it; else empty. The evidence has the values."""


def lateness_s(collective_s: Floats) -> Floats:
    """[steps, ranks], seconds: the longest time any rank spent in collectives minus this rank's; NaN for one rank."""
    late = np.full_like(collective_s, np.nan)
    several = np.sum(np.isfinite(collective_s), axis=1) > 1
    if several.any():
        some = collective_s[several]
        late[several] = np.nanmax(some, axis=1, keepdims=True) - some
    return late


def subjects_of(steps: Steps, late: Floats, hosts: Hosts, config: DiagnosticsConfig) -> Subjects:
    """Each rank on each host it had, and the steps in which it is judged there."""
    judged = steps_after_warmup(steps, config.straggler_warmup_steps)
    subjects: Subjects = {}
    for column, rank in enumerate(steps.ranks):
        groups: dict[str, list[int]] = {}
        for row in np.flatnonzero(judged & np.isfinite(late[:, column])):
            where = (steps.attempt[row], steps.generation[row], rank)
            groups.setdefault(hosts.get(where, UNKNOWN_HOST), []).append(int(row))
        subjects |= {(column, host): np.asarray(group) for host, group in groups.items()}
    return subjects


def rank_stragglers(
    steps: Steps, hosts: Hosts, config: DiagnosticsConfig, own: RankCauses | None = None
) -> tuple[StragglerRow, ...]:
    """Every rank on every host it had, the latest first.

    Args:
        steps: the last execution of every step.
        hosts: by (attempt, generation, rank).
        config: when a rank counts as a straggler.
        own: what ranks told of themselves.
    """
    if not steps.steps:
        return ()
    late = lateness_s(steps.values["collective_s"])
    subjects = subjects_of(steps, late, hosts, config)
    # A straggler hides ranks that are less late. Name the latest, judge the others without it, and repeat.
    blamed = np.zeros_like(late, dtype=np.bool_)
    done: dict[tuple[int, str], StragglerRow] = {}
    tables = _Tables(steps, late)
    while True:
        rivals = Rivals(late, blamed)
        rows = {
            subject: _judge(steps, late, rivals, tables, at, *subject, config)
            for subject, at in subjects.items()
            if subject not in done
        }
        found = {subject: row for subject, row in rows.items() if row.straggler}
        for column, host in found:
            blamed[subjects[column, host], column] = True
        done |= found
        if not found:
            break
    done |= rows
    ordered = sorted(
        done, key=lambda subject: (not done[subject].straggler, -done[subject].median_lateness_ms, subject)
    )
    return tuple(
        _with_cost(
            _with_cause(done[subject], late, subjects[subject], subject[0], own),
            steps,
            late,
            blamed,
            subjects[subject],
            subject[0],
        )
        if done[subject].straggler
        else done[subject]
        for subject in ordered
    )


def slow_node(rows: Sequence[StragglerRow]) -> str:
    """The host of all stragglers, if nearly all of its ranks are and there are other hosts; else empty."""
    late = [row for row in rows if row.straggler]
    slow = whole_nodes([row.rank for row in late], {row.rank: row.host for row in rows})
    return next(iter(slow)) if len(slow) == 1 and {row.host for row in late} == set(slow) else ""


def steps_after_warmup(steps: Steps, warmup_steps: int) -> Bools:
    """Which steps count for the verdict: all but the first ones of each start."""
    judged = np.ones(len(steps.steps), dtype=np.bool_)
    seen = 0
    start: tuple[int, int] | None = None
    for index, this in enumerate(zip(steps.attempt, steps.generation, strict=True)):
        seen = seen + 1 if this == start else 1
        start = this
        judged[index] = seen > warmup_steps
    return judged


class _Tables:
    """What all ranks are judged by."""

    def __init__(self, steps: Steps, late: Floats) -> None:
        self.late = Peers(late)
        self.parts = {name: Peers(part) for name, part in _parts(steps).items()}
        self.step_s = median_steps_s(steps)


def _judge(
    steps: Steps,
    late: Floats,
    rivals: Rivals,
    tables: _Tables,
    at: Indices,
    column: int,
    host: str,
    config: DiagnosticsConfig,
) -> StragglerRow:
    own = late[at, column]
    others = rivals.most(at, column)
    behind = tables.late.more(at, column)
    median_behind = float(np.median(behind))
    noise = MAD_TO_SIGMA * float(np.median(np.abs(behind - median_behind)))
    median_late = float(np.median(own))
    # the noise of a rank that is late every other step is as large as its lateness, but it is not always the latest
    latest_share = float(np.mean(others - own <= min(noise, median_late / 4)))
    error = MEDIAN_ERROR * noise / len(at) ** 0.5
    step_s = float(np.median(tables.step_s[at]))
    straggler = (
        len(at) >= config.straggler_min_steps
        and median_behind >= max(config.straggler_min_s, config.straggler_share * step_s)
        and latest_share >= config.straggler_latest_share
        and (
            (median_behind >= config.straggler_noise * noise and median_behind >= config.straggler_sigmas * error)
            # a rank that is slow in some phases only has a large spread, but nearly every step waits for it
            or (float(np.mean(others <= own)) >= config.straggler_always_share and _chance(behind) <= CHANCE)
        )
    )
    longer = _longest({name: part.more(at, column) for name, part in tables.parts.items()})
    behind_ms = round(median_behind * 1e3, 1) + 0.0  # no "-0.0"
    evidence = (
        f"{median_late * 1e3:.1f} ms late in the median of {len(at)} steps, {behind_ms:.1f} ms behind its "
        f"median peer (noise {noise * 1e3:.1f} ms), the latest in {latest_share:.0%} of the steps"
    )
    if straggler and longer:
        evidence += f"; its own time per step is longer in {', '.join(f'{part} (+{ms:.1f} ms)' for part, ms in longer)}"
    return StragglerRow(
        rank=steps.ranks[column],
        host=host,
        straggler=straggler,
        median_lateness_ms=median_late * 1e3,
        p90_lateness_ms=float(np.percentile(own, 90)) * 1e3,
        behind_typical_ms=median_behind * 1e3,
        noise_ms=noise * 1e3,
        latest_share=latest_share,
        slowdown_share=0.0,
        steps=len(at),
        longer=longer,
        evidence=evidence,
    )


def behind_peers_s(late: Floats, at: Indices, column: int) -> Floats:
    """[steps at]: the lateness of a rank minus that of its median peer."""
    behind: Floats = late[at, column] - median_beside(late[at], column)
    return behind


def share_latest(late: Floats, blamed: Bools, at: Indices, column: int, *, tolerance_s: float) -> float:
    """The share of steps in which no other rank was later by more than the tolerance, not counting blamed ones."""
    rivals = _rivals(late, blamed, at, column)
    return float(np.mean(rivals.max(axis=1) - late[at, column] <= tolerance_s))


def _rivals(late: Floats, blamed: Bools, at: Indices, column: int) -> Floats:
    """[steps at, other ranks]: lateness; 0 where a rank is blamed for it already, or did not take the step."""
    peers = np.delete(late[at], column, axis=1)
    rivals: Floats = np.where(np.delete(blamed[at], column, axis=1) | np.isnan(peers), 0.0, peers)
    return rivals


def _chance(behind: Floats) -> float:
    """The probability that a fair coin shows heads as often as the rank was behind its median peer: a sign test."""
    count, heads = len(behind), int(np.sum(behind > 0))
    halves = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(heads, count + 1)
    ]
    return math.fsum(map(math.exp, halves))


def median_steps_s(steps: Steps) -> Floats:
    """[steps]: the median over ranks of each step's duration."""
    median: Floats = np.nanmedian(steps.values["step_s"], axis=1)
    return median


def _parts(steps: Steps) -> dict[str, Floats]:
    """[steps, ranks] each: the parts of the step without communication, in seconds."""
    values = steps.values
    return {
        "compute": values["step_s"] - values["data_s"] - values["comm_s"] - values["checkpoint_s"],
        "data": values["data_s"],
        "checkpoint": values["checkpoint_s"],
    }


def parts_longer(steps: Steps, at: Indices, column: int) -> tuple[tuple[str, float], ...]:
    """Parts of the step, without communication, that took this rank at least 1 ms longer than its median peer."""
    return _longest({name: part[at, column] - median_beside(part[at], column) for name, part in _parts(steps).items()})


def _longest(more_s: Mapping[str, Floats]) -> tuple[tuple[str, float], ...]:
    found = [(name, float(np.nanmedian(one)) * 1e3) for name, one in more_s.items()]
    return tuple(sorted(((name, ms) for name, ms in found if ms >= 1.0), key=lambda item: -item[1]))


def lost_s(late: Floats, blamed: Bools, at: Indices, column: int) -> Floats:
    """[steps at]: the seconds that a rank adds beyond the latest other rank that is not blamed."""
    added: Floats = np.maximum(late[at, column] - _rivals(late, blamed, at, column).max(axis=1), 0.0)
    return added


def stand_for(steps: Steps, at: Indices, column: int) -> Floats:
    """[steps at]: how many steps each stands for: itself, and those after it in which nobody looked at collectives."""
    values = steps.values
    took, known = np.isfinite(values["step_s"][:, column]), np.isfinite(values["collective_s"][:, column])
    looked, unknown = np.flatnonzero(took & known), np.flatnonzero(took & ~known)
    after = np.searchsorted(looked, unknown[unknown > at[0]]) - 1
    count: Floats = np.bincount(after, minlength=len(looked)).astype(np.float64) + 1.0
    return count[np.searchsorted(looked, at)]


def _with_cause(row: StragglerRow, late: Floats, at: Indices, column: int, own: RankCauses | None) -> StragglerRow:
    """The row of a straggler with the cause that the rank itself has seen."""
    cause = own.of(column, at, behind_peers_s(late, at, column)) if own is not None else None
    if cause is None:
        return row
    return replace(row, cause=cause.name, evidence=f"{row.evidence}; {cause.words}")


def _with_cost(row: StragglerRow, steps: Steps, late: Floats, blamed: Bools, at: Indices, column: int) -> StragglerRow:
    """The row of a straggler with what it cost: seconds, and the share of a step without it."""
    added = lost_s(late, blamed, at, column)
    median = float(np.median(added))
    without = float(np.median(np.nanmax(steps.values["step_s"][at], axis=1))) - median
    return replace(
        row, slowdown_share=median / without if without > 0 else 0.0, cost_s=float(added @ stand_for(steps, at, column))
    )
