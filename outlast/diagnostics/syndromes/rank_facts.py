"""What ranks told of themselves, as the facts that explain a verdict: only what one rank had beyond its peers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from outlast.diagnostics.syndromes.facts import Fact
from outlast.diagnostics.syndromes.others import Floats, median_beside
from outlast.diagnostics.syndromes.own_times import OwnTimes
from outlast.diagnostics.syndromes.step_trace import NodeSteps, StepTable, table_of, without_gaps

LEAST_S = 0.001
"""What a rank has beyond its peers by less is no fact."""


def rank_facts(nodes: Sequence[NodeSteps], ranks: Collection[int]) -> tuple[Fact, ...]:
    """The facts of the newest steps that all ranks have told of. What all of them do alike, such as waiting for the
    same slow disk, is none.

    Args:
        nodes: the steps of all ranks, by which these are measured.
        ranks: of these.
    """
    table = table_of(without_gaps(nodes))
    if not len(table.steps) or len(table.ranks) < 2:
        return ()
    step_s = np.diff(table.done_s, axis=0, prepend=np.nan)
    data_s = table.delays_s.get("data_wait", 0.0)
    own = OwnTimes(
        seconds={str(kind): seconds for kind, seconds in table.delays_s.items()},
        elements=table.elements,
        work_s=step_s - table.inside_s - data_s,
    )
    found: list[Fact] = []
    for column in [at for at, rank in enumerate(table.ranks) if rank in ranks]:
        found += _delays(table, own, column)
        found += _uneven(table, own, column)
    return tuple(found)


def _delays(table: StepTable, own: OwnTimes, column: int) -> list[Fact]:
    every = np.arange(len(table.steps))
    found = []
    for kind, seconds in table.delays_s.items():
        beyond_s = own.beyond_s(kind, column, every)
        assert beyond_s is not None
        for row in map(int, np.flatnonzero(beyond_s >= LEAST_S)):
            end_s, value = float(table.done_s[row, column]), float(seconds[row, column])
            found.append(
                Fact(
                    kind=kind,
                    node=table.nodes[column],
                    rank=table.ranks[column],
                    begin_s=end_s - value,
                    end_s=end_s,
                    value=value,
                    lost_s=float(beyond_s[row]),
                )
            )
    return found


def _uneven(table: StepTable, own: OwnTimes, column: int) -> list[Fact]:
    """Of a rank that has more to do, and takes longer for it."""
    assert own.work_s is not None
    known = np.flatnonzero(np.isfinite(own.work_s).all(axis=1))
    behind_s: Floats = np.maximum(median_beside(table.inside_s, column) - table.inside_s[:, column], 0.0)
    more_s = own.by_work_s(column, known, behind_s[known])
    if more_s is None or own.elements is None:
        return []
    typical = median_beside(own.elements, column)
    found = []
    for lost_s, row in zip(more_s.tolist(), known.tolist(), strict=True):
        if lost_s < LEAST_S:
            continue
        elements, usual, end_s = own.elements[row, column], float(typical[row]), float(table.done_s[row, column])
        found.append(
            Fact(
                kind="uneven_work",
                node=table.nodes[column],
                rank=table.ranks[column],
                begin_s=float(table.done_s[row - 1, column]),
                end_s=end_s,
                value=float(elements / usual),
                lost_s=lost_s,
                detail=f"batch of {elements:.0f} elements against a median of {usual:.0f}",
            )
        )
    return found
