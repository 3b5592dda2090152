"""The headline, outcome and error feedback of a report, as sentences."""

from __future__ import annotations

from outlast.diagnostics.formatting import duration, first_and_last, share
from outlast.diagnostics.report.model import Report

_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
"""Words of a rank that lost another one: an effect, not a cause."""
_CAUSES = {"hang_found": 0, "workers_failed": 0, "loss_not_finite": 1, "run_ended": 2}
"""Kinds of incidents that end or spoil training, the most telling first; victims end before the culprit is judged."""


def cause(report: Report) -> str:
    """What went wrong with the run, with whom, and what it cost, in one sentence; empty if nothing did.

    Of failures the first one, since the others may follow from it; without failures, the stalls.
    """
    bad = [one for one in report.incidents if one.cause and one.kind in _CAUSES]
    if bad:
        first = min(bad, key=lambda one: (_is_effect(one.cause), _CAUSES[one.kind], one.at_s))
        restarts = _restarts(report)
        return _sentence(first.cause + (f"; {restarts}" if restarts else ""))
    stalls = [one for one in report.incidents if one.kind == "stall"]
    if not stalls:
        return ""
    worst = max(stalls, key=lambda one: one.cost_s)
    if len(stalls) == 1:
        return _sentence(f"{worst.cause}; it went on by itself")
    total_s = sum(one.cost_s for one in stalls)
    return _sentence(f"{len(stalls)} stalls cost {duration(total_s)}; the worst: {worst.cause}")


def _is_effect(text: str) -> bool:
    return any(phrase in text for phrase in _LOST_PEER)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def headline(report: Report) -> tuple[str, str]:
    """The cause of what went wrong, or else the verdict in a few words, and the evidence or the verdict."""
    why = cause(report)
    first, rest = _verdict(report)
    return (why.rstrip("."), f"{first}. {rest}") if why else (first, rest)


def _verdict(report: Report) -> tuple[str, str]:
    """The verdict on stragglers in a few words, and its evidence."""
    stragglers = [row for row in report.stragglers if row.straggler]
    if not stragglers:
        first, _, rest = report.verdict.partition(": ")
        return first, rest[:1].upper() + rest[1:]
    if len(stragglers) == 1:
        row = stragglers[0]
        first = f"Rank {row.rank} on {row.host} is a straggler: it makes steps {share(row.slowdown_share)} longer"
        return first, row.evidence[:1].upper() + row.evidence[1:] + "."
    named = ", ".join(f"rank {row.rank} on {row.host}" for row in stragglers[:4])
    more = f" and {len(stragglers) - 4} more" if len(stragglers) > 4 else ""
    worst = stragglers[0]
    return f"{len(stragglers)} stragglers: {named}{more}", f"The latest, rank {worst.rank}: {worst.evidence}."


def outcome(report: Report) -> str:
    """How far the run got, in one sentence."""
    facts = report.facts
    planned = f" of {facts.steps_planned}" if facts.steps_planned else ""
    how = "Finished" if facts.finished else "Not finished"
    parts = [f"{how}: {facts.steps_done}{planned} steps"]
    if report.loss.evaluated:
        parts.append(f"held-out loss {first_and_last(report.loss.evaluated)}")
    elif report.loss.train:
        parts.append(f"training loss {first_and_last(report.loss.train)}")
    restarts = _restarts(report)
    if restarts:
        parts.append(restarts)
    return "; ".join(parts) + "."


def _restarts(report: Report) -> str:
    """``restarted once and redid 33 steps``; empty without restarts."""
    facts = report.facts
    if not facts.restarts:
        return ""
    times = "once" if facts.restarts == 1 else f"{facts.restarts} times"
    return f"restarted {times} and redid {facts.steps_redone} step{'s' if facts.steps_redone != 1 else ''}"


def error_feedback(alpha: float, residual: float) -> str:
    """How much compression lets through, and how much error feedback carries over."""
    return f"contraction α {share(alpha)}; the residual is {residual:.2g} × the gradient"
