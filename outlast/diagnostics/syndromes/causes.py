"""Why a rank is slow, where facts of the same time explain it: told by itself, or seen by its node's monitor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from outlast.diagnostics.syndromes.facts import FACT_KINDS, TOLD_BY_RANKS, Fact, FactKind, overlapping
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
    here = [one for one in facts if one.node == job.nodes[node] and one.begin_s <= end_s and begin_s <= one.end_s]
    peers = [one for one in map(int, job.ranks_on(node)) if one not in ranks]
    measured = _Measured(here, list(ranks), peers, lost_s * steps, begin_s, end_s)
    of_ranks = measured.most([kind for kind in FACT_KINDS if kind in TOLD_BY_RANKS], 0.0)
    of_node = measured.most([kind for kind in FACT_KINDS if kind not in TOLD_BY_RANKS], rules.covered_share)
    for kind, share in (of_ranks, of_node):  # a rank knows better what it did
        if kind is not None and share >= rules.explained_share:
            same = [one for one in here if one.kind == kind and one.rank in (None, *ranks)]
            same.sort(key=lambda one: -(one.lost_s or 0.0))
            times = "" if len(same) == 1 else f", {len(same)} times"
            return Cause(
                words=f"{same[0].words()}{times}; {min(share, 1.0):.0%} of what is lost",
                is_software=same[0].is_software,
                confidence="likely",
            )
    seen = [
        one
        for rank in ranks
        for one in overlapping(here, node=job.nodes[node], rank=rank, begin_s=begin_s, end_s=end_s)
        if one.kind not in TOLD_BY_RANKS and _lasts(one, begin_s, end_s)
    ]
    return Cause(words=seen[0].words(), is_software=seen[0].is_software) if seen else Cause()


@dataclass(frozen=True, slots=True)
class _Measured:
    """How much of what slow ranks lost each kind of fact explains, as far as it was measured."""

    facts: Sequence[Fact]
    """Of their node."""
    ranks: list[int]
    peers: list[int]
    """Ranks of the same node that are not slow: what these had as well makes no difference."""
    lost_s: float
    """By each of the ranks."""
    begin_s: float
    end_s: float

    def most(self, kinds: Sequence[FactKind], covered_share: float) -> tuple[FactKind | None, float]:
        """The kind that explains most, and its share.

        Args:
            kinds: to choose from.
            covered_share: a node's monitor finds what lasts a sample or two late. What it measured is taken for the
                time before as well, if it saw it in this share of the time; 0 takes what was measured.
        """
        there = {one.kind for one in self.facts if one.lost_s is not None}
        shares = {kind: self._share(kind, covered_share) for kind in kinds if kind in there and self.lost_s > 0}
        best = max(shares, key=lambda one: shares[one], default=None)
        return best, shares[best] if best is not None else 0.0

    def _share(self, kind: FactKind, covered_share: float) -> float:
        beyond_s = np.mean([self._of(kind, one)[0] for one in self.ranks])
        if self.peers:
            beyond_s -= np.median([self._of(kind, one)[0] for one in self.peers])
        share, whole_s = float(beyond_s / self.lost_s), self.end_s - self.begin_s
        seen_s = float(np.mean([self._of(kind, one)[1] for one in self.ranks]))
        late = covered_share > 0 and 0 < covered_share * whole_s <= seen_s < whole_s
        return share * whole_s / seen_s if late else share

    def _of(self, kind: FactKind, rank: int) -> tuple[float, float]:
        """Seconds for which it kept a rank from working, and in which it was seen."""
        own = [one for one in self.facts if one.kind == kind and one.rank in (None, rank) and one.lost_s is not None]
        held_s = sum(one.held_s(self.begin_s, self.end_s) for one in own)
        return held_s, sum(one.overlap_s(self.begin_s, self.end_s) for one in own)


def _lasts(fact: Fact, begin_s: float, end_s: float) -> bool:
    """Whether it was so for most of the time in question."""
    return fact.overlap_s(begin_s, end_s) >= 0.5 * (end_s - begin_s) or bool(np.isclose(end_s, begin_s))
