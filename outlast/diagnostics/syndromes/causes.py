"""Why a rank is slow, where a monitor's facts of the same time explain it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from outlast.diagnostics.syndromes.facts import Fact, FactKind, overlapping
from outlast.diagnostics.syndromes.rules import Rules
from outlast.diagnostics.syndromes.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """In words, empty if nothing is known to explain it."""

    words: str = ""
    is_software: bool = False


def explain(
    trace: Trace,
    facts: Sequence[Fact],
    ranks: Sequence[int],
    lost_s: float,
    steps: int,
    rules: Rules,
    *,
    since_step: int,
) -> Cause:
    """The fact, or the facts of one kind, that explain the time lost since a step; else what was seen beside it.

    Args:
        trace: of the job.
        facts: what monitors have seen.
        ranks: the slow ones.
        lost_s: seconds that are lost in a step.
        steps: for how many steps.
        rules: which share of the lost time has to be explained.
        since_step: the first of them.
    """
    job, calls = trace.job, trace.calls
    rank = ranks[0]
    node = int(job.node_of[rank])
    own = (calls.rank == rank) & (calls.step >= since_step)
    if not own.any():
        return Cause()
    begin_s, end_s = float(calls.enter_s[own].min()), float(trace.clocks.now_s[node])
    seen = [
        one
        for rank in ranks
        for one in overlapping(facts, node=job.nodes[node], rank=rank, begin_s=begin_s, end_s=end_s)
    ]
    seen = list(dict.fromkeys(seen))
    total_s: dict[FactKind, float] = {}
    for one in seen:
        if one.lost_s is not None:
            total_s[one.kind] = total_s.get(one.kind, 0.0) + one.lost_s
    needed_s = rules.explained_share * lost_s * steps * len(ranks)
    kind = max(total_s, key=lambda one: total_s[one], default=None)
    if kind is not None and total_s[kind] >= needed_s:
        same = [one for one in seen if one.kind == kind]
        words = same[0].words() if len(same) == 1 else f"{same[0].words()}, {len(same)} times"
        return Cause(words=words, is_software=same[0].is_software)
    lasting = [one for one in seen if one.lost_s is None and _lasts(one, begin_s, end_s)]
    if lasting:
        return Cause(words=lasting[0].words(), is_software=lasting[0].is_software)
    return Cause()


def _lasts(fact: Fact, begin_s: float, end_s: float) -> bool:
    """Whether it was so for most of the time in question."""
    both_s = min(fact.end_s, end_s) - max(fact.begin_s, begin_s)
    return both_s >= 0.5 * (end_s - begin_s) or bool(np.isclose(end_s, begin_s))
