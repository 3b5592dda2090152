"""The headline, outcome and error feedback of a report, as sentences."""

from __future__ import annotations

from outlast.diagnostics.formatting import first_and_last, share
from outlast.diagnostics.report.model import Report


def headline(report: Report) -> tuple[str, str]:
    """The verdict in a few words, and its evidence."""
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
    if facts.restarts:
        times = "once" if facts.restarts == 1 else f"{facts.restarts} times"
        steps = f"{facts.steps_redone} step{'s' if facts.steps_redone != 1 else ''}"
        parts.append(f"restarted {times} and redid {steps}")
    return "; ".join(parts) + "."


def error_feedback(alpha: float, residual: float) -> str:
    """How much compression lets through, and how much error feedback carries over."""
    return f"contraction α {share(alpha)}; the residual is {residual:.2g} × the gradient"
