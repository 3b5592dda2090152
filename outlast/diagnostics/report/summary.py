"""The headline, outcome and error feedback of a report, as sentences."""

from __future__ import annotations

from collections.abc import Sequence

from outlast.diagnostics.formatting import duration, first_and_last, share
from outlast.diagnostics.report.failures import worst_of
from outlast.diagnostics.report.model import GoodputSplit, Report, TimeSplit
from outlast.diagnostics.report.phases import SlowPhase, described

CAUSE_NAMES = {
    "useful": "useful steps",
    "redone": "steps redone",
    "restart": "restarts",
    "hang": "hangs",
    "checkpoint": "held by checkpoints",
    "evaluation": "evaluation",
    "data": "waiting for data",
    "startup": "start and end",
}
MOST_ENDED = 3
"""Names of checkpoints in one sentence."""


def cause(report: Report) -> str:
    """The worst that happened to the run, with whom, and what it cost, in one sentence; empty if nothing did.

    Worst is a failure from which the run did not recover; then a loss that is not finite, or replicas that differ; then
    the failure that cost most, a checkpoint that was lost, and last what only cost time: stalls and slow phases. It is
    empty too where a straggler, which is told by the verdict, cost more time than those.
    """
    worst = worst_of(report.failures, report.facts.median_step_s)
    losses = [one.cause for one in report.incidents if one.kind in ("loss_not_finite", "replicas_different")]
    if worst is not None and (worst.lost_s is None or not losses):
        others = len(report.failures) - 1
        return _sentence(worst.told + (f"; the worst of {others + 1} failures" if others else ""))
    if losses:
        return _sentence(losses[0])
    lost = [one for one in report.incidents if one.cause and one.kind in ("checkpoint_failed", "checkpoint_rejected")]
    if lost:
        steps = sorted({one.step for one in lost[:-1] if one.step is not None})
        named = ", ".join(map(str, steps[-MOST_ENDED:]))
        return _sentence(
            lost[-1].cause + (f"; likewise of step{'s' if len(steps) > 1 else ''} {named}" if steps else "")
        )
    return _lost_time(report)


def _lost_time(report: Report) -> str:
    """The worst of stalls and slow phases, unless a straggler cost more."""
    stalls = [one for one in report.incidents if one.kind == "stall"]
    stalled_s = sum(one.cost_s for one in stalls)
    straggling = {(row.rank, row.host): row.cost_s for row in report.stragglers if row.straggler}
    phases = [one for one in report.slow_phases if (one.rank, one.host) not in straggling]
    phase = max(phases, key=lambda one: one.cost_s, default=None)
    if max(straggling.values(), default=0.0) >= max(stalled_s, phase.cost_s if phase is not None else 0.0):
        return ""
    if phase is not None and phase.cost_s >= stalled_s:
        return _sentence(f"rank {phase.rank} on {phase.host} was slow in {phase.which}: {described(phase)}")
    worst = max(stalls, key=lambda one: one.cost_s)
    if len(stalls) == 1:
        return _sentence(f"{worst.cause}; it went on by itself")
    return _sentence(f"{len(stalls)} stalls cost {duration(stalled_s)}; the worst: {worst.cause}")


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
    own = {(one.rank, one.host): one for one in report.slow_phases}
    if not stragglers:
        first, _, rest = report.verdict.partition(": ")
        return first, rest[:1].upper() + rest[1:]
    if len(stragglers) == 1:
        row = stragglers[0]
        phase = own.get((row.rank, row.host))
        where = f", slow in {phase.which}" if phase is not None else ""
        added = row.slowdown_share
        longer = f"it makes steps {1 + added:.1f} × as long" if added >= 1 else f"it makes steps {share(added)} longer"
        why = f", because of {row.cause}" if row.cause else ""
        first = f"Rank {row.rank} on {row.host} is a straggler{where}: {longer}{why}"
        slow = f" It was slow in {phase.which}: {described(phase)}." if phase is not None else ""
        return first, f"{row.evidence[:1].upper()}{row.evidence[1:]}.{slow}"
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
    redone = facts.steps_redone  # what a program that tells nothing of itself does again is not known
    return f"restarted {times}" + (f" and redid {redone} step{'s' if redone != 1 else ''}" if redone else "")


def slow_in(phases: Sequence[SlowPhase]) -> str:
    """``slow in steps 12 to 44``; empty without slow phases."""
    if not phases:
        return ""
    more = f" and {len(phases) - 1} more phase{'s' if len(phases) > 2 else ''}" if len(phases) > 1 else ""
    return f"slow in {max(phases, key=lambda one: one.cost_s).which}{more}"


def waiting(split: TimeSplit) -> str:
    """``92% of the waiting was for rank 1``; empty if no rank waited."""
    if not split.waited_for:
        return ""
    rank, part = split.waited_for[0]
    return f"{share(part)} of the waiting was for rank {rank}"


def wall_time(goodput: GoodputSplit) -> list[tuple[str, float, float]]:
    """What wall time went to, in words, with seconds and share; causes that took none are left out."""
    shares = goodput.shares()
    return [(CAUSE_NAMES[cause], part, shares[cause]) for cause, part in goodput.parts_s().items() if part > 0]


def error_feedback(alpha: float, residual: float) -> str:
    """How much compression lets through, and how much error feedback carries over."""
    return f"contraction α {share(alpha)}; the residual is {residual:.2g} × the gradient"
