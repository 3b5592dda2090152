"""Who keeps its peers waiting, told seconds after it began, long before anybody is ended for it.

A verdict that ends a rank (:func:`~outlast.diagnostics.live.judge`) needs the patience of everything that a healthy
program may do. To say who holds up the others needs little: they are inside a collective, it is not, and it is stopped,
or in the middle of a step, or does nothing at all. Phases that may last (evaluation, data, checkpoints, set-up), and
programs that compute, are nobody's fault and are not told. Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outlast.diagnostics.live.desync import find_desync
from outlast.diagnostics.live.stall import SLOW_PHASES, Observation

MEDIAN_STEPS = 3.0
"""Peers wait for so many of their median steps before anybody is told of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A rank that its peers wait for."""

    rank: int
    pid: int
    step: int
    entered: int
    """Collectives that it has entered."""
    waiting: int
    """Peers inside a collective."""
    awaited_s: float
    """For how long the first of them has been."""
    evidence: str


def find_suspects(
    ranks: Sequence[Observation], told_after_s: float, now_s: float, *, whole: bool
) -> tuple[Suspect, ...]:
    """The ranks that keep others waiting for more than ``max(told_after_s, MEDIAN_STEPS x their median step)``.

    Args:
        ranks: all ranks that are known of.
        told_after_s: seconds.
        now_s: when they were observed, CLOCK_MONOTONIC seconds.
        whole: whether these are all ranks of the job. If not, and all of them wait, it may be for another one.
    """
    ranks = [one for one in ranks if one.state != "dead"]
    waiting = [one for one in ranks if one.pending and one.state != "stopped"]
    longest = max(waiting, key=lambda one: one.waited_s(now_s), default=None)
    if longest is None:
        return ()
    awaited_s = longest.waited_s(now_s)
    if awaited_s <= max(told_after_s, MEDIAN_STEPS * (longest.beat.median_step_s if longest.beat is not None else 0.0)):
        return ()
    peers = "1 peer has" if len(waiting) == 1 else f"{len(waiting)} peers have"
    told = f"{peers} been waiting for {awaited_s:.1f} s in {longest.pending[0].op} #{longest.pending[0].number}"

    def suspect(one: Observation, evidence: str) -> Suspect:  # it may wait itself, where nobody comes
        return Suspect(
            rank=one.rank,
            pid=one.pid,
            step=one.step,
            entered=one.entered,
            waiting=len([peer for peer in waiting if peer is not one]),
            awaited_s=awaited_s,
            evidence=evidence,
        )

    outside = [one for one in ranks if one not in waiting]
    if not outside:
        found = find_desync([one.ring for one in ranks if one.ring is not None]) if whole else None
        return () if found is None else tuple(suspect(one, found.evidence) for one in ranks if one.rank == found.first)
    return tuple(
        suspect(one, f"{what}; {told}")
        for one in outside
        if (what := _what_it_does(one, awaited_s, told_after_s, now_s))
    )


def _what_it_does(one: Observation, awaited_s: float, told_after_s: float, now_s: float) -> str:
    """Empty if it may well be at work."""
    if one.state == "stopped":
        return "stopped (state T)"
    if one.beat is None or one.silent_s(now_s) <= min(awaited_s, told_after_s):
        return ""
    where = f"outside of any collective in step {one.step}, silent for {one.silent_s(now_s):.1f} s"
    if one.is_program:
        return f"does nothing for {one.idle_s:.1f} s, {where}" if one.idle_s > told_after_s / 2 and one.entered else ""
    return "" if one.beat.phase in SLOW_PHASES else where
