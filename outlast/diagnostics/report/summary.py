"""The headline, outcome and error feedback of a report, as sentences."""

from __future__ import annotations

from collections.abc import Sequence

from outlast.diagnostics.formatting import duration, first_and_last, share
from outlast.diagnostics.report.failures import worst_of
from outlast.diagnostics.report.model import GoodputSplit, Report, TimeSplit
from outlast.diagnostics.report.phases import SlowPhase, described
from outlast.diagnostics.report.stragglers import slow_node
from outlast.diagnostics.report.told_verdicts import VERDICT

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
    """The worst that happened to the run, with whom, on what evidence, and what it cost; empty if nothing did.

    Worst is a failure from which the run did not recover; then a loss that is not finite, or replicas that differ; then
    the failure that cost most, a checkpoint that was lost, and last what only cost time: stalls, slow phases,
    stragglers, and what launchers said while it ran.
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
    """What cost most time: a straggler or the node of several, all stalls, a slow phase, or what a launcher told."""
    stalls = [one for one in report.incidents if one.kind == "stall"]
    late = [row for row in report.stragglers if row.straggler]
    straggling = {(row.rank, row.host) for row in late}
    phases = [one for one in report.slow_phases if (one.rank, one.host) not in straggling]
    known = {one.rank for one in late} | {one.rank for one in phases} | {one.rank for one in stalls}
    told = [one for one in report.incidents if one.kind == VERDICT and not (one.ranks and set(one.ranks) <= known)]
    costs: list[tuple[float, str]] = []
    if late:
        costs.append((max(row.cost_s for row in late), ": ".join(straggling_words(report))))
    if phases:
        phase = max(phases, key=lambda one: one.cost_s)
        words = f"rank {phase.rank} on {phase.host} was slow in {phase.which}: {described(phase)}"
        costs.append((phase.cost_s, words))
    if stalls:
        stalled_s, worst = sum(one.cost_s for one in stalls), max(stalls, key=lambda one: one.cost_s)
        many = f"{len(stalls)} stalls cost {duration(stalled_s)}; the worst: {worst.cause}"
        costs.append((stalled_s, many if len(stalls) > 1 else f"{worst.cause}; it went on by itself"))
    costs += [(one.cost_s, one.cause) for one in told]
    return _sentence(max(costs, key=lambda one: one[0])[1]) if costs else ""


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def headline(report: Report) -> tuple[str, str]:
    """The cause of what went wrong, or else the verdict in a few words, and the evidence or the verdict."""
    why = cause(report).rstrip(".")
    if any(row.straggler for row in report.stragglers):
        first, rest = straggling_words(report)
        if not why or why == _sentence(f"{first}: {rest}").rstrip("."):
            return first, _sentence(rest)
        rest = _sentence(rest)
    else:
        first, _, rest = report.verdict.partition(": ")
        rest = rest[:1].upper() + rest[1:]
    return (why, f"{first}. {rest}") if why else (first, rest)


def straggling_words(report: Report) -> tuple[str, str]:
    """The stragglers in a few words, and the evidence; there is one at least."""
    stragglers = [row for row in report.stragglers if row.straggler]
    own = {(one.rank, one.host): one for one in report.slow_phases}
    if len(stragglers) == 1:
        row = stragglers[0]
        phase = own.get((row.rank, row.host))
        where = f", slow in {phase.which}" if phase is not None else ""
        added = row.slowdown_share
        longer = f"it makes steps {1 + added:.1f} × as long" if added >= 1 else f"it makes steps {share(added)} longer"
        why = f", because of {row.cause}" if row.cause else ""
        first = f"Rank {row.rank} on {row.host} is a straggler{where}: {longer}{why}"
        slow = f"; slow in {phase.which}: {described(phase)}" if phase is not None else ""
        return first, f"{row.evidence}{slow}"
    worst = stragglers[0]
    node = slow_node(report.stragglers)
    if node:
        ranks = ", ".join(str(rank) for rank in sorted(row.rank for row in stragglers))
        first = f"Node {node} is slow: its ranks {ranks} are late, those of other nodes are not"
        return first, f"the latest, rank {worst.rank}: {worst.evidence}"
    named = ", ".join(f"rank {row.rank} on {row.host}" for row in stragglers[:4])
    more = f" and {len(stragglers) - 4} more" if len(stragglers) > 4 else ""
    return f"{len(stragglers)} stragglers: {named}{more}", f"the latest, rank {worst.rank}: {worst.evidence}"


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
