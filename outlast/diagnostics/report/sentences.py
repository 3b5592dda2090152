"""A report's findings as sentences."""

from __future__ import annotations

from outlast.diagnostics.format import first_and_last, share
from outlast.diagnostics.report.model import Report


def headline(report: Report) -> tuple[str, str]:
    """The verdict in a few words, and what it rests on."""
    guilty = [row for row in report.stragglers if row.straggler]
    if not guilty:
        first, _, rest = report.verdict.partition(": ")
        return first, rest[:1].upper() + rest[1:]
    if len(guilty) == 1:
        row = guilty[0]
        first = (
            f"Rank {row.rank} on {row.host} is a straggler: steps take {share(row.slowdown_share)} longer because of it"
        )
        return first, row.evidence[:1].upper() + row.evidence[1:] + "."
    named = ", ".join(f"rank {row.rank} on {row.host}" for row in guilty[:4])
    more = f" and {len(guilty) - 4} more" if len(guilty) > 4 else ""
    worst = guilty[0]
    return f"{len(guilty)} stragglers: {named}{more}", f"The latest, rank {worst.rank}: {worst.evidence}."


def course(report: Report) -> str:
    """How the run went, in one sentence."""
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


def feedback(alpha: float, residual: float) -> str:
    """What compression does to what it is given."""
    return f"{share(alpha)} (of squares) arrives at once, {residual:.2g} × the gradient is held back"
