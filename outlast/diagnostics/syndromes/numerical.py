"""Values that are not finite: on which rank they appeared first."""

from __future__ import annotations

from collections.abc import Sequence

from outlast.diagnostics.syndromes.facts import Fact
from outlast.diagnostics.syndromes.trace import Trace
from outlast.diagnostics.syndromes.verdict import Culprit, Verdict, named


def find_not_finite(trace: Trace, facts: Sequence[Fact]) -> list[Verdict]:
    """Who had values that were not finite before its peers had them from it; empty if nobody has any.

    The first exchange spreads them to all ranks. If several had them at once, as far as clocks tell, the model or its
    data is at fault, and no rank.
    """
    job, clocks = trace.job, trace.clocks
    found = []
    for one in facts:
        if one.kind == "not_finite" and one.rank is not None and one.node in job.nodes:
            node = job.nodes.index(one.node)
            found.append((one.begin_s - float(clocks.ahead_s[node]), float(clocks.error_s[node]), one.rank, one))
    if not found:
        return []
    found.sort(key=lambda item: item[0])
    first_s, error_s, rank, fact = found[0]
    ranks = tuple(
        sorted({other for at_s, other_error_s, other, _ in found if at_s - first_s <= error_s + other_error_s})
    )
    alone = len(ranks) == 1
    return [
        Verdict(
            syndrome="numerical",
            culprit=Culprit(
                place="rank" if alone else "group",
                ranks=ranks,
                nodes=(job.node(rank),) if alone else (),
                role="" if alone else "all that have them",
            ),
            evidence=(
                f"rank {rank} had {fact.value:.3g} values that are not finite"
                + (f" ({fact.detail})" if fact.detail else "")
                + (f", {found[1][0] - first_s:.3f} s before the next rank" if alone and len(found) > 1 else "")
                + ("" if alone else f", as had ranks {named([one for one in ranks if one != rank])} at the time")
            ),
            confidence="likely" if alone else "weak",
            step=int(trace.signs.step[rank]),
            cause=fact.detail,
            is_software=not alone,
        )
    ]
