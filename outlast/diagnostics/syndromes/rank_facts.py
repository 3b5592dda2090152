"""What ranks told of themselves, as the facts that explain a verdict: only what one rank had beyond its peers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from outlast.diagnostics.live.step_delays import RankDelay
from outlast.diagnostics.syndromes.facts import FACT_KINDS, Fact, FactKind
from outlast.diagnostics.syndromes.uneven import Floats, is_explained_by, longer_by_work_s
from outlast.events import ProgramStep, Record, StepDone

KINDS: dict[str, FactKind] = {name: name for name in FACT_KINDS}
LEAST_S = 0.001
"""What a rank has beyond its peers by less is no fact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTime:
    """The time of day of a node, and what its CLOCK_MONOTONIC showed then, seconds."""

    t: float
    at_s: float

    def monotonic_s(self, t: float) -> float:
        """When the node's CLOCK_MONOTONIC was at this time of day, seconds."""
        return self.at_s - (self.t - t)


def rank_facts(
    records: Iterable[Record], *, nodes: Mapping[int, str], times: Mapping[str, NodeTime]
) -> tuple[Fact, ...]:
    """The facts of a job's newest steps. What all ranks do alike, such as waiting for the same slow disk, is none.

    Args:
        records: events of all ranks in one start: ``rank_delay``, ``step``, ``program_step``; others are left out.
        nodes: where each rank of the job runs, as in a trace.
        times: of these nodes.
    """
    delays: dict[tuple[str, int], dict[int, Record]] = {}
    done: dict[tuple[int, int], Record] = {}
    for record in records:
        step = record.fields.get("step")
        if record.rank not in nodes or not isinstance(step, int):
            continue
        if record.kind == RankDelay.kind and record.fields.get("what") in KINDS:
            delays.setdefault((record["what"], step), {})[record.rank] = record
        elif record.kind in (StepDone.kind, ProgramStep.kind):
            done[step, record.rank] = record
    found = [
        fact
        for (what, _), told in delays.items()
        for rank in told
        if (fact := _delay(KINDS[what], rank, told, nodes, times)) is not None
    ]
    return (*found, *_uneven(done, delays, nodes, times))


def _delay(
    kind: FactKind, rank: int, told: Mapping[int, Record], nodes: Mapping[int, str], times: Mapping[str, NodeTime]
) -> Fact | None:
    """Of one rank in one step; None if its peers had as much."""
    record = told[rank]
    seconds = float(record["seconds"])
    others = [float(told[one]["seconds"]) if one in told else 0.0 for one in nodes if one != rank]
    lost_s = seconds - (statistics.median(others) if others else 0.0)
    if lost_s < LEAST_S:
        return None
    end_s = times[nodes[rank]].monotonic_s(record.t)
    generation = record.fields.get("generation_collected")
    return Fact(
        kind=kind,
        node=nodes[rank],
        rank=rank,
        begin_s=end_s - seconds,
        end_s=end_s,
        value=seconds,
        lost_s=lost_s,
        detail=f"generation {generation}" if generation is not None else "",
    )


def _uneven(
    done: Mapping[tuple[int, int], Record],
    delays: Mapping[tuple[str, int], Mapping[int, Record]],
    nodes: Mapping[int, str],
    times: Mapping[str, NodeTime],
) -> list[Fact]:
    """Of ranks that have more to do, and take longer for it; what they are known to have lost otherwise is no work."""
    steps, ranks = sorted({step for step, _ in done}), sorted(nodes)
    if len(ranks) < 2 or not steps:
        return []

    def column_wise(*names: str) -> Floats:
        values = np.full((len(steps), len(ranks)), np.nan)
        for row, step in enumerate(steps):
            for column, rank in enumerate(ranks):
                if (record := done.get((step, rank))) is not None:
                    values[row, column] = next((float(one) for name in names if (one := record.fields.get(name))), 0.0)
        return values

    elements = column_wise("batch_elements", "tokens")
    elements[elements == 0] = np.nan
    work_s = column_wise("step_s") - column_wise("collective_s") - column_wise("data_s")
    for (step, rank), record in done.items():
        if record.fields.get("collective_s", 0.0) is None:  # nobody looked at its collectives
            work_s[steps.index(step), ranks.index(rank)] = np.nan
    for what in ("garbage_collection", "compile"):
        for row, step in enumerate(steps):
            for rank, record in delays.get((what, step), {}).items():
                work_s[row, ranks.index(rank)] -= float(record["seconds"])
    found = []
    for column, rank in enumerate(ranks):
        more_s = longer_by_work_s(elements, work_s, column)
        rows = np.flatnonzero(np.isfinite(work_s).all(axis=1))
        longer_s = work_s[rows, column] - np.median(np.delete(work_s[rows], column, axis=1), axis=1)
        if is_explained_by(more_s[rows], longer_s):
            found += _of_work(rank, column, steps, elements, more_s, done, nodes, times)
    return found


def _of_work(
    rank: int,
    column: int,
    steps: Sequence[int],
    elements: Floats,
    more_s: Floats,
    done: Mapping[tuple[int, int], Record],
    nodes: Mapping[int, str],
    times: Mapping[str, NodeTime],
) -> list[Fact]:
    found = []
    for row in map(int, np.flatnonzero(more_s >= LEAST_S)):
        record = done[steps[row], rank]
        own, typical = elements[row, column], float(np.nanmedian(np.delete(elements[row], column)))
        end_s = times[nodes[rank]].monotonic_s(record.t)
        found.append(
            Fact(
                kind="uneven_work",
                node=nodes[rank],
                rank=rank,
                begin_s=end_s - float(record["step_s"]),
                end_s=end_s,
                value=own / typical,
                lost_s=float(more_s[row]),
                detail=f"batch of {own:.0f} elements against a median of {typical:.0f}",
            )
        )
    return found
