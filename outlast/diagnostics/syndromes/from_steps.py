"""From the steps that all ranks tell while they run to who is slow, and why."""

from __future__ import annotations

from collections.abc import Sequence

from outlast.diagnostics.syndromes.analyse import analyse
from outlast.diagnostics.syndromes.facts import Fact
from outlast.diagnostics.syndromes.rank_facts import rank_facts
from outlast.diagnostics.syndromes.step_trace import NodeSteps, trace_of_steps, without_gaps
from outlast.diagnostics.syndromes.verdict import Verdict

SLOW = ("non_communication_slow", "communication_slow")


def judge_steps(nodes: Sequence[NodeSteps], facts: Sequence[Fact], *, world_size: int) -> tuple[Verdict, ...] | None:
    """Who is slow, each with its cause, as far as one is known; None while not all ranks have told of steps.

    Takes less than a second for 4,096 ranks. Slow communication has no culprit but the group of all ranks, and is weak:
    steps do not tell between whom; a probe will.

    Args:
        nodes: the steps of all ranks.
        facts: what the nodes' monitors have seen meanwhile.
        world_size: how many ranks there are.
    """
    trace = trace_of_steps(without_gaps(nodes), world_size=world_size)
    if trace is None:
        return None
    said = analyse(trace, facts=facts)
    late = {rank for one in said if one.syndrome == "non_communication_slow" for rank in one.culprit.ranks}
    if late and (own := rank_facts(nodes, late)):
        said = analyse(trace, facts=[*facts, *own])
    return tuple(one for one in said if one.syndrome in SLOW)
