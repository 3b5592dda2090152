"""What ended the ranks of a start, what it cost, and whether training went on: one story of all that a failure left."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from outlast.diagnostics import formatting as fmt
from outlast.diagnostics.report.incidents import Incident, at_time, is_effect, names_of, restarts_of
from outlast.diagnostics.report.load import Loaded
from outlast.diagnostics.syndromes.blame import BlameKey, blame_key

_TELLING = {"hang_found": 0, "workers_failed": 0, "rank_died": 1, "run_ended": 2}
"""Kinds of incidents that end a start, the most telling first; victims end before the culprit is judged."""

Where = tuple[int, int]
"""Attempt and generation."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """One start of the ranks, as far as failures need it."""

    where: Where
    launched_s: float
    """Since the first event of the run."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failure of the run: of one rank or of several, with what followed from it."""

    at_s: float
    """When it was noticed, seconds since the first event of the run."""
    cause: str
    """What failed, with whom and when, as the beginning of a sentence."""
    lost_s: float | None
    """From the last sign of progress, or from the failure, until the next step was done; without the pause before a
    start by hand. None if no step has been done since."""
    steps_lost: int
    """Steps that had been done and were done again."""
    resumed_step: int | None
    """The first step that was done afterwards."""
    resumed_at_s: float | None
    by_hand: bool
    """Whether what came next was a new launch."""
    outcome: str
    """``recovered``, ``resumed by hand``, ``not restarted``, ``restarting``, or ``restarted, but no step was done
    since``."""

    @property
    def told(self) -> str:
        """All of it in one line."""
        lost = ""
        if self.lost_s is not None:
            steps = f" and {self.steps_lost} step{'s' if self.steps_lost != 1 else ''}" if self.steps_lost else ""
            lost = f"{fmt.duration(self.lost_s)}{steps} lost; "
        return f"{self.cause}; {lost}{self.outcome}"


def find_failures(
    loaded: Loaded, incidents: Sequence[Incident], beginnings: Sequence[Beginning], begin_t: float
) -> tuple[Failure, ...]:
    """All failures, oldest first; incidents between the same two starts belong to one.

    Args:
        loaded: the events of the run.
        incidents: those that :func:`find_incidents` and :func:`find_deaths` found.
        beginnings: the starts whose ranks wrote events, oldest first.
        begin_t: first event of the run, seconds since the epoch.
    """
    launches = {one.launched_s: one.where[1] == 0 for one in beginnings}
    # ranks that failed before they wrote anything are known to the launcher alone
    launches |= {
        group[0].t - begin_t: False
        for group in restarts_of(loaded)
        if all(abs(group[0].t - begin_t - at_s) > 1e-6 for at_s in launches)
    }
    bounds = sorted(launches)
    groups: dict[int, list[Incident]] = {}
    for one in incidents:
        if one.kind in _TELLING:
            groups.setdefault(bisect.bisect_right(bounds, one.at_s), []).append(one)
    found = []
    for after, group in sorted(groups.items()):
        first = min(group, key=_suspicion)
        next_s = bounds[after] if after < len(bounds) else None
        found.append(_failure(first, group, next_s, next_s is not None and launches[next_s], loaded, begin_t))
    return tuple(found)


def _suspicion(one: Incident) -> tuple[BlameKey, int, float]:
    """The first cause has the least: as launchers judge the ranks of one node, over those of all."""
    unknown = blame_key(left=False, hung=False, lost_peer=is_effect(one.cause), status=-1, has_message=False)
    return one.blame or unknown, _TELLING[one.kind], one.at_s


def _failure(
    first: Incident, group: Sequence[Incident], next_s: float | None, by_hand: bool, loaded: Loaded, begin_t: float
) -> Failure:
    rows = loaded.rows
    later = rows[rows[:, 4] > begin_t + next_s] if next_s is not None else rows[:0]
    began_s = min(one.at_s - one.cost_s for one in group)
    restarting = any(one.restarting for one in group)
    if len(later) == 0 or next_s is None:
        ended = "restarting" if restarting else "not restarted"
        outcome = "restarted, but no step was done since" if next_s is not None else ended
        return Failure(
            at_s=first.at_s,
            cause=first.cause,
            lost_s=None,
            steps_lost=0,
            resumed_step=None,
            resumed_at_s=None,
            by_hand=by_hand,
            outcome=outcome,
        )
    next_row = later[later[:, 4].argmin()]
    t, step = float(next_row[4]), int(next_row[3])
    lost = rows[(rows[:, 4] < t) & (rows[:, 3] >= step)]
    return Failure(
        at_s=first.at_s,
        cause=first.cause,
        lost_s=t - begin_t - (next_s if by_hand else began_s),
        steps_lost=len(set(lost[:, 3])),
        resumed_step=step,
        resumed_at_s=t - begin_t,
        by_hand=by_hand,
        outcome="resumed by hand" if by_hand else "recovered",
    )


