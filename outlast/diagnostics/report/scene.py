"""The worst incident on a timeline: what the culprit did, and who waited for it, each by its own measured times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from outlast.diagnostics.monitor import NodeClock
from outlast.diagnostics.report.endings import Ending, find_endings
from outlast.diagnostics.report.failures import Failure, worst_of
from outlast.diagnostics.report.load import COLUMNS, Floats, Loaded
from outlast.diagnostics.report.phases import SlowPhase
from outlast.diagnostics.report.stragglers import StragglerRow

MOST_RANKS = 16
"""Ranks in the picture, the culprit among them."""
STEPS_BEFORE = 3
"""Steps shown before the incident."""
FAR_S = 60.0
"""The words of a failure and the failure itself are no further apart."""
WAITER_SHARE = 0.5
"""A rank waited in a step if it was less than this share as late as the culprit."""

Kind = Literal["compute", "communication", "data", "checkpoint", "wait", "hung", "failed"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """What a rank did for a while."""

    kind: Kind
    begin_s: float
    """Since the first event of the run, by the clock of node 0."""
    end_s: float
    what: str


@dataclass(frozen=True, kw_only=True)
class SceneRank:
    """One rank of a scene."""

    rank: int
    host: str
    spans: tuple[Span, ...]
    waits_from_s: float | None
    """When it began to wait for the culprit; None if it did not, or nobody knows."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The time around the worst incident."""

    title: str
    culprit: int
    at_s: float
    """When the culprit held the others up: the end of its step, or when its failure was told."""
    begin_s: float
    end_s: float
    ranks: tuple[SceneRank, ...]
    """The culprit and those that waited longest for it, in the order of ranks."""
    waiting: int
    """Ranks that waited for the culprit, those that are not shown included."""


@dataclass(frozen=True)
class _Steps:
    """The steps of a run as rows of the table, with corrected times."""

    rows: Floats
    begin_t: float
    hosts: Mapping[int, str]
    ahead_s: Mapping[str, float]

    def correction_s(self, rank: int) -> float:
        return self.begin_t + self.ahead_s.get(self.hosts.get(rank, ""), 0.0)

    def before_s(self, rank: int, at_s: float, start: tuple[float, float] | None) -> float | None:
        """When the rank began the last steps that it did in a start before a time; None if it did none."""
        if start is None:
            return None
        t = self.rows[:, 4] - self.correction_s(rank)
        here = (self.rows[:, 2] == rank) & (t <= at_s) & (self.rows[:, 0] == start[0]) & (self.rows[:, 1] == start[1])
        began = np.sort(t[here] - self.rows[here, COLUMNS.index("step_s")])[-STEPS_BEFORE:]
        return float(began[0]) if len(began) else None

    def spans(self, rank: int, first_s: float, last_s: float, start: tuple[float, float] | None) -> list[Span]:
        """The parts of the rank's steps that end in a stretch of time, of one start or of any."""
        t = self.rows[:, 4] - self.correction_s(rank)
        here = (self.rows[:, 2] == rank) & (t >= first_s) & (t <= last_s)
        if start is not None:
            here &= (self.rows[:, 0] == start[0]) & (self.rows[:, 1] == start[1])
        found: list[Span] = []
        for row, end_s in zip(self.rows[here], t[here], strict=True):
            value = dict(zip(COLUMNS, map(float, row), strict=True))
            at_s = float(end_s) - value["step_s"]
            parts: list[tuple[Kind, float]] = [("data", value["data_s"]), ("compute", 0.0)]
            parts += [("communication", value["comm_s"]), ("checkpoint", value["checkpoint_s"])]
            parts[1] = ("compute", max(0.0, value["step_s"] - sum(length_s for _, length_s in parts)))
            for kind, length_s in parts:
                until_s = min(float(end_s), at_s + length_s)
                if until_s > at_s:
                    what = f"step {int(value['step'])}: {kind}"
                    found.append(Span(kind=kind, begin_s=at_s, end_s=until_s, what=what))
                    at_s = until_s
        return found


def find_scene(
    loaded: Loaded,
    failures: Sequence[Failure],
    stragglers: Sequence[StragglerRow],
    phases: Sequence[SlowPhase],
    late_ms: Mapping[int, Floats],
    steps: Sequence[int],
    begin_t: float,
    median_step_s: float,
) -> Scene | None:
    """The scene of the worst failure, or else of the slow rank that cost most; None if there is neither.

    Args:
        loaded: the run's events.
        failures: of the run.
        stragglers: the ranking of ranks.
        phases: the slow phases.
        late_ms: by rank, how late it was in each step, in ms.
        steps: the steps, in order.
        begin_t: when the run began, seconds since the epoch.
        median_step_s: of the run.
    """
    ahead_s = {
        str(one.fields.get("host")): float(one.fields.get("ahead_s") or 0.0)
        for one in loaded.nodes
        if one.kind == NodeClock.kind
    }
    hosts = {
        record.rank: str(record.fields.get("host", "unknown"))
        for _, record in loaded.others
        if record.kind == "run_started"
    }
    table = _Steps(loaded.rows, begin_t, hosts, ahead_s)
    worst = worst_of(failures, median_step_s)
    if worst is not None:
        told = [(_apart_s(one, begin_t + worst.at_s), one) for one in find_endings(loaded, ahead_s)]
        near = [one for one in told if one[0] < FAR_S and one[1].culprit is not None]
        if near:
            return _of_failure(min(near, key=lambda one: one[0])[1], table, median_step_s)
    slow = [(one.cost_s, one.rank, steps[0], steps[-1]) for one in stragglers if one.straggler and steps]
    slow += [(one.cost_s, one.rank, one.first_step, one.last_step) for one in phases]
    slow = [one for one in slow if one[1] in late_ms]
    return _of_slow_rank(*max(slow)[1:], late_ms, steps, table) if slow else None


