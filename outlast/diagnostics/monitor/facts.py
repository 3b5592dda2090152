"""Conditions of a node as the facts that explain a verdict."""

from __future__ import annotations

from collections.abc import Iterable

from outlast.diagnostics.monitor.conditions import NodeCondition
from outlast.diagnostics.syndromes.facts import FACT_KINDS, Fact, FactKind

KINDS: dict[str, FactKind] = {name: name for name in FACT_KINDS}
"""By what a condition is called; a rank that is stopped and a clock that jumped are no facts, but signs and clocks."""


def facts_of(conditions: Iterable[NodeCondition], *, node: str, t: float, at_s: float) -> tuple[Fact, ...]:
    """One fact for each condition, and for each rank that it concerned.

    Args:
        conditions: of one node.
        node: its name in the trace.
        t: a time of day of that node, seconds since the epoch.
        at_s: what its CLOCK_MONOTONIC showed then, seconds.
    """
    found = []
    for one in conditions:
        kind = KINDS.get(one.what)
        if kind is None or (kind == "thermal" and one.value <= 0):  # how fast it is now is not told everywhere
            continue
        begin_s = at_s - (t - one.since_t)
        for rank in one.ranks or (None,):
            found.append(
                Fact(
                    kind=kind,
                    node=node,
                    rank=rank,
                    begin_s=begin_s,
                    end_s=begin_s + one.seconds,
                    value=one.value,
                    lost_s=one.measured_s,
                    detail=one.words,
                )
            )
    return tuple(found)