def worst_of(failures: Sequence[Failure], median_step_s: float) -> Failure | None:
    """The first failure that the run did not recover from, or else the one that cost most; None without failures."""
    for one in failures:
        if one.lost_s is None:
            return one
    return max(failures, key=lambda one: (one.lost_s or 0.0) + one.steps_lost * median_step_s, default=None)


def recoveries(failures: Sequence[Failure]) -> tuple[Incident, ...]:
    """When the first step after each failure was done."""
    found: dict[float, Incident] = {}
    for one in failures:
        if one.resumed_at_s is None or one.lost_s is None:
            continue
        since = "it was started again by hand" if one.by_hand else "the failure"
        again = f"; {one.steps_lost} step{'s' if one.steps_lost != 1 else ''} redone" if one.steps_lost else ""
        found.setdefault(
            one.resumed_at_s,
            Incident(
                at_s=one.resumed_at_s,
                kind="recovered",
                severity="good",
                title=f"training resumed with step {one.resumed_step}",
                detail=f"{one.lost_s:.1f} s after {since}{again}",
                step=one.resumed_step,
            ),
        )
    return tuple(found.values())


def find_deaths(
    loaded: Loaded,
    incidents: Sequence[Incident],
    beginnings: Sequence[Beginning],
    hosts: Mapping[tuple[int, int, int], str],
    begin_t: float,
) -> tuple[Incident, ...]:
    """Ranks that ended without a last event, where no launcher said so: killed together with it, or without one.

    Of the newest start only if other ranks lost their connection to them; else they may still run.
    """
    found = []
    for number, one in enumerate(beginnings):
        until_s = beginnings[number + 1].launched_s if number + 1 < len(beginnings) else math.inf
        here = [other for other in incidents if one.launched_s <= other.at_s < until_s]
        told = [other for other in here if other.kind in ("hang_found", "workers_failed")]
        ends = {
            record.rank: record
            for attempt, record in loaded.others
            if record.kind == "run_ended" and (attempt, record.generation) == one.where
        }
        by_themselves = [
            end for end in ends.values() if end.fields.get("ok") or not is_effect(str(end.fields.get("reason")))
        ]
        silent = sorted({rank for *where, rank in hosts if tuple(where) == one.where} - ends.keys())
        if told or by_themselves or not silent or (until_s == math.inf and not ends):
            continue
        found.append(_death(loaded, one.where, silent, len(ends), hosts, begin_t))
    return tuple(found)


def _death(
    loaded: Loaded,
    where: Where,
    silent: Sequence[int],
    others: int,
    hosts: Mapping[tuple[int, int, int], str],
    begin_t: float,
) -> Incident:
    rows = loaded.rows
    mine = rows[(rows[:, 0] == where[0]) & (rows[:, 1] == where[1]) & np.isin(rows[:, 2], silent)]
    times = [
        record.t
        for attempt, record in loaded.others
        if (attempt, record.generation) == where and record.rank in silent and record.kind != "checkpoint_saved"
    ]
    at_s = max([*times, float(mine[:, 4].max(initial=-math.inf))]) - begin_t
    step = int(mine[:, 3].max()) if len(mine) else None
    places = sorted({hosts[(*where, rank)] for rank in silent})
    on = places[0] if len(places) == 1 else f"{len(places)} hosts"
    every = "both ranks" if len(silent) == 2 else f"all {len(silent)} ranks"
    who = f"{names_of(silent) if others or len(silent) == 1 else every} on {on}"
    when = f"after step {step}" if step is not None else "before a step was done"
    lost = f"; {others} other{'s' if others != 1 else ''} lost the connection" if others else ""
    return Incident(
        at_s=at_s,
        kind="rank_died",
        severity="bad",
        title=f"{who} died",
        detail=f"no word {when}: killed (SIGKILL, out of memory), or the machine failed{lost}",
        step=step,
        rank=silent[0] if len(silent) == 1 else None,
        cause=f"{who} died without a word at {at_time(at_s)}, {when}",
    )


def with_failures(
    loaded: Loaded,
    incidents: Sequence[Incident],
    beginnings: Sequence[Beginning],
    hosts: Mapping[tuple[int, int, int], str],
    begin_t: float,
) -> tuple[tuple[Incident, ...], tuple[Failure, ...]]:
    """All incidents, with deaths that nobody told of and recoveries added, and the failures they make up."""
    every = (*incidents, *find_deaths(loaded, incidents, beginnings, hosts, begin_t))
    failures = find_failures(loaded, every, beginnings, begin_t)
    return (*every, *recoveries(failures)), failures
