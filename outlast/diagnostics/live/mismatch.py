"""Ranks that died of collectives that did not match: which of them left the common order first.

Over gloo a rank that receives more than its own collective holds is aborted at once, by C++, and can leave nothing
behind; its peers lose their connections to it, and leave their newest collectives as they end. From these the one that
left the order is told: often not the one that was aborted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from outlast.diagnostics.live.desync import CONTEXT, Desync, at, compared, describe, key, of_group, usual_next, who_left
from outlast.diagnostics.live.flight import POINT_TO_POINT
from outlast.diagnostics.live.recorder import Collective, Ring

EQUAL_BYTES = (
    *("all_reduce", "broadcast", "reduce", "all_gather", "_all_gather_base", "reduce_scatter"),
    "_reduce_scatter_base",
)
"""Collectives whose input has the same size on all ranks; of others only the kind is compared."""


def find_mismatch(rings: Sequence[Ring], aborted: Collection[int], *, certain: bool) -> Desync | None:
    """Who left the order first, if that can be told.

    Args:
        rings: of ranks that ended in an error, or still wait; each with its newest collectives.
        aborted: ranks that were aborted and left no ring that is up to date.
        certain: whether an aborted rank has said that sizes did not match. Else the abort may have another cause, and
            only collectives that differ, or that never followed one another before, are evidence.

    Where rings differ at the last collective that both have, the rank that is alone with its own has left, or the one
    whose collective is not what followed the same ones before. Where all agree, or there is one: if what it entered
    last is what always followed, the aborted rank has left, else the rank itself.
    """
    rings = [
        replace(ring, records=own)
        for ring in rings
        if (own := tuple(one for one in ring.records if not one.group.startswith(POINT_TO_POINT)))
    ]
    for group in sorted({one.group for ring in rings for one in ring.records[-CONTEXT:]}):
        found = _differing(rings, group)
        if found is not None:
            return found
    if not rings or not aborted:
        return None
    newest = max(rings, key=lambda ring: ring.records[-1].entered_s)
    group = newest.records[-1].group
    kept = [one for one in (of_group(ring, group) for ring in rings) if one.records]
    last = kept[0].records[-1]
    usual = usual_next(kept[0], last.seq)
    if usual is None:
        return None
    if key(last) == usual or len(kept) > 1:
        if not certain or len(aborted) > 1:
            return None
        (rank,) = aborted
        return Desync(
            first=rank,
            other=kept[0].rank,
            evidence=(
                f"desynchronised: rank {rank} left the order of collectives{_in(group)}: its peers' collective "
                f"#{last.seq} was {describe(last)}, as it should be, and what it entered was another"
            ),
        )
    expected = replace(last, op=usual[0], label=usual[1], nbytes=usual[2])
    return Desync(
        first=kept[0].rank,
        other=min(aborted),
        evidence=(
            f"desynchronised: rank {kept[0].rank} left the order of collectives{_in(group)}: its collective "
            f"#{last.seq} was {describe(last)}, where {describe(expected)} used to follow; rank {min(aborted)}, which "
            f"kept to it, was aborted"
        ),
    )


def _differing(rings: Sequence[Ring], group: str) -> Desync | None:
    """Two rings that differ at the last collective that both have in a group."""
    within = [one for one in (of_group(ring, group) for ring in rings) if one.records]
    for n, a in enumerate(within):
        for b in within[n + 1 :]:
            seq = min(a.records[-1].seq, b.records[-1].seq)
            here, there = at(a, seq), at(b, seq)
            if here is None or there is None or not _differ(here, there):
                continue
            left, kept = who_left(seq, a, b, within)
            return Desync(
                first=left.rank,
                other=kept.rank,
                evidence=(
                    f"desynchronised: rank {left.rank} left the order of collectives{_in(group)}: "
                    f"{compared(left, kept, seq)}"
                ),
            )
    return None


def _differ(one: Collective, other: Collective) -> bool:
    return one.op != other.op or (one.op in EQUAL_BYTES and one.nbytes != other.nbytes)


def _in(group: str) -> str:
    return f" of group {group}" if group else ""
