"""Which of the ranks that have ended is the first cause: one rank's end takes its peers along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outlast.diagnostics.syndromes.blame import BlameKey, blame_key
from outlast.diagnostics.syndromes.trace import Trace
from outlast.diagnostics.syndromes.verdict import Confidence, Culprit, Verdict, named
from outlast.diagnostics.syndromes.waits import Waits


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A rank whose process has ended by itself; not one that was ended because a peer had failed."""

    rank: int
    status: int
    """Exit status; ``-N`` for signal N."""
    ended_s: float | None = None
    """When that was seen, on its node's clock; None if that is not known."""
    lost_peer: bool = False
    """Whether its last words are that another rank was lost."""
    message: str = ""
    """Its last words."""
    finished: bool = False
    """Whether it had said that it was done."""


def find_first(trace: Trace, waits: Waits, ends: Sequence[Ended]) -> Verdict | None:
    """Whose end is the cause of the others'; None if none has failed.

    A rank that ended with status 0 before it had said that it was done is a cause once peers wait for it, or have lost
    one another. Of several that failed by themselves it is the one that was killed by a signal, then the one that says
    why, then the first, as far as clocks tell. If all say that they have lost a peer, none of them is the cause: the
    evidence is weak.
    """
    failed = [one for one in ends if one.status]
    suffers = any(one.lost_peer for one in failed)
    early = [one for one in ends if not one.status and not one.finished and (suffers or one.rank in waits.awaited_s)]
    if not failed and not early:
        return None
    ordered = sorted([*early, *failed], key=lambda one: (_key(one), _common_s(trace, one), one.rank))
    first = ordered[0]
    node = trace.job.node(first.rank)
    victims = tuple(sorted(one.rank for one in ordered[1:] if one.lost_peer))
    waiting = waits.awaited_s.get(first.rank)
    evidence = f"rank {first.rank} {_words(first)}"
    if victims:
        evidence += f"; rank{'s' if len(victims) > 1 else ''} {named(victims)} lost it and ended, too"
    if waiting is not None:
        evidence += f"; {len(waiting[1].waiters)} ranks have waited {waiting[0]:.1f} s for it"
    rivals = [one for one in ordered[1:] if _key(one) == _key(first)]
    confidence: Confidence = "likely" if rivals else "certain"
    if first.lost_peer:
        confidence = "weak"
        evidence += "; all that ended say so, so the connection between them, or a node that is gone, may be the cause"
    return Verdict(
        syndrome="crash",
        culprit=Culprit(place="rank", ranks=(first.rank,), nodes=(node,)),
        evidence=evidence,
        ruled_out=tuple(f"rank {one.rank}: it {_words(one)}" for one in ordered[1:4]),
        confidence=confidence,
        step=int(trace.signs.step[first.rank]),
        cause=first.message.strip().splitlines()[-1].strip() if first.message.strip() and first.status > 0 else "",
    )


def _key(one: Ended) -> BlameKey:
    return blame_key(
        left=one.status == 0, hung=False, lost_peer=one.lost_peer, status=one.status, has_message=bool(one.message)
    )


def _common_s(trace: Trace, one: Ended) -> float:
    """When it ended on the collector's clock, in units of what the clocks are good for."""
    if one.ended_s is None:
        return float("inf")
    node = int(trace.job.node_of[one.rank])
    grain_s = max(0.001, 2.0 * float(trace.clocks.error_s.max(initial=0.0)))
    return round((one.ended_s - float(trace.clocks.ahead_s[node])) / grain_s) * grain_s


def _words(one: Ended) -> str:
    if one.lost_peer:
        return "lost its connection to a peer"
    if one.status == 0:
        return "ended with status 0 while its peers were not done"
    return f"exited with status {one.status}" if one.status > 0 else f"was killed by signal {-one.status}"
