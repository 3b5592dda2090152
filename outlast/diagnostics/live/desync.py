"""Ranks that wait in different collectives: which of them left the common order first, from their rings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from outlast.diagnostics.live.flight import POINT_TO_POINT
from outlast.diagnostics.live.recorder import Collective, Ring

CONTEXT = 16
"""Collectives before the first difference that are compared with earlier ones, to tell what should have come next."""

Key = tuple[str, str, int]


@dataclass(frozen=True, kw_only=True)
class Desync:
    """Two ranks whose collectives differ from a certain one on."""

    first: int
    """The rank that left the order first."""
    other: int
    """A rank that kept to it, as far as the rings tell."""
    evidence: str


def find_desync(rings: Sequence[Ring]) -> Desync | None:
    """The first difference between the orders of ranks that all wait inside a collective, if there is one.

    Two ranks are out of order if their rings differ at the same sequence number, in operation, label, bytes or step,
    and neither has ever entered, from there on, what the other one waits in. A rank that is merely behind in the
    same order is not, nor are two threads of a rank that took turns differently.

    Who left first: the rank that is alone with what it entered, if there are three or more; with two, the one whose
    collective is not what followed the same sequence of collectives before; else the one that is a step ahead; else the
    one that entered its collective first.

    Args:
        rings: of the ranks that wait; others must not be among them.
    """
    groups = sorted({one.group for ring in rings for one in ring.pending if not one.group.startswith(POINT_TO_POINT)})
    found = (_find_in_group([of_group(ring, group) for ring in rings], group) for group in groups)
    return next((one for one in found if one is not None), None)


def of_group(ring: Ring, group: str) -> Ring:
    """A rank's collectives in one process group, numbered as there; without groups the ring itself."""
    if not group:
        return ring
    records = tuple(replace(one, seq=one.group_seq) for one in ring.records if one.group == group)
    return replace(ring, records=records)


def _find_in_group(rings: Sequence[Ring], group: str) -> Desync | None:
    pairs = [(a, b) for n, a in enumerate(rings) for b in rings[n + 1 :]]
    found = [(seq, a, b) for a, b in pairs if (seq := _parted_at(a, b)) is not None]
    if not found:
        return None
    seq, a, b = min(found, key=lambda one: (one[0], one[1].rank, one[2].rank))
    left, kept = who_left(seq, a, b, rings)
    return Desync(
        first=left.rank,
        other=kept.rank,
        evidence=(
            f"desynchronised: ranks {min(left.rank, kept.rank)} and {max(left.rank, kept.rank)} are in different "
            f"collectives{f' of group {group}' if group else ''}; rank {left.rank} left the order first: "
            f"{compared(left, kept, seq)}"
        ),
    )


def compared(left: Ring, kept: Ring, seq: int) -> str:
    """The collectives of two ranks where their orders part, in words; both have it."""
    there, here = at(left, seq), at(kept, seq)
    assert there is not None, "the rings differ there"
    assert here is not None, "the rings differ there"
    return f"its collective #{seq} was {describe(there)}, that of rank {kept.rank} {describe(here)}"


def _parted_at(a: Ring, b: Ring) -> int | None:
    """The sequence number from which two waiting ranks' orders differ; None if they may still meet."""
    if not a.pending or not b.pending:
        return None
    seqs = sorted({one.seq for one in a.records} & {one.seq for one in b.records})
    differs = next((seq for seq in seqs if _differ(at(a, seq), at(b, seq))), None)
    if differs is None:
        return None
    if any(_has_entered(b, one, differs) for one in a.pending):
        return None
    if any(_has_entered(a, one, differs) for one in b.pending):
        return None
    return differs


def _differ(one: Collective | None, other: Collective | None) -> bool:
    return one is not None and other is not None and (key(one), one.step) != (key(other), other.step)


def _has_entered(ring: Ring, wanted: Collective, since: int) -> bool:
    return any(one.seq >= since and (key(one), one.step) == (key(wanted), wanted.step) for one in ring.records)


def who_left(seq: int, a: Ring, b: Ring, rings: Sequence[Ring]) -> tuple[Ring, Ring]:
    """The one of two that left the order at ``seq``, and the other one."""
    entered = {ring.rank: one for ring in rings if (one := at(ring, seq)) is not None}
    votes = Counter((key(one), one.step) for one in entered.values())
    mine, theirs = entered[a.rank], entered[b.rank]
    shares = votes[key(mine), mine.step], votes[key(theirs), theirs.step]
    if shares[0] != shares[1]:
        return (a, b) if shares[0] < shares[1] else (b, a)
    return decide(seq, a, b)


def decide(seq: int, a: Ring, b: Ring) -> tuple[Ring, Ring]:
    """The one of two that left the order at ``seq``, and the other one, where as many ranks are with each.

    Both have a collective there.
    """
    mine, theirs = at(a, seq), at(b, seq)
    assert mine is not None, "the rings differ there"
    assert theirs is not None, "the rings differ there"
    usual = usual_next(a, seq)
    if usual is not None and (key(mine) == usual) != (key(theirs) == usual):
        return (b, a) if key(mine) == usual else (a, b)
    if mine.step != theirs.step:  # who is ahead has left out something
        return (a, b) if mine.step > theirs.step else (b, a)
    return (a, b) if mine.entered_s <= theirs.entered_s else (b, a)


def usual_next(ring: Ring, seq: int) -> Key | None:
    """What followed, earlier, the longest stretch of collectives that also stands right before ``seq``."""
    before = [key(one) for one in ring.records if one.seq < seq]
    best, usual = 0, None
    for at in range(len(before) - 1, 0, -1):
        length = 0
        while length < min(CONTEXT, at) and before[at - 1 - length] == before[len(before) - 1 - length]:
            length += 1
        if length > best:
            best, usual = length, before[at]
    return usual


def at(ring: Ring, seq: int) -> Collective | None:
    return next((one for one in ring.records if one.seq == seq), None)


def key(one: Collective) -> Key:
    return one.op, one.label, one.nbytes


def describe(one: Collective) -> str:
    label = f" {one.label!r}" if one.label else ""
    return f"{one.op}{label} of {one.nbytes} bytes in step {one.step}"