def _apart_s(ending: Ending, t: float) -> float:
    """Failures are told by the clocks of those who wrote of them."""
    return min((abs(written_t - t) for written_t in ending.written_t), default=float("inf"))


def _of_failure(ending: Ending, table: _Steps, median_step_s: float) -> Scene:
    culprit = ending.culprit
    assert culprit is not None
    at_s = ending.t - table.begin_t
    waits = {rank: one.entered_s - table.correction_s(rank) for rank, one in ending.waiting().items()}
    began_s = min([at_s - (ending.hung_for_s or 0.0), *waits.values()])
    shown = {culprit, *sorted(waits, key=lambda rank: (waits[rank], rank))[: MOST_RANKS - 1]}
    starts = table.rows[(table.rows[:, 1] == ending.generation) & (table.rows[:, 4] <= ending.t + FAR_S)]
    start = (float(starts[:, 0].max()), float(ending.generation)) if len(starts) else None
    began_s -= STEPS_BEFORE * max(median_step_s, 1e-3)
    begin_s = min(began_s, table.before_s(culprit, at_s, start) or began_s)
    ranks = []
    for rank in sorted(shown):
        spans = table.spans(rank, begin_s, at_s, start)
        last_s = spans[-1].end_s if spans else begin_s
        if rank == culprit:
            hung_s = ending.hung_for_s
            kind: Kind = "failed" if hung_s is None else "hung"
            from_s = last_s if hung_s is None else max(last_s, at_s - hung_s)
            spans.append(Span(kind=kind, begin_s=min(from_s, at_s), end_s=at_s, what=ending.why))
        else:
            one = ending.waiting()[rank]
            from_s = min(max(last_s, waits[rank]), at_s)
            spans.append(Span(kind="wait", begin_s=from_s, end_s=at_s, what=f"waits in {one.op} #{one.number}"))
        ranks.append(
            SceneRank(
                rank=rank,
                host=table.hosts.get(rank, "unknown"),
                spans=tuple(spans),
                waits_from_s=None if rank == culprit else spans[-1].begin_s,
            )
        )
    what = "hung" if ending.hung_for_s is not None else "failed"
    return Scene(
        title=f"rank {culprit} {what}",
        culprit=culprit,
        at_s=at_s,
        begin_s=begin_s,
        end_s=at_s + 0.02 * (at_s - begin_s),
        ranks=tuple(ranks),
        waiting=len(waits),
    )


def _of_slow_rank(
    culprit: int, first: int, last: int, late_ms: Mapping[int, Floats], steps: Sequence[int], table: _Steps
) -> Scene | None:
    here = [place for place, step in enumerate(steps) if first <= step <= last]
    mine = late_ms[culprit][here]
    if not np.isfinite(mine).any():
        return None
    worst = here[int(np.nanargmax(mine))]
    step, most_ms = steps[worst], float(np.nanmax(mine))
    rows = table.rows[(table.rows[:, 3] == step) & (table.rows[:, 2] == culprit)]
    row = rows[-1]  # of the newest execution
    start, step_s = (float(row[0]), float(row[1])), float(row[COLUMNS.index("step_s")])
    step_end_s = float(row[4]) - table.correction_s(culprit)
    begin_s, end_s = step_end_s - STEPS_BEFORE * step_s, step_end_s + step_s
    late = {rank: float(values[worst]) for rank, values in late_ms.items() if np.isfinite(values[worst])}
    waiting = [rank for rank, ms in late.items() if rank != culprit and ms < WAITER_SHARE * most_ms]
    shown = sorted({culprit, *sorted(waiting, key=lambda rank: (late[rank], rank))[: MOST_RANKS - 1]})
    ranks = []
    at_s = step_end_s
    for rank in shown:
        spans = table.spans(rank, begin_s, end_s, start)
        name = f"step {step}: "
        if rank == culprit:
            at_s = max((one.end_s for one in spans if one.what == f"{name}compute"), default=step_end_s)
        waits = [one.begin_s for one in spans if one.what == f"{name}communication" and rank != culprit]
        ranks.append(
            SceneRank(
                rank=rank,
                host=table.hosts.get(rank, "unknown"),
                spans=tuple(spans),
                waits_from_s=waits[0] if waits else None,
            )
        )
    return Scene(
        title=f"rank {culprit} was {most_ms:.0f} ms late in step {step}",
        culprit=culprit,
        at_s=at_s,
        begin_s=begin_s,
        end_s=end_s,
        ranks=tuple(ranks),
        waiting=len(waiting),
    )
