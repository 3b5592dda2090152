"""Why a rank is slow, where facts of the same time explain it: told by itself, or seen by its node's monitor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from outlast.diagnostics.syndromes.facts import TOLD_BY_RANKS, Fact, FactKind, overlapping
from outlast.diagnostics.syndromes.rules import Rules
from outlast.diagnostics.syndromes.trace import Trace
from outlast.diagnostics.syndromes.verdict import Confidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """In words, empty if nothing is known to explain it."""

    words: str = ""
    is_software: bool = False
    confidence: Confidence = "weak"
    """``likely`` if the time that it took was measured, and is as much as was lost; ``weak`` if it was merely so at the
    same time."""


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
    by_kind: dict[FactKind, list[Fact]] = {}
    for one in dict.fromkeys(seen):
        if one.lost_s is not None:
            by_kind.setdefault(one.kind, []).append(one)
    total_s = lost_s * steps * len(ranks)
    shares = {
        kind: _share(kind, same, total_s, len(ranks), begin_s, end_s, rules)
        for kind, same in by_kind.items()
        if total_s > 0
    }
    kind = max(shares, key=lambda one: shares[one], default=None)
    if kind is not None and shares[kind] >= rules.explained_share:
        same = by_kind[kind]
        times = "" if len(same) == 1 else f", {len(same)} times"
        return Cause(
            words=f"{same[0].words()}{times}; {min(shares[kind], 1.0):.0%} of what is lost",
            is_software=same[0].is_software,
            confidence="likely",
        )
    lasting = [one for one in seen if one.lost_s is None and _lasts(one, begin_s, end_s)]
    if lasting:
        return Cause(words=lasting[0].words(), is_software=lasting[0].is_software)
    return Cause()


def _share(
    kind: FactKind, same: Sequence[Fact], total_s: float, ranks: int, begin_s: float, end_s: float, rules: Rules
) -> float:
    """How much of the time lost between these moments the facts of one kind explain.

    A node's monitor finds what lasts a sample or two late: what it measured then is taken for the time before too, if
    that was not most of it.
    """
    share = sum(one.held_s(begin_s, end_s) for one in same) / total_s
    if kind in TOLD_BY_RANKS or end_s <= begin_s:
        return share
    seen_s = sum(one.overlap_s(begin_s, end_s) for one in same)
    whole_s = (end_s - begin_s) * (ranks if same[0].rank is not None else 1)
    if seen_s < rules.covered_share * whole_s:
        return share
    return share * max(1.0, whole_s / seen_s)


def _lasts(fact: Fact, begin_s: float, end_s: float) -> bool:
    """Whether it was so for most of the time in question."""
    return fact.overlap_s(begin_s, end_s) >= 0.5 * (end_s - begin_s) or bool(np.isclose(end_s, begin_s))
